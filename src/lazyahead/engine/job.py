"""One answer in the hands of a worker: pieces are taken from any thread or event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from lazyahead.engine.request import Request
from lazyahead.results import Piece


class Answering(Protocol):
    """A request whose tokens become pieces, as `lazyahead.answer.Answer`."""

    request: Request
    pieces: deque[Piece]

    def end(self) -> None:
        """Nothing comes any more."""


class Taken(NamedTuple):
    """A piece, and what was seen of its request right after the pass that gave it."""

    piece: Piece
    seen: Any = None


class Job:
    """The pieces of one answer, in order, at most `max_pieces` of them held. `for` and `async for`
    give them one by one; leaving early does not cancel, `cancel` does.

    Where the pass or the worker failed, iteration raises that exception after the last piece.
    """

    def __init__(
        self,
        answer: Answering,
        wake: Callable[[], None],
        max_pieces: int,
        watch: Callable[[Request], Any] | None = None,
    ) -> None:
        self.answer = answer
        self.watch = watch
        self.max_pieces = max_pieces
        self.progress = 0.0
        """Fraction of the prompt that has been read."""
        self.error: BaseException | None = None
        self.is_over = False
        """No further piece comes; some may still be there to take."""
        self.is_cancelled = False
        self._wake_worker = wake
        self._pieces: deque[Taken] = deque()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    # --- any thread -------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ends the answer: within a layer of the pass that runs where it is alone in it, else after
        that pass."""
        self.is_cancelled = True
        self._wake_worker()

    def take(self) -> list[Taken]:
        """What is there now."""
        with self._lock:
            taken = list(self._pieces)
            self._pieces.clear()
        if len(taken) >= self.max_pieces:  # it is paused, or is about to be
            self._wake_worker()
        return taken

    @property
    def is_full(self) -> bool:
        return len(self._pieces) >= self.max_pieces

    @property
    def has_news(self) -> bool:
        """Whether there is something to take, or nothing will ever come."""
        return bool(self._pieces) or self.is_over

    def wait(self, timeout_s: float | None = None) -> bool:
        """Blocks until `has_news`; False after `timeout_s`."""
        event = threading.Event()
        with self.listening(event.set) as news:
            return news or event.wait(timeout_s)

    async def wait_async(self, timeout_s: float | None = None) -> bool:
        """As `wait`, for an event loop."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(event.set)

        with self.listening(wake) as news:
            if news:
                return True
            try:
                async with asyncio.timeout(timeout_s):
                    await event.wait()
            except TimeoutError:
                return False
            return True

    def __iter__(self) -> Iterator[Taken]:
        while True:
            self.wait()
            is_over = self.is_over  # before taking: nothing comes after it
            yield from self.take()
            if is_over:
                break
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Taken]:
        while True:
            await self.wait_async()
            is_over = self.is_over
            for taken in self.take():
                yield taken
            if is_over:
                break
        if self.error is not None:
            raise self.error

    # --- the worker's thread ----------------------------------------------------------------

    def deliver(self) -> None:
        """Hands over the pieces of the latest pass."""
        answer = self.answer
        if not answer.pieces:
            return
        seen = None if self.watch is None else self.watch(answer.request)
        with self._lock:
            while answer.pieces:
                self._pieces.append(Taken(answer.pieces.popleft(), seen))
        self._tell()

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing comes any more."""
        self.answer.end()
        with self._lock:
            self.error = error
            self.is_over = True
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def listening(self, listener: Callable[[], None]) -> _Listening:
        """Inside, `listener` is called, in the worker's thread, when there is news. Gives whether
        there is some already."""
        return _Listening(self, listener)


class _Listening:
    """See `Job.listening`."""

    def __init__(self, job: Job, listener: Callable[[], None]) -> None:
        self._job, self._listener = job, listener

    def __enter__(self) -> bool:
        with self._job._lock:
            self._job._listeners.append(self._listener)
            return self._job.has_news

    def __exit__(self, *_: object) -> None:
        with self._job._lock:
            self._job._listeners.remove(self._listener)
