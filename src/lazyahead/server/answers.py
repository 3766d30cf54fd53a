"""Answers to one request as they run side by side: their pieces merged, their end seen to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from lazyahead.engine.job import Job
from lazyahead.results import Piece, Stats
from lazyahead.server.errors import shutting_down, timed_out
from lazyahead.server.watch import Seen, Watch

if TYPE_CHECKING:
    from lazyahead.server.service import Service


class Got(NamedTuple):
    """A piece of answer number `choice`."""

    choice: int
    piece: Piece
    seen: Seen


class Tick(NamedTuple):
    """Nothing has come for a while."""

    progress: float
    """Fraction of the prompt that was read."""
    is_queued: bool
    """The prompt waits for its first pass."""
    is_writing: bool


class Answers:
    """Jobs of one request. `events` gives their pieces as they come; `close`, which must be called,
    cancels what still runs and counts it all."""

    def __init__(
        self, service: Service, jobs: Sequence[Job], watches: Sequence[Watch], more_places: int
    ) -> None:
        self.jobs = jobs
        self._service = service
        self._watches = watches
        self._more_places = more_places
        self._stats: list[Stats | None] = [None] * len(jobs)
        self._reasons: list[str | None] = [None] * len(jobs)
        self._latest: list[float | None] = [None] * len(jobs)
        self._deadline = time.monotonic() + service.settings.request_timeout_s
        self._is_closed = False

    async def events(self, tick_s: float | None = None) -> AsyncGenerator[Got | Tick]:
        """Pieces, and ticks every `tick_s` without one. Raises what ended an answer before its
        time, ApiError where that was the server."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(event.set)

        with ExitStack() as stack:
            for job in self.jobs:
                stack.enter_context(job.listening(wake))
            open_jobs = dict(enumerate(self.jobs))
            while open_jobs:
                event.clear()
                num = 0
                self._check_time()
                for index, job in list(open_jobs.items()):
                    is_over = job.is_over  # before taking: nothing comes after it
                    for piece, seen in job.take():
                        num += 1
                        self._note(index, piece)
                        yield Got(index, piece, seen)
                    if is_over:
                        self._check_end(index, job)
                        del open_jobs[index]
                if open_jobs and not num and not await self._wait(event, tick_s):
                    yield self._tick()

    def _check_time(self) -> None:
        if time.monotonic() >= self._deadline:
            raise timed_out(self._service.settings.request_timeout_s)

    async def _wait(self, event: asyncio.Event, tick_s: float | None) -> bool:
        """Whether something has come, within `tick_s`."""
        left = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(left if tick_s is None else min(left, tick_s)):
                await event.wait()
        except TimeoutError:
            return False
        return True

    def _tick(self) -> Tick:
        requests = [job.answer.request for job in self.jobs]
        return Tick(
            min(job.progress for job in self.jobs),
            all(request.admitted is None for request in requests),
            all(not request.is_prefilling for request in requests),
        )

    def _note(self, index: int, piece: Piece) -> None:
        now, before = time.perf_counter(), self._latest[index]
        if before is not None:
            self._service.metrics.step(len(piece.token_ids), now - before)
        self._latest[index] = now
        self._stats[index] = piece.stats
        self._reasons[index] = piece.finish_reason

    def _check_end(self, index: int, job: Job) -> None:
        """Raises what ended the answer, unless it is complete."""
        if self._reasons[index] is not None:
            return
        if self._service.is_stopping:
            raise shutting_down()
        raise job.error or RuntimeError("an answer ended without a reason")

    @property
    def stats(self) -> list[Stats]:
        """Of answers that have begun."""
        return [stats for stats in self._stats if stats is not None]

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    def close(self) -> None:
        """Cancels what still runs, gives places back, counts. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        service = self._service
        service.running.discard(self)
        service.admission.leave(self._more_places)
        for index, (job, watch) in enumerate(zip(self.jobs, self._watches, strict=True)):
            reason = self._reasons[index]
            if not job.is_over:
                job.cancel()
            ended = reason or ("error" if job.error is not None else "abort")
            service.metrics.ended(job.answer.request, self._stats[index], ended)
            service.metrics.drafted(watch.num_drafts, watch.num_drafted, watch.num_accepted)
