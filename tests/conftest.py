"""Settings of the whole suite."""

import os
import tempfile

from hypothesis import settings

os.environ["LAZYAHEAD_CACHE"] = tempfile.mkdtemp()  # what runs before learned changes no test

settings.register_profile("patient", deadline=None)  # a slow or busy machine is no failure
settings.load_profile("patient")
