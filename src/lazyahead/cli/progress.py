"""The one progress line of all commands: on stderr, on a terminal only, gone when they print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from lazyahead.report import Report, silent

BAR_AFTER_S = 0.5
"""A prefill that is done sooner shows no bar."""


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """Shows `what`, the finished fraction once it is reported, and the time it has taken."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as line:
        task = line.add_task(what, total=None)

        def report(what: str, done: float | None = None) -> None:
            total = None if done is None else 1.0
            line.update(task, description=what, completed=done or 0.0, total=total)

        yield report


def load_torch() -> None:
    """Imports what every model needs: seconds, or minutes on a busy machine."""
    with progress("loading torch and transformers"):
        import torch  # noqa: F401
        import transformers  # noqa: F401


class PrefillBar:
    """How much of a long prompt has been computed; gone before the answer starts."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._stack = ExitStack()
        self._report: Report | None = None

    def __call__(self, fraction: float) -> None:
        """Takes the finished fraction, as `LLM.stream` calls `on_progress`."""
        if self._report is None:
            if time.perf_counter() - self._started < BAR_AFTER_S:
                return
            self._report = self._stack.enter_context(progress("prefill"))
        self._report("prefill", fraction)

    def close(self) -> None:
        """Removes the bar. May be called more than once."""
        self._stack.close()
