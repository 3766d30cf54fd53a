"""The LM Evaluation Harness (lm-eval) on this engine. Needs the extra `eval`; nothing is imported
until it is used."""

from __future__ import annotations

from typing import Any

from lazyahead.errors import ConfigError


def register() -> Any:
    """Makes `lazyahead` a model name that lm-eval knows, and returns the class. Raises ConfigError
    without lm-eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError(
            "lm-eval is missing; install it with: pip install 'lazyahead[eval]'"
        ) from None
    from lazyahead.integrations.lm_eval import LazyAheadLM

    return LazyAheadLM
