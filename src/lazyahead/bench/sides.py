"""The sides that the decoding benchmark compares. Each answers one prompt, or several at once, and
times itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from lazyahead.bench.baseline import run_baseline
from lazyahead.engine.request import Request
from lazyahead.hf.processors import picker_for
from lazyahead.llm import LLM
from lazyahead.sampling import Sampling

LOOKUP_TOKENS = 10
"""transformers' `prompt_lookup_num_tokens`."""
Prompts = Sequence[list[int]]
"""Token ids of what is asked at the same time: one prompt, or several."""
_ONCE = Sampling(max_new_tokens=1, ignore_eos=True)


class Shot(NamedTuple):
    """Answers to prompts that were asked at the same time."""

    answers: tuple[tuple[int, ...], ...]
    num_timed: int
    """Tokens written in `decode_s`."""
    decode_s: float
    """After the first token: of a batch, after the last of the first tokens."""
    num_steps: int = 0
    """Steps in that time, those of each request counted."""
    ttft_s: float = 0.0


Side = Callable[[Prompts], Shot]


def ours(llm: LLM, sampling: Sampling) -> Side:
    """Our engine, reading and writing as `llm` is set up."""

    def answer(prompts: Prompts) -> Shot:
        return (
            _stream(llm, prompts[0], sampling)
            if len(prompts) == 1
            else _together(llm, prompts, sampling)
        )

    return answer


def plain_transformers(llm: LLM, sampling: Sampling) -> Side:
    """transformers `generate`."""

    def answer(prompts: Prompts) -> Shot:
        run = run_baseline(llm.model, prompts[0], sampling, llm.tokenizer)
        return Shot((run.token_ids,), len(run.token_ids) - 1, run.decode_s)

    return answer


def prompt_lookup(llm: LLM, sampling: Sampling) -> Side:
    """transformers `generate` with its own drafting."""
    options: dict[str, Any] = {
        "prompt_lookup_num_tokens": LOOKUP_TOKENS,
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": sampling.max_new_tokens if sampling.ignore_eos else None,
        "do_sample": sampling.temperature > 0,
        "pad_token_id": llm.eos_ids[0] if llm.eos_ids else 0,
    }
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}

    def answer(prompts: Prompts) -> Shot:
        (prompt,) = prompts
        steps, ids = _Steps(), torch.tensor([prompt], device=llm.model.device)
        output = llm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=steps, **options
        )
        _, (begin, _), *later = steps.seen  # the prompt, the first pass, the others
        token_ids = tuple(output[0, len(prompt) :].tolist())
        num_timed, end = sum(num for _, num in later), later[-1][0] if later else begin
        return Shot((token_ids,), num_timed, end - begin, len(later))

    return answer


class _Steps(BaseStreamer):  # type: ignore[misc]
    """Notes when tokens come, and how many: prompt lookup brings several at once, already with the
    first pass."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        pass


def _stream(llm: LLM, prompt: list[int], sampling: Sampling) -> Shot:
    pieces = list(llm.stream(prompt, sampling=sampling))
    stats = pieces[-1].stats
    token_ids = tuple(token for piece in pieces for token in piece.token_ids)
    return Shot(
        (token_ids,), stats.answer_tokens - 1, stats.decode_s, stats.num_steps, stats.ttft_s
    )


def _together(llm: LLM, prompts: Prompts, sampling: Sampling) -> Shot:
    requests, engine = [_request(llm, prompt, sampling) for prompt in prompts], llm.engine
    with engine:
        try:
            for request in requests:
                engine.submit(request)
            while any(request.first_token is None for request in requests):
                engine.step()
            begin, (tokens_before, steps_before) = time.perf_counter(), _progress(requests)
            while any(request.finish_reason is None for request in requests):
                engine.step()
            decode_s, (num_tokens, num_steps) = time.perf_counter() - begin, _progress(requests)
        finally:
            for request in requests:
                engine.cancel(request)
    answers = tuple(tuple(request.answer) for request in requests)
    return Shot(answers, num_tokens - tokens_before, decode_s, num_steps - steps_before)


def _progress(requests: Sequence[Request]) -> tuple[int, int]:
    """Tokens and steps so far."""
    return sum(len(request.answer) for request in requests), sum(
        request.num_steps for request in requests
    )


def _request(llm: LLM, prompt: list[int], sampling: Sampling) -> Request:
    """A request whose prompt has been read but for its last token, so that all can begin to write
    together."""
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
