"""Runs the app under uvicorn until a signal comes or the model's thread fails."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from lazyahead.errors import ConfigError
from lazyahead.server.service import Service

_log = logging.getLogger(__name__)
MAX_HEADER_BYTES = 32 << 10
_GRACE_S = 5  # for last events to be sent


class Server(uvicorn.Server):
    """SIGTERM or Ctrl-C: nothing new is taken, answers may go on for `drain_s`, then streams end
    with an event that says so. A second signal ends at once."""

    def __init__(self, app: FastAPI, started: Callable[[int], None]) -> None:
        """`started` is called with the port when requests are taken."""
        self.service: Service = app.state.service
        self.exit_code = 0
        self._started = started
        self._draining: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                app,
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
        num, drain_s = self.service.admission.num_taken, self.service.settings.drain_s
        if num:
            _log.warning("%d requests may go on for %g s; again to end at once", num, drain_s)
        for _ in range(round(10 * drain_s)):
            if not self.service.admission.num_taken:
                break
            await asyncio.sleep(0.1)
        self.service.end_answers()
        self.should_exit = True

    def _die(self) -> None:
        self.exit_code = 1
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that is taken, and that refuses connections until a server listens on it. Raises
    ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"nothing can listen on {host} port {port}: {error.strerror}; "
            "choose others with --host and --port"
        ) from None
    return bound


def serve(app: FastAPI, bound: socket.socket, started: Callable[[int], None]) -> int:
    """Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 when the model's thread
    failed."""
    server = Server(app, started)
    try:
        server.run(sockets=[bound])
    finally:
        server.service.stop()  # also where a second signal skipped the app's own end
    return server.exit_code
