"""An answer as it comes, that can be cancelled from anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from types import TracebackType

from lazyahead.results import Piece


class Cancelled(Exception):  # noqa: N818 (a way out, no error)
    """Ends the pass of an answer that was cancelled."""


class Stream(Iterator[Piece]):
    """The pieces of one answer, in order. Leaving a `with` block early, `close` or `cancel` ends
    the answer; so does dropping the stream."""

    def __init__(self, pieces: Callable[[threading.Event], Generator[Piece]]) -> None:
        """`pieces` yields them, and ends soon after the event it is given is set."""
        self._is_cancelled = threading.Event()
        self._pieces = pieces(self._is_cancelled)

    def __next__(self) -> Piece:
        """The next piece. Raises StopIteration when the answer is over, or was cancelled."""
        if not self._is_cancelled.is_set():
            piece = next(self._pieces)
            if not self._is_cancelled.is_set():
                return piece
        self._pieces.close()
        raise StopIteration

    def cancel(self) -> None:
        """Ends the answer within one layer of the pass that runs, from any thread: `next` then
        raises StopIteration. What was yielded stays in the session."""
        self._is_cancelled.set()
        with suppress(ValueError):  # it runs in another thread, which sees the event
            self._pieces.close()

    def close(self) -> None:
        """As `cancel`."""
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
