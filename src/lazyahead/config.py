"""The two strategies and the presets under one name. Importing this module needs no torch."""

from lazyahead.draft.config import Lookahead
from lazyahead.prefill.config import PRESETS, LazyPrefill

__all__ = ["PRESETS", "LazyPrefill", "Lookahead"]
