"""Checks of settings that several configs share."""

from __future__ import annotations

import os
from math import isfinite

from lazyahead.errors import ConfigError, RequestError


def check_count(name: str, value: object, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_kind(name: str, value: object, kind: type, what: str) -> None:
    """Raises RequestError for a value of another type than `kind`; `what` says where one is got."""
    if not isinstance(value, kind):
        raise RequestError(f"{name} is {what}, got {type(value).__name__} {value!r:.60}")


def environment_flag(name: str) -> bool | None:
    """What a variable of the environment says, 1 or 0; None where it is not set. Raises
    ConfigError for anything else."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{name} is 0 or 1, got {value!r}")
    return value == "1" if value else None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
