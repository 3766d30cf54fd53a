"""POST /v1/documents: a document is read before any question over it is asked."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lazyahead.cache.session import Session
from lazyahead.engine.job import Job
from lazyahead.engine.request import Request as EngineRequest
from lazyahead.results import Piece
from lazyahead.server.errors import ApiError, shutting_down, timed_out
from lazyahead.server.log import note
from lazyahead.server.reply import DocumentReply, dump
from lazyahead.server.schema import DocumentRequest, Extension
from lazyahead.server.service import Manner, Service, tenant_of
from lazyahead.server.sse import until_disconnect
from lazyahead.text.messages import check_text
from lazyahead.text.prompt import Prompt, check_length, encode_beginning

router = APIRouter()


class Reading:
    """A beginning without an answer, for a worker."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.pieces: deque[Piece] = deque()

    def end(self) -> None:
        """Nothing refers to the request."""


@router.post("/v1/documents", response_model=DocumentReply)
async def documents(body: DocumentRequest, request: Request) -> Response:
    """Reads a document and keeps it, so that questions over it begin where it ends. Ask them in
    messages that begin with the same `system` message and, in the user's, with the same text."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    asked = Extension(prefill=body.lazyahead.prefill, namespace=body.lazyahead.namespace)
    manner = service.manner(asked, tenant_of(request))
    if service.engine.prefixes is None:
        raise ApiError(400, "this server has no prefix cache; start it with --cache-bytes")
    service.check_chars(len(body.text) + len(body.system or ""))
    note(request, model=body.model, user=body.user, prompt=body.text)
    token_ids = await service.in_thread(_beginning, service, body.text, body.system)
    began = time.perf_counter()
    session = await asyncio.to_thread(_load, service, token_ids, manner)
    was_stored = session is not None
    if session is None:
        session = await _read(service, request, token_ids, manner)
        is_stored = await asyncio.to_thread(_save, service, session, manner)
    told = DocumentReply(
        object="document",
        created=int(time.time()),
        model=service.model_name,
        tokens=len(token_ids),
        bytes=session.nbytes,
        stored=was_stored or is_stored,
        read_ms=0.0 if was_stored else 1e3 * (time.perf_counter() - began),
    )
    return JSONResponse(dump(told))


def _beginning(service: Service, text: str, system: str | None) -> list[int]:
    """The tokens of all prompts over a document. Raises RequestError, ContextLengthError, ApiError
    for one that is too short to be kept."""
    tokenizer = service.llm.tokenizer
    check_length(tokenizer, text, service.llm.max_context)
    check_text(text, "the document")
    check_text(system or "", "the system message")
    token_ids = encode_beginning(tokenizer, text, system)
    service.check_length(Prompt(token_ids or [0]))
    assert service.engine.prefixes is not None
    least = service.engine.prefixes.cache.block_tokens
    if len(token_ids) < least:
        raise ApiError(
            400,
            f"a document has at least {least} tokens, this one {len(token_ids)}; "
            "ask about it at once",
            param="text",
        )
    return token_ids


async def _read(
    service: Service, request: Request, token_ids: list[int], manner: Manner
) -> Session:
    """Raises ApiError where the client leaves, or the time is over."""
    session = service.engine.session_for(manner.prefill)
    work = EngineRequest.opening(token_ids, session)
    work.namespace = manner.namespace
    job = service.worker.submit(Reading(work))
    timeout_s = service.settings.request_timeout_s
    reading = asyncio.create_task(_to_end(job))
    leaving = asyncio.create_task(until_disconnect(request.receive))
    try:
        await asyncio.wait(
            {reading, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if leaving.done():
            raise ApiError(499, "the client has closed the connection", code="client_closed")
        if not reading.done():
            raise timed_out(timeout_s)
        reading.result()
    finally:
        job.cancel()
        for task in (reading, leaving):
            task.cancel()
        await asyncio.gather(reading, leaving, return_exceptions=True)
    if work.finish_reason != "stop":
        raise shutting_down()
    return session


async def _to_end(job: Job) -> None:
    async for _ in job:
        pass


def _load(service: Service, token_ids: list[int], manner: Manner) -> Session | None:
    """From the store, into the cache."""
    if service.documents is None or manner.prefill != service.llm.prefill:
        return None
    session = service.documents.load(token_ids, manner.namespace)
    if session is not None:
        service.engine.add_prefix(session, manner.namespace)
    return session


def _save(service: Service, session: Session, manner: Manner) -> bool:
    """To the store, where there is one and it is read as there."""
    if service.documents is None or manner.prefill != service.llm.prefill:
        return False
    service.documents.save(session, manner.namespace)
    return True
