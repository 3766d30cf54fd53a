"""How long work says what it is doing."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Called now and then by work that takes long."""

    def __call__(self, what: str, done: float | None = None) -> None:
        """`what` is being done; `done` is the finished fraction of the whole, None if unknown."""


def silent(what: str, done: float | None = None) -> None:
    """Reports nothing."""
