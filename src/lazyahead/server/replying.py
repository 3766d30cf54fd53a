"""Answers as one response: a stream of chunks, or the chunks folded."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lazyahead.results import Stats
from lazyahead.server.answers import Answers, Got, Tick
from lazyahead.server.errors import ApiError
from lazyahead.server.log import note_answer
from lazyahead.server.reply import ChatChunk, Completion, dump, usage
from lazyahead.server.schema import StreamOptions
from lazyahead.server.service import Service
from lazyahead.server.sse import DONE, EventStream, comment, data, whole


class Format(Protocol):
    """How one endpoint writes pieces."""

    def chunks(self, got: Got) -> Sequence[ChatChunk | Completion]:
        """What a stream sends for a piece."""

    def usage_chunk(self, stats: Sequence[Stats]) -> BaseModel:
        """The last chunk, where it was asked for."""

    def whole(self, got: Sequence[Got], stats: Sequence[Stats]) -> BaseModel:
        """Everything at once."""


class Head:
    """The fields that all chunks of one response share."""

    def __init__(self, prefix: str, model: str) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model


async def respond(
    service: Service,
    request: Request,
    answers: Answers,
    form: Format,
    *,
    stream: bool,
    options: StreamOptions | None = None,
) -> Response:
    """The response; closes the answers when it ends, however it does."""
    if stream:
        events = _events(service, request, answers, form, options or StreamOptions())
        return EventStream(answers, events, service.settings.request_timeout_s, last_event)
    got = await whole(answers, request)
    note_answer(request, answers.stats, got)
    return JSONResponse(dump(form.whole(got, answers.stats)))


def last_event(error: ApiError) -> bytes:
    """The end of a stream that failed."""
    return data(error.body) + DONE


async def _events(
    service: Service, request: Request, answers: Answers, form: Format, options: StreamOptions
) -> AsyncGenerator[bytes]:
    kept: list[Got] = []
    async with aclosing(answers.events(service.settings.progress_s)) as events:
        async for event in events:
            if isinstance(event, Tick):
                yield comment(event)
                continue
            if service.settings.log_prompts or event.piece.finish_reason is not None:
                kept.append(event)
            parts = form.chunks(event)
            if options.continuous_usage_stats:
                for part in parts:
                    part.usage = usage([event.piece.stats])
            if parts:
                yield b"".join(map(data, parts))
    note_answer(request, answers.stats, kept)
    if options.include_usage:
        yield data(form.usage_chunk(answers.stats))
    yield DONE
