"""One thread that steps an engine for callers in any thread or event loop.

with Worker(engine) as worker:
    job = worker.submit(answer)
    for piece, _ in job: ...          # or `async for`; job.cancel() from anywhere
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lazyahead.engine.engine import Engine
from lazyahead.engine.job import Answering, Job
from lazyahead.engine.request import Request
from lazyahead.errors import ConfigError, LazyAheadError, RankError
from lazyahead.hf.plain_tensors import plain_tensors

_log = logging.getLogger(__name__)
MAX_PIECES = 64
"""Pieces held for a reader that does not take them; then its request is paused."""


class WorkerDeadError(LazyAheadError):
    """The thread that runs the model has ended."""


class _AllCancelled(Exception):  # noqa: N818 (a way out, no error)
    """Nobody waits any more for the pass that runs."""


class Worker:
    """Steps an engine while it has requests, and sleeps while it has none.

    A request whose pieces nobody takes is paused once `max_pieces` are held, and goes on when they
    are taken. A pass that fails ends the requests in it, with the exception as their `error`, and
    the worker goes on. Should the worker itself fail, or a process that runs the model with it, all
    jobs end with WorkerDeadError, `is_alive` is False and `on_death` is called with the exception.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_pieces: int = MAX_PIECES,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        if max_pieces < 1:
            raise ConfigError(f"max_pieces must be at least 1, got {max_pieces}")
        self.engine = engine
        self.max_pieces = max_pieces
        self.error: BaseException | None = None
        """What ended the worker."""
        self._on_death = on_death
        self._changed = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._has_news = False
        """Something was cancelled or taken since the worker last looked."""
        self._is_closing = False
        self._jobs: dict[Request, Job] = {}
        """What the engine runs. Only the worker's thread uses it."""
        self._thread = threading.Thread(target=self._main, name="lazyahead-worker", daemon=True)

    # --- any thread -------------------------------------------------------------------------

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """Cancels what runs, within a layer, and ends the thread. May be called again."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        return self.error is None and self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        return len(self._inbox) + self.engine.num_waiting

    def submit(self, answer: Answering, watch: Callable[[Request], Any] | None = None) -> Job:
        """Queues an answer that the engine has not heard of. `watch` is called in the worker's
        thread after each pass that gave pieces; its result travels with them. Raises
        WorkerDeadError."""
        job = Job(answer, self._wake, self.max_pieces, watch)
        with self._changed:
            if self._is_closing or not self.is_alive:
                raise WorkerDeadError("the model's thread has ended; start the server again")
            answer.request.session.in_use = True
            self._inbox.append(job)
            self._changed.notify()
        return job

    def _wake(self) -> None:
        with self._changed:
            self._has_news = True
            self._changed.notify()

    # --- the worker's thread ----------------------------------------------------------------

    def _main(self) -> None:
        try:
            with plain_tensors():
                self._loop()
        except BaseException as error:
            _log.critical("the model's thread failed", exc_info=error)
            self.error = error
            self._end_all(WorkerDeadError(f"the model's thread failed: {_reason(error)}"))
            self._on_death(error)
        else:
            self._end_all(WorkerDeadError("the server is shutting down"))

    def _loop(self) -> None:
        with ExitStack() as attached:
            is_attached = False
            while self._wait(may_sleep=not is_attached):
                self._admit()
                self._drop_cancelled()
                self._resume()
                if self.engine.has_work:
                    if not is_attached:
                        attached.enter_context(self.engine)
                        is_attached = True
                    self._pass()
                else:  # plain calls of the model are as before
                    attached.close()
                    is_attached = False

    def _wait(self, may_sleep: bool) -> bool:
        """Sleeps while there is nothing to do. False: the worker is to end."""
        with self._changed:
            while may_sleep and not (self._inbox or self._has_news or self._is_closing):
                self._changed.wait(self.engine.check_s)
                self.engine.check()
            self._has_news = False
            return not self._is_closing

    def _admit(self) -> None:
        while self._inbox:
            job = self._inbox.popleft()
            self._jobs[job.answer.request] = job
            self.engine.submit(job.answer.request)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._jobs.values() if job.is_cancelled]:
            self._end(job)

    def _resume(self) -> None:
        for request, job in self._jobs.items():
            request.is_paused = job.is_full

    def _pass(self) -> None:
        try:
            self.engine.step(self._on_layer)
        except _AllCancelled:
            return
        except RankError:
            raise
        except Exception as error:
            _log.exception("a pass failed; the requests in it end")
            error.__traceback__ = None  # it holds the pass's tensors
            for request in self.engine.in_pass or list(self._jobs):
                self._end(self._jobs[request], error)
            return
        for request, job in list(self._jobs.items()):
            job.deliver()
            job.progress = request.progress
            if request.finish_reason is not None:
                del self._jobs[request]
                job.finish()

    def _on_layer(self, layer: int) -> None:
        jobs = [self._jobs[request] for request in self.engine.in_pass]
        if self._is_closing or all(job.is_cancelled for job in jobs):
            raise _AllCancelled
        for job in jobs:
            request = job.answer.request
            if request.is_prefilling:
                num_layers = self.engine.runner.num_layers
                job.progress = request.progress or layer / max(1, num_layers)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """Takes a request out before its end."""
        request = job.answer.request
        del self._jobs[request]
        try:
            self.engine.cancel(request)
        finally:
            job.finish(error)

    def _end_all(self, error: BaseException) -> None:
        """Nothing runs any more."""
        with self._changed:
            self._is_closing = True
            waiting = list(self._inbox)
            self._inbox.clear()
        for job in [*waiting, *self._jobs.values()]:
            if job.answer.request.finish_reason is None and self.error is None:
                self.engine.cancel(job.answer.request)
            job.answer.request.session.in_use = False
            job.finish(error)
        self._jobs.clear()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
