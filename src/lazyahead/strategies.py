"""Prefill strategies by name, as the command line and lm-eval give them."""

from __future__ import annotations

from pathlib import Path

from lazyahead.config import LazyPrefill


def parse_prefill(text: str) -> LazyPrefill | None:
    """`off`, a preset's name, or a profile's path. Raises ConfigError for anything else."""
    if text == "off":
        return None
    if text.endswith(".toml") or "/" in text:
        return LazyPrefill.load(Path(text).expanduser())
    return LazyPrefill.preset(text)
