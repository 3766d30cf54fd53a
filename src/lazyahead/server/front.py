"""An app without a model, in front of replicas that have one: it hands each request to one of them
and passes its answer on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lazyahead.server.admission import Admission
from lazyahead.server.call import Call
from lazyahead.server.errors import ApiError, as_api_error, shutting_down, timed_out
from lazyahead.server.fleet_metrics import together
from lazyahead.server.gate import Gate
from lazyahead.server.metrics import Metrics
from lazyahead.server.replying import last_event
from lazyahead.server.settings import Settings
from lazyahead.server.sse import data, until_disconnect

Ask = Callable[[Call], AsyncGenerator[Message]]
"""Hands a call to a replica; yields what its app sends. Raises ReplicaLostError, ApiError."""
Collect = Callable[[], Awaitable[Mapping[str, bytes]]]
"""The metrics of each replica, in Prometheus's text format."""
_GRACE_S = 5.0  # for last events to be sent
GET_TIMEOUT_S = 30.0
"""How long a request without a body waits for a replica."""


class ReplicaLostError(Exception):
    """A replica has ended before its answer did."""


class Fronting:
    """What the gate asks for, and how the front is ended."""

    def __init__(self, settings: Settings) -> None:
        self.settings = replace(settings, log_requests=False, log_prompts=False)  # the replica does
        self.admission = Admission(settings.max_connections)
        name = settings.model_name or ""
        self.metrics = Metrics(name, lambda: self.admission.num_taken, lambda: 0)
        self.is_draining = False
        self.ended = asyncio.Event()
        """Answers that still run end."""

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, and lets answers go on for so long; what then still runs ends."""
        self.is_draining = True
        await self._wait(seconds)
        self.ended.set()
        await self._wait(_GRACE_S)

    async def _wait(self, seconds: float) -> None:
        """Until nothing runs, or for so long."""
        for _ in range(round(10 * seconds)):
            if not self.admission.num_taken:
                break
            await asyncio.sleep(0.1)


def front_app(fronting: Fronting, ask: Ask, collect: Collect) -> ASGIApp:
    """The front behind its gate."""
    app: ASGIApp = Gate(Front(fronting, ask, collect), fronting)
    origins = fronting.settings.cors_origins
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
        )
    return app


def unnamed(app: ASGIApp) -> ASGIApp:
    """Leaves the request's name out of answers, for a proxy that adds it."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unnamed(message: Message) -> None:
            await send(_unnamed(message))

        await app(scope, receive, send_unnamed)

    return call


def _unnamed(message: Message) -> Message:
    if message["type"] != "http.response.start":
        return message
    headers = [pair for pair in message.get("headers", []) if pair[0] != b"x-request-id"]
    return {**message, "headers": headers}


class Front:
    """Nothing is sent before a replica has begun to answer, so that what it refuses is refused with
    its own status. A replica that is lost before it has sent anything of an answer is replaced by
    another, once."""

    def __init__(self, fronting: Fronting, ask: Ask, collect: Collect) -> None:
        self._fronting, self._ask, self._collect = fronting, ask, collect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        try:
            if scope["path"] == "/metrics":
                await (await self._metrics())(scope, receive, send)
                return
            if scope["path"] == "/ready" and self._fronting.is_draining:
                raise shutting_down()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        call = Call.of(scope, body)
        reply = _Reply(call, send)
        passing = asyncio.create_task(self._pass(call, reply))
        leaving = asyncio.create_task(until_disconnect(receive))
        ending = asyncio.create_task(self._fronting.ended.wait())
        tasks = (passing, leaving, ending)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            is_cut = ending.done() and not passing.done()
        finally:
            for task in tasks:
                task.cancel()
            passed, *_ = await asyncio.gather(*tasks, return_exceptions=True)
        if is_cut:
            await reply.fail(shutting_down())
        elif isinstance(passed, Exception):
            raise passed

    async def _pass(self, call: Call, reply: _Reply) -> None:
        """The answer, from its first message to its last, whatever happens."""
        try:
            try:
                await self._once(call, reply)
            except ReplicaLostError:
                if reply.has_content:
                    raise
                await self._once(call, reply)
        except ReplicaLostError:
            await reply.fail(_lost())
        except Exception as error:
            await reply.fail(as_api_error(error))

    async def _once(self, call: Call, reply: _Reply) -> None:
        is_post = call.scope["method"] == "POST"
        limit_s = self._fronting.settings.request_timeout_s if is_post else GET_TIMEOUT_S
        try:
            async with asyncio.timeout(limit_s) as clock, aclosing(self._ask(call)) as messages:
                async for message in messages:
                    clock.reschedule(None)  # the replica has its own limit
                    await reply.take(message)
        except TimeoutError:
            raise timed_out(limit_s) from None

    async def _metrics(self) -> Response:
        own = {"front": self._fronting.metrics.text()}
        text = together({**own, **await self._collect()})
        return Response(text, media_type=CONTENT_TYPE_LATEST)


class _Reply:
    """What has gone to the client of one answer."""

    def __init__(self, call: Call, send: Send) -> None:
        self._call, self._send = call, send
        self._has_begun = self._is_stream = False
        self.has_content = False
        """Whether there was more than a head and comments."""

    async def take(self, message: Message) -> None:
        """Passes on what a replica has sent."""
        if message["type"] != "http.response.start":
            body = message.get("body", b"")
            self.has_content |= bool(body) and not body.startswith(b":")
            await self._send(message)
            return
        if self._has_begun:  # by a replica that was lost
            if message["status"] != 200:
                raise ReplicaLostError
            return
        self._has_begun = True
        head = _unnamed(message)  # the gate names it
        kinds = [value for name, value in head["headers"] if name == b"content-type"]
        self._is_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        await self._send(head)

    async def fail(self, error: ApiError) -> None:
        """Ends the answer with an error: as a response, or as a stream's last event."""
        if not self._has_begun:
            await error.response()(self._call.scope, _nothing, self._send)
            return
        if not self._is_stream:
            raise RuntimeError(error.message)  # the length is already told
        event = last_event(error)
        if self._call.scope["path"] == "/v1/responses":
            event = data({**error.body["error"], "type": "error"}, event="error")
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _lost() -> ApiError:
    return ApiError(
        503,
        "the replica that answered has ended; ask again",
        code="replica_lost",
        headers={"Retry-After": "1"},
    )


async def _nothing() -> Message:
    raise AssertionError("an error is answered without reading")


async def _live(receive: Receive, send: Send) -> None:
    """The front has nothing to start or stop."""
    for _ in range(2):
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
