"""Runs the app under uvicorn until a signal comes or the model's thread fails."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from lazyahead.server.service import Service

MAX_HEADER_BYTES = 32 << 10
_GRACE_S = 5  # for last events to be sent


class Server(uvicorn.Server):
    """SIGTERM or Ctrl-C: nothing new is taken, answers may go on for `drain_s`, then streams end
    with an event that says so. A second signal ends at once."""

    def __init__(self, app: FastAPI, host: str, port: int, started: Callable[[int], None]) -> None:
        """`started` is called with the port when requests are taken."""
        self.service: Service = app.state.service
        self.exit_code = 0
        self._started = started
        self._draining: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=self.service.settings.max_connections,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        self.service.on_death = lambda: loop.call_soon_threadsafe(self._die)
        if self.started:
            self._started(self.servers[0].sockets[0].getsockname()[1])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server rather than the process, whose exit code then tells of it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, self._handle) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _handle(self, kind: int, _: object) -> None:
        if self.service.is_draining:
            self.should_exit = self.force_exit = True
            return
        self.exit_code = 130 if kind == signal.SIGINT else 0
        self.service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls it ten times a second."""
        if self.service.is_draining and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        """Waits for answers, up to `drain_s`; what then still runs ends."""
        for _ in range(round(10 * self.service.settings.drain_s)):
            if not self.service.admission.num_taken:
                break
            await asyncio.sleep(0.1)
        self.service.end_answers()
        self.should_exit = True

    def _die(self) -> None:
        self.exit_code = 1
        self.should_exit = True


def serve(app: FastAPI, host: str, port: int, started: Callable[[int], None]) -> int:
    """Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 when the model's thread failed or
    the port is taken."""
    server = Server(app, host, port, started)
    try:
        server.run()
    except SystemExit as error:  # uvicorn could not begin
        return int(error.code or 1)
    return server.exit_code
