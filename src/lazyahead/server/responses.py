"""POST /v1/responses: text in, text out; `previous_response_id` goes on with a conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from lazyahead.results import Stats
from lazyahead.sampling import Sampling
from lazyahead.server.answers import Answers, Got, Tick
from lazyahead.server.detail import Details, fold, token_texts
from lazyahead.server.docs import STREAMED
from lazyahead.server.errors import ApiError
from lazyahead.server.log import note, note_answer
from lazyahead.server.reply import ResponseObject, dump, usage
from lazyahead.server.schema import ResponsesRequest
from lazyahead.server.service import Manner, Service, tenant_of
from lazyahead.server.sse import EventStream, comment, data, whole
from lazyahead.server.store import Kept
from lazyahead.text.messages import read_messages
from lazyahead.text.prompt import Prompt, check_length, encode_turn

router = APIRouter()


@router.post("/v1/responses", response_model=ResponseObject, responses=STREAMED)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    note(request, model=body.model, user=body.user, stream=body.stream)
    service.check_model(body.model)
    tenant = tenant_of(request)
    manner = service.manner(body.lazyahead, tenant)
    before = _before(service, body, tenant)
    turn = _Turn(body, before, manner, service, tenant)
    note(request, prompt=turn.messages)
    service.check_chars(sum(len(message["content"]) for message in turn.messages))
    prompt = await service.in_thread(_encode, service, turn)
    sampling = _sampling(
        body, service.num_tokens(body.max_output_tokens, prompt, "max_output_tokens")
    )
    answers = await service.ask([prompt], sampling, 1, manner, session=turn.session)
    try:
        details = None
        if body.lazyahead.detail:
            texts = await service.in_thread(token_texts, service.llm.tokenizer, prompt.token_ids)
            details = Details(service.llm.tokenizer, texts)
        form = _Format(turn, details)
        if body.stream:
            events = _events(service, request, answers, form)
            return EventStream(answers, events, service.settings.request_timeout_s, form.failed)
        got = await whole(answers, request)
        note_answer(request, answers.stats, got)
        return JSONResponse(form.end(got, answers.stats))
    except BaseException:
        answers.close()
        raise


def response_id(replica: str) -> str:
    """A new name, which says which replica keeps it."""
    return "_".join(filter(None, ("resp", replica, secrets.token_hex(16))))


def replica_of(name: str) -> str | None:
    """The replica that keeps the response of this name; None where it does not say."""
    parts = name.split("_")
    return parts[1] if len(parts) == 3 else None


def _before(service: Service, body: ResponsesRequest, tenant: str) -> Kept | None:
    """The response that is continued. Raises ApiError where it is not kept."""
    if body.previous_response_id is None:
        return None
    before = service.responses.get(body.previous_response_id, tenant)
    if before is None:
        raise ApiError(
            404,
            f"there is no response {body.previous_response_id!r}; this server keeps them for "
            f"{service.settings.response_ttl_s:g} s",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return before


def _sampling(body: ResponsesRequest, max_new_tokens: int) -> Sampling:
    given: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    return Sampling(max_new_tokens, **given)


class _Turn:
    """One request and what it continues."""

    def __init__(
        self,
        body: ResponsesRequest,
        before: Kept | None,
        manner: Manner,
        service: Service,
        tenant: str,
    ) -> None:
        new = (
            [{"role": "user", "content": body.input}]
            if isinstance(body.input, str)
            else [message.plain() for message in body.input]
        )
        self.body, self.manner, self.tenant, self.service = body, manner, tenant, service
        self.said = [*([] if before is None else before.messages), *new]
        """The conversation without instructions, which hold for one response only."""
        told = [] if body.instructions is None else [_system(body.instructions)]
        self.messages = [*told, *self.said]
        self.session = service.engine.session_for(manner.prefill)
        if before is not None and before.session is not None and self._may_continue(before):
            self.session, before.session = before.session, None  # for one turn

    def _may_continue(self, before: Kept) -> bool:
        """Whether the session that has read it serves this turn too."""
        is_full = self.service.llm.support.level == "full"  # others cannot be cut back
        return is_full and before.prefill == self.manner.prefill

    def keep(self, response_id: str, text: str) -> None:
        """So that it can be continued."""
        if self.body.store:
            said = [*self.said, {"role": "assistant", "content": text}]
            kept = Kept(self.tenant, said, self.manner.prefill, self.session)
            self.service.responses.put(response_id, kept)


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _encode(service: Service, turn: _Turn) -> Prompt:
    read = read_messages(turn.messages)
    tokenizer = service.llm.tokenizer
    text = "".join(message["content"] for message in read)
    check_length(tokenizer, text, service.llm.max_context)
    return encode_turn(tokenizer, read, turn.session.history)


class _Format:
    """Pieces as events of the responses API."""

    def __init__(self, turn: _Turn, details: Details | None) -> None:
        self._turn, self._details = turn, details
        self._response_id = response_id(turn.service.replica)
        self._item_id = f"msg_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._num_events = 0

    def begin(self) -> bytes:
        """The events in front of the text."""
        response = self._response("in_progress", None)
        item = {**self._item("", "in_progress"), "content": []}
        return b"".join(
            (
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **self._place, part=_part("")),
            )
        )

    def delta(self, got: Got) -> bytes:
        """The text of a piece; nothing where there is none."""
        detail = {}
        if self._details is not None:
            detail = {"lazyahead": dump(self._details.of(got.piece, got.seen))}
        if not got.piece.text and not detail:
            return b""
        return self._event(
            "response.output_text.delta",
            **self._place,
            delta=got.piece.text,
            logprobs=[],
            **detail,
        )

    def finish(self, got: Sequence[Got], stats: Sequence[Stats]) -> bytes:
        """The events behind the text."""
        text = "".join(part.piece.text for part in got)
        response = self._whole(text, got, stats)
        item = response["output"][0]
        return b"".join(
            (
                self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
                self._event("response.content_part.done", **self._place, part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{response['status']}", response=response),
            )
        )

    def end(self, got: Sequence[Got], stats: Sequence[Stats]) -> dict[str, Any]:
        """Everything at once."""
        text = "".join(part.piece.text for part in got)
        response = self._whole(text, got, stats)
        if self._details is not None:
            of = self._details.of
            response["lazyahead"] = dump(fold([of(part.piece, part.seen) for part in got]))
        return response

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that failed."""
        told = error.body["error"]
        response = self._response("failed", None)
        response["error"] = {"code": told["code"] or "server_error", "message": told["message"]}
        return self._event("response.failed", response=response)

    def _whole(self, text: str, got: Sequence[Got], stats: Sequence[Stats]) -> dict[str, Any]:
        self._turn.keep(self._response_id, text)
        is_cut = got[-1].piece.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        response = self._response(status, dump(usage(stats)))
        response["output"] = [self._item(text, status)]
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return data({"type": kind, "sequence_number": number, **fields}, event=kind)

    def _item(self, text: str, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)],
        }

    def _response(self, status: str, used: dict[str, Any] | None) -> dict[str, Any]:
        body = self._turn.body
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._turn.service.model_name,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if used is None else _usage(used),
        }


def _usage(used: dict[str, Any]) -> dict[str, Any]:
    """Under the names that this API has."""
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": used["prompt_tokens_details"],
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
        "lazyahead": used["lazyahead"],
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _events(
    service: Service, request: Request, answers: Answers, form: _Format
) -> AsyncGenerator[bytes]:
    kept: list[Got] = []
    yield form.begin()
    async with aclosing(answers.events(service.settings.progress_s)) as events:
        async for event in events:
            if isinstance(event, Tick):
                yield comment(event)
                continue
            kept.append(event)
            if sent := form.delta(event):
                yield sent
    note_answer(request, answers.stats, kept)
    yield form.finish(kept, answers.stats)
