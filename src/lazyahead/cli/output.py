"""What commands print and write: one JSON line, tables, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lazyahead.cli import complain
from lazyahead.errors import LazyAheadError, RequestError

if TYPE_CHECKING:
    import torch

    from lazyahead.llm import LLM
    from lazyahead.results import Stats

TABLE_WIDTH = 120


def record(
    llm: LLM, *, seed: int | None, runs: int, results: dict[str, Any], **config: Any
) -> dict[str, Any]:
    """What `--json` prints: the results, and all that is needed to get them again."""
    prefill = llm.prefill.to_dict() if llm.prefill else None
    from lazyahead.draft.factory import describe
    from lazyahead.hf.attach import dtype_name

    decode = describe(llm.decode)
    where = (llm.model.device, dtype_name(llm.model))
    return envelope(
        llm.name, where, {"prefill": prefill, "decode": decode, **config}, seed, runs, results
    )


def envelope(
    model: str,
    where: tuple[torch.device, torch.dtype | str],
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
    """The last line of stdout, in ASCII whatever the terminal's encoding."""
    print(json.dumps(values), flush=True)


def describe(stats: Stats) -> str:
    """One line about an answer."""
    reused = f", {stats.reused_tokens:,} reused" if stats.reused_tokens else ""
    parts = (
        f"first token {seconds(stats.ttft_s)}",
        f"{stats.tokens_per_s:.1f} tokens/s",
        f"{stats.prompt_tokens:,} prompt tokens{reused}, "
        f"{stats.prompt_tokens_computed:.0%} computed",
        f"{stats.revived:,} revived",
        f"{stats.answer_tokens} answer tokens, {stats.tokens_per_step:.2f} per step",
    )
    return " · ".join(parts)


def seconds(value: float) -> str:
    """A duration with a unit that suits it."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def note(message: str) -> None:
    """A line on stderr, dim on a terminal."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="dim", markup=False)


def tables() -> Console:
    """The console for tables: stdout, `TABLE_WIDTH` columns wide where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)


class Interrupt:
    """Ctrl-C takes effect between two steps rather than inside one, so that a session stays whole.
    While `can_wait` is false it raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.came = False
        """Ctrl-C was pressed; end after this step."""
        self.can_wait = False
        """Whether a next step follows soon. A second Ctrl-C raises in any case."""

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
    """Raises RequestError for files that could not be written, before any work is done."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise RequestError(f"{path} cannot be written: {reason}")


class SideOutputs:
    """Files that are written after the result was printed: one that fails costs nothing else."""

    def __init__(self) -> None:
        self.failed = False
        """Whether one could not be written; the command then ends with exit code 1."""

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """One line on stderr where what is written inside fails."""
        try:
            yield
        except (OSError, LazyAheadError) as error:
            self.failed = True
            reason = getattr(error, "strerror", None) or str(error)
            complain(reason if str(path) in reason else f"{path} could not be written: {reason}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; renamed to `path` at the end, deleted after an exception. What
    is no file, a pipe or a terminal, is written to as it is; a link stays one."""
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        yield path
        return
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
