"""Answers sooner on long prompts: reads lazily (LazyLLM) and writes ahead (Lookahead), on any
decoder-only model.

Nothing happens on import: names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazyahead.cache.session import Session
    from lazyahead.config import PRESETS, LazyPrefill, Lookahead
    from lazyahead.errors import LazyAheadError
    from lazyahead.hf.probe import Support, probe
    from lazyahead.integrations.hf_generate import accelerate, custom_generate
    from lazyahead.llm import LLM
    from lazyahead.results import Completion, Piece, Reach, Stats
    from lazyahead.sampling import Sampling

__version__ = "0.2.0"

_HOME = {
    "LLM": "llm",
    "LazyPrefill": "config",
    "Lookahead": "config",
    "PRESETS": "config",
    "Sampling": "sampling",
    "Session": "cache.session",
    "Completion": "results",
    "Piece": "results",
    "Reach": "results",
    "Stats": "results",
    "Support": "hf.probe",
    "probe": "hf.probe",
    "accelerate": "integrations.hf_generate",
    "custom_generate": "integrations.hf_generate",
    "LazyAheadError": "errors",
}

__all__ = [
    "LLM",
    "PRESETS",
    "Completion",
    "LazyAheadError",
    "LazyPrefill",
    "Lookahead",
    "Piece",
    "Reach",
    "Sampling",
    "Session",
    "Stats",
    "Support",
    "__version__",
    "accelerate",
    "custom_generate",
    "probe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lazyahead' has no attribute {name!r}")
    return getattr(import_module(f"lazyahead.{_HOME[name]}"), name)
