"""Server-sent events, and answers that end when their reader leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lazyahead.server.answers import Answers, Got, Tick
from lazyahead.server.errors import ApiError, as_api_error

_log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def data(value: BaseModel | dict[str, Any], event: str | None = None) -> bytes:
    """One event. Of a model, the fields that were set."""
    if isinstance(value, BaseModel):
        text = value.model_dump_json(exclude_unset=True)
    else:
        text = json.dumps(value)
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {text}\n\n".encode()


def comment(tick: Tick) -> bytes:
    """What a stream says while no piece comes. Clients skip comments."""
    if tick.is_writing:
        return b": writing\n\n"
    if tick.is_queued:
        return b": waiting\n\n"
    return f": reading {tick.progress:.0%}\n\n".replace("%", " %").encode()


class EventStream(Response):
    """Sends what `events` yields. When the reader leaves, or an event cannot be sent within
    `stall_s`, the generator is closed and the answers are cancelled. An exception of `events`
    becomes a last event, made by `on_error`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: Answers,
        events: AsyncGenerator[bytes],
        stall_s: float,
        on_error: Callable[[ApiError], bytes],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers, self._events = answers, events
        self._stall_s, self._on_error = stall_s, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(until_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._answers.close()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._send_one(send, event)
        except TimeoutError:
            return
        except Exception as error:
            told = as_api_error(error)
            if told.code == "internal_error":
                _log.exception("a stream failed")
            await self._send_one(send, self._on_error(told))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_one(self, send: Send, event: bytes) -> None:
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.body", "body": event, "more_body": True})


async def until_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(answers: Answers, request: Request) -> list[Got]:
    """All pieces, for an answer that is not streamed: the stream, folded. Raises ApiError 499 when
    the client has gone."""
    collecting = asyncio.create_task(_collect(answers))
    leaving = asyncio.create_task(until_disconnect(request.receive))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ApiError(499, "the client has closed the connection", code="client_closed")
        return collecting.result()
    finally:
        answers.close()
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)


async def _collect(answers: Answers) -> list[Got]:
    async with aclosing(answers.events()) as events:
        return [event async for event in events if isinstance(event, Got)]
