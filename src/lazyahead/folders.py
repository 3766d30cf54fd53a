"""Where files are kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`LAZYAHEAD_CACHE`, else lazyahead in the user's cache folder."""
    named = os.environ.get("LAZYAHEAD_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazyahead"
