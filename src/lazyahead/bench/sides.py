"""The sides that the decoding benchmark compares. Each answers one prompt, or several at once, and
times itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lazyahead.bench.baseline import run_baseline
from lazyahead.engine.request import Request
from lazyahead.hf.processors import picker_for
from lazyahead.llm import LLM
from lazyahead.sampling import Sampling

LOOKUP_TOKENS = 10
"""transformers' `prompt_lookup_num_tokens`."""
Prompts = Sequence[list[int]]
"""Token ids of prompts that are answered at the same time."""
_ONCE = Sampling(max_new_tokens=1, ignore_eos=True)


class Shot(NamedTuple):
    """Answers to prompts that were answered at the same time."""

    answers: tuple[tuple[int, ...], ...]
    num_timed: int
    """Tokens generated in `decode_s`."""
    decode_s: float
    """After the first token: of a batch, after the last of the first tokens."""
    num_steps: int = 0
    """Steps in that time, those of each request counted."""
    ttft_s: float = 0.0


Side = Callable[[Prompts], Shot]


def ours(llm: LLM, sampling: Sampling) -> Side:
    """Our engine under the settings of `llm`."""

    def answer(prompts: Prompts) -> Shot:
        return (
            _stream(llm, prompts[0], sampling)
            if len(prompts) == 1
            else _together(llm, prompts, sampling)
        )

    return answer


def plain_transformers(llm: LLM, sampling: Sampling) -> Side:
    """transformers `generate`."""
    return _generate(llm, sampling)


def prompt_lookup(llm: LLM, sampling: Sampling) -> Side:
    """transformers `generate` with its own drafting."""
    return _generate(llm, sampling, prompt_lookup_num_tokens=LOOKUP_TOKENS)


def _generate(llm: LLM, sampling: Sampling, **options: Any) -> Side:
    def answer(prompts: Prompts) -> Shot:
        (prompt,) = prompts
        run = run_baseline(llm.model, prompt, sampling, llm.tokenizer, **options)
        return Shot((run.token_ids,), run.num_timed, run.decode_s, run.num_steps, run.ttft_s)

    return answer


def _stream(llm: LLM, prompt: list[int], sampling: Sampling) -> Shot:
    pieces = list(llm.stream(prompt, sampling=sampling))
    stats = pieces[-1].stats
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    return Shot(
        (token_ids,), stats.answer_tokens - 1, stats.decode_s, stats.num_steps, stats.ttft_s
    )


def _together(llm: LLM, prompts: Prompts, sampling: Sampling) -> Shot:
    requests = [_request(llm, prompt, sampling) for prompt in prompts]
    engine = llm.engine
    with engine:
        try:
            for request in requests:
                engine.submit(request)
            while any(request.first_token is None for request in requests):
                engine.step()
            begin = time.perf_counter()
            tokens_before, steps_before = _tokens_and_steps(requests)
            while any(request.finish_reason is None for request in requests):
                engine.step()
            decode_s = time.perf_counter() - begin
            num_tokens, num_steps = _tokens_and_steps(requests)
        finally:
            for request in requests:
                engine.cancel(request)
    answers = tuple(tuple(request.answer) for request in requests)
    return Shot(answers, num_tokens - tokens_before, decode_s, num_steps - steps_before)


def _tokens_and_steps(requests: Sequence[Request]) -> tuple[int, int]:
    """Tokens and steps so far."""
    return sum(len(request.answer) for request in requests), sum(
        request.num_steps for request in requests
    )


def _request(llm: LLM, prompt: list[int], sampling: Sampling) -> Request:
    """A request whose prompt is computed up to its last token, so that all requests begin to decode
    at the same time."""
    session = llm.session()
    list(llm.stream(prompt, sampling=_ONCE, session=session))
    session.crop(len(prompt) - 1)
    ends = () if sampling.ignore_eos else llm.eos_ids
    return Request(
        prompt,
        picker_for(sampling, len(prompt), llm.eos_ids, llm.model, prompt),
        accept=lambda token, request: "stop" if token in ends else None,
        session=session,
        max_new_tokens=sampling.max_new_tokens,
        min_tokens=llm.prefill.min_tokens if llm.prefill is not None else None,
    )
