"""POST /v1/completions: text goes on, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fastapi import APIRouter, Request, Response

from lazyahead.results import Stats
from lazyahead.server.answers import Answers, Got
from lazyahead.server.detail import Details, TokenNames, fold, token_texts
from lazyahead.server.docs import STREAMED
from lazyahead.server.log import note
from lazyahead.server.reply import Completion, CompletionChoice, usage
from lazyahead.server.replying import Head, respond
from lazyahead.server.schema import CompletionRequest
from lazyahead.server.service import Service, tenant_of
from lazyahead.text.detokenizer import decode
from lazyahead.text.prompt import Prompt, check_length

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def completions(body: CompletionRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    note(request, model=body.model, user=body.user, stream=body.stream, prompt=body.prompt)
    service.check_model(body.model)
    num = body.n * len(body.prompts)
    service.check_counts(num, body.stops, len(body.logit_bias or {}))
    manner = service.manner(body.lazyahead, tenant_of(request))
    service.check_chars(sum(len(prompt) for prompt in body.prompts))
    prompts = [await service.in_thread(_encode, service, prompt) for prompt in body.prompts]
    sampling = body.sampling(service.num_tokens(body.max_tokens, prompts[0]))
    answers = await service.ask(prompts, sampling, body.n, manner, num_top=body.logprobs)
    try:
        form = await _format(service, body, prompts, answers)
        return await respond(
            service, request, answers, form, stream=body.stream, options=body.stream_options
        )
    except BaseException:
        answers.close()
        raise


def _encode(service: Service, prompt: str | list[int]) -> Prompt:
    if not isinstance(prompt, str):
        return Prompt(prompt)
    tokenizer = service.llm.tokenizer
    check_length(tokenizer, prompt, service.llm.max_context)
    return Prompt(list(tokenizer(prompt, verbose=False)["input_ids"]))


async def _format(
    service: Service, body: CompletionRequest, prompts: Sequence[Prompt], answers: Answers
) -> TextFormat:
    tokenizer = service.llm.tokenizer
    echoes, details = None, None
    if body.echo:
        echoes = [
            prompt if isinstance(prompt, str) else decode(tokenizer, prompt)
            for prompt in body.prompts
            for _ in range(body.n)
        ]
    if body.lazyahead.detail:
        details = []
        for prompt in prompts:
            texts = await service.in_thread(token_texts, tokenizer, prompt.token_ids)
            details += [Details(tokenizer, texts) for _ in range(body.n)]
    names = TokenNames(tokenizer) if body.logprobs is not None else None
    return TextFormat(Head("cmpl", service.model_name), names, details, echoes, len(prompts))


class TextFormat:
    """Pieces as completions."""

    def __init__(
        self,
        head: Head,
        names: TokenNames | None,
        details: list[Details] | None,
        echoes: list[str] | None,
        num_prompts: int,
    ) -> None:
        self._head, self._names, self._details = head, names, details
        self._echoes, self._num_prompts = echoes, num_prompts
        self._offsets: dict[int, int] = {}
        """Characters of the tokens so far, of each choice."""

    def chunks(self, got: Got) -> list[Completion]:
        """One a piece that shows something."""
        choice = self._choice([got])
        is_silent = not choice.text and got.piece.finish_reason is None
        if is_silent and not got.seen.logprobs and self._details is None:
            return []
        return [self._with([choice])]

    def usage_chunk(self, stats: Sequence[Stats]) -> Completion:
        return self._with([], stats)

    def whole(self, got: Sequence[Got], stats: Sequence[Stats]) -> Completion:
        by_index = groupby(sorted(got, key=lambda one: one.choice), key=lambda one: one.choice)
        return self._with([self._choice(list(pieces)) for _, pieces in by_index], stats)

    def _choice(self, got: Sequence[Got]) -> CompletionChoice:
        """Of pieces that follow one another."""
        index = got[0].choice
        text = "".join(part.piece.text for part in got)
        if self._echoes is not None and index not in self._offsets:
            text = self._echoes[index] + text
        offset = self._offsets.setdefault(index, 0)
        choice = CompletionChoice(
            index=index, text=text, logprobs=None, finish_reason=got[-1].piece.finish_reason
        )
        if self._names is not None:
            logprobs = [one for part in got for one in part.seen.logprobs]
            choice.logprobs = self._names.completion(logprobs, offset)
            self._offsets[index] += sum(map(len, choice.logprobs.tokens))
        if self._details is not None:
            of = self._details[index].of
            choice.lazyahead = fold([of(part.piece, part.seen) for part in got])
        return choice

    def _with(
        self, choices: list[CompletionChoice], stats: Sequence[Stats] | None = None
    ) -> Completion:
        head = self._head
        made = Completion(
            id=head.id,
            object="text_completion",
            created=head.created,
            model=head.model,
            choices=choices,
        )
        if stats is not None:
            made.usage = usage(stats, self._num_prompts)
        return made
