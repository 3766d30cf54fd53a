"""What commands print: one JSON line, tables, a progress bar, files that are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from lazyahead.errors import RequestError

if TYPE_CHECKING:
    import torch

    from lazyahead.llm import LLM
    from lazyahead.results import Stats

BAR_AFTER_S = 0.5
TABLE_WIDTH = 120


def record(
    llm: LLM, *, seed: int | None, runs: int, results: dict[str, Any], **config: Any
) -> dict[str, Any]:
    """What `--json` prints: the results, and all that is needed to get them again."""
    prefill = llm.prefill.to_dict() if llm.prefill else None
    from lazyahead.draft.factory import describe

    decode = describe(llm.decode)
    where = (llm.model.device, llm.model.dtype)
    return envelope(
        llm.name, where, {"prefill": prefill, "decode": decode, **config}, seed, runs, results
    )


def envelope(
    model: str,
    where: tuple[torch.device, torch.dtype],
    config: dict[str, Any],
    seed: int | None,
    runs: int,
    results: dict[str, Any],
) -> dict[str, Any]:
    """The fields that every command's JSON has, then its own."""
    from lazyahead.bench.machine import machine

    common = {
        "lazyahead": version("lazyahead"),
        "machine": machine(*where),
        "model": model,
        "config": config,
    }
    return {**common, "seed": seed, "runs": runs, **results}


def print_json(values: dict[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps(values, ensure_ascii=False), flush=True)


def describe(stats: Stats) -> str:
    """One line about an answer."""
    reused = f", {stats.reused_tokens:,} reused" if stats.reused_tokens else ""
    return (
        f"first token {seconds(stats.ttft_s)} · {stats.tokens_per_s:.1f} tokens/s"
        f" · {stats.prompt_tokens:,} prompt tokens{reused}, {stats.prompt_tokens_computed:.0%} computed"
        f" · {stats.revived:,} revived · {stats.answer_tokens} answer tokens, {stats.tokens_per_step:.2f} per step"
    )


def seconds(value: float) -> str:
    """A duration that a person reads at a glance."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def note(message: str) -> None:
    """A line on stderr, dim on a terminal."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="dim", markup=False)


def tables() -> Console:
    """Where tables go: stdout, wide enough for all their columns also where that is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)


class ReadingBar:
    """How much of a long prompt has been read; on stderr, on a terminal only, gone before the
    answer starts."""

    def __init__(self, enabled: bool | None = None) -> None:
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._started = time.perf_counter()
        self._progress: Progress | None = None

    def __call__(self, fraction: float) -> None:
        """Called by `LLM.stream` with 0 … 1."""
        if not self._enabled:
            return
        if self._progress is None:
            if time.perf_counter() - self._started < BAR_AFTER_S:
                return
            columns = (
                TextColumn("reading"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.add_task("reading", total=1.0)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=fraction)

    def close(self) -> None:
        """Takes the bar away. May be called often."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._enabled = False


class Interrupt:
    """Ctrl-C between two steps rather than inside one: a session stays whole. While it cannot wait,
    it raises."""

    def __init__(self) -> None:
        self.came = False
        """Ctrl-C was pressed; end after this step."""
        self.can_wait = False
        """Whether a next step is near. A second Ctrl-C never waits."""

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if self.came or not self.can_wait:
            raise KeyboardInterrupt
        self.came = True


def check_folders(*paths: Path | None) -> None:
    """Refuses what could not be written, before any work is done for it."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise RequestError(f"{path} cannot be written: {reason}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path` when all went well, and vanishes when not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
