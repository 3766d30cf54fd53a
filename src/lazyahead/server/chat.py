"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Request, Response

from lazyahead.results import Stats
from lazyahead.server.answers import Answers, Got
from lazyahead.server.detail import Details, TokenNames, fold, token_texts
from lazyahead.server.docs import STREAMED
from lazyahead.server.log import note
from lazyahead.server.reply import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    usage,
)
from lazyahead.server.replying import Head, respond
from lazyahead.server.schema import ChatMessage, ChatRequest
from lazyahead.server.service import Service, tenant_of
from lazyahead.text.messages import read_messages
from lazyahead.text.prompt import Prompt, check_length, encode_turn

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    note(request, model=body.model, user=body.user, stream=body.stream)
    service.check_model(body.model)
    service.check_counts(body.n, body.stops, len(body.logit_bias or {}))
    manner = service.manner(body.lazyahead, tenant_of(request))
    prompt = await read_chat(service, body.messages)
    note(request, prompt=[message.plain() for message in body.messages])
    asked = body.max_completion_tokens or body.max_tokens
    sampling = body.sampling(service.num_tokens(asked, prompt))
    num_top = body.top_logprobs if body.logprobs else None
    answers = await service.ask([prompt], sampling, body.n, manner, num_top=num_top)
    try:
        form = await _format(service, body, prompt, answers)
        return await respond(
            service, request, answers, form, stream=body.stream, options=body.stream_options
        )
    except BaseException:
        answers.close()
        raise


async def read_chat(service: Service, messages: Sequence[ChatMessage]) -> Prompt:
    """Messages to tokens, through the chat template. Raises ApiError, RequestError."""
    plain = [message.plain() for message in messages]
    service.check_chars(sum(len(message["content"]) for message in plain))
    return await service.in_thread(_encode, service, plain)


def _encode(service: Service, plain: list[dict[str, Any]]) -> Prompt:
    read = read_messages(plain)
    tokenizer = service.llm.tokenizer
    text = "".join(message["content"] for message in read)
    check_length(tokenizer, text, service.llm.max_context)
    return encode_turn(tokenizer, read)


async def _format(
    service: Service, body: ChatRequest, prompt: Prompt, answers: Answers
) -> ChatFormat:
    tokenizer = service.llm.tokenizer
    details = None
    if body.lazyahead.detail:
        texts = await service.in_thread(token_texts, tokenizer, prompt.token_ids)
        details = [Details(tokenizer, texts) for _ in answers.jobs]
    names = TokenNames(tokenizer) if body.logprobs else None
    return ChatFormat(Head("chatcmpl", service.model_name), names, details)


class ChatFormat:
    """Pieces as chat completions."""

    def __init__(self, head: Head, names: TokenNames | None, details: list[Details] | None) -> None:
        self._head, self._names, self._details = head, names, details
        self._begun: set[int] = set()

    def chunks(self, got: Got) -> list[ChatChunk]:
        """The first one names the role, the last one why it ended."""
        index, piece, seen = got
        made = []
        if index not in self._begun:
            self._begun.add(index)
            made.append(self._chunk(index, Delta(role="assistant", content="")))
        if piece.text or seen.logprobs or self._details is not None:
            choice = self._choice(index, Delta(content=piece.text))
            if self._names is not None:
                choice.logprobs = self._names.chat(seen.logprobs)
            if self._details is not None:
                choice.lazyahead = self._details[index].of(piece, seen)
            made.append(self._with([choice]))
        if piece.finish_reason is not None:
            choice = self._choice(index, Delta())
            choice.finish_reason = piece.finish_reason
            made.append(self._with([choice]))
        return made

    def usage_chunk(self, stats: Sequence[Stats]) -> ChatChunk:
        chunk = self._with([])
        chunk.usage = usage(stats)
        return chunk

    def whole(self, got: Sequence[Got], stats: Sequence[Stats]) -> ChatCompletion:
        by_index = groupby(sorted(got, key=lambda one: one.choice), key=lambda one: one.choice)
        head = self._head
        return ChatCompletion(
            id=head.id,
            object="chat.completion",
            created=head.created,
            model=head.model,
            choices=[self._whole_choice(index, list(pieces)) for index, pieces in by_index],
            usage=usage(stats),
        )

    def _whole_choice(self, index: int, got: Sequence[Got]) -> ChatChoice:
        logprobs: ChatLogprobs | None = None
        if self._names is not None:
            logprobs = self._names.chat([one for part in got for one in part.seen.logprobs])
        text = "".join(part.piece.text for part in got)
        choice = ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=text),
            logprobs=logprobs,
            finish_reason=got[-1].piece.finish_reason or "stop",
        )
        if self._details is not None:
            of = self._details[index].of
            choice.lazyahead = fold([of(part.piece, part.seen) for part in got])
        return choice

    def _chunk(self, index: int, delta: Delta) -> ChatChunk:
        return self._with([self._choice(index, delta)])

    @staticmethod
    def _choice(index: int, delta: Delta) -> ChunkChoice:
        return ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)

    def _with(self, choices: list[ChunkChoice]) -> ChatChunk:
        head = self._head
        return ChatChunk(
            id=head.id,
            object="chat.completion.chunk",
            created=head.created,
            model=head.model,
            choices=choices,
        )
