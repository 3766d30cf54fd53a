"""The row everything is compared with: transformers' own `generate`, nothing attached, its own
cache, timed inside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lazyahead.sampling import Sampling


class BaselineRun(NamedTuple):
    """One answer of plain transformers."""

    token_ids: tuple[int, ...]
    ttft_s: float
    """From the call of `generate` to the first token."""
    decode_s: float
    """From the end of the first pass to the end of the last."""
    num_timed: int = 0
    """Tokens of `decode_s`: all but those of the first pass."""
    num_steps: int = 0
    """Passes in `decode_s`."""


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when tokens come, and how many: prompt lookup brings several at once. The first call
    passes the prompt."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        pass


def run_baseline(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    sampling: Sampling,
    tokenizer: Any = None,
    **options: Any,
) -> BaselineRun:
    """Answers one prompt with `model.generate`. `options` go to it as they are."""
    clock = _Clock()
    input_ids = torch.tensor([list(token_ids)], device=model.device)
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed or 0)
    started = time.perf_counter()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        streamer=clock,
        **_options(model, sampling, tokenizer),
        **options,
    )
    _, (first, _), *later = clock.seen
    return BaselineRun(
        token_ids=tuple(output[0, len(token_ids) :].tolist()),
        ttft_s=first - started,
        decode_s=later[-1][0] - first if later else 0.0,
        num_timed=sum(num for _, num in later),
        num_steps=len(later),
    )


def _options(model: PreTrainedModel, sampling: Sampling, tokenizer: Any) -> dict[str, Any]:
    """Our settings under transformers' names. As for an LLM, what the model's own generation config
    says of tokens holds where a setting has its default."""
    own = model.generation_config
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": sampling.temperature > 0,
        "pad_token_id": _first(own.pad_token_id, own.eos_token_id, 0),
    }
    least = sampling.max_new_tokens if sampling.ignore_eos else sampling.min_new_tokens
    options |= {"min_new_tokens": least} if least else {}
    if sampling.repetition_penalty != 1.0:
        options["repetition_penalty"] = sampling.repetition_penalty
    if sampling.no_repeat_ngram_size:
        options["no_repeat_ngram_size"] = sampling.no_repeat_ngram_size
    if sampling.temperature > 0:
        options |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
        options |= {"min_p": sampling.min_p} if sampling.min_p else {}
    if own.stop_strings or sampling.stop:
        known = own.stop_strings or []
        known = [known] if isinstance(known, str) else known
        options |= {"stop_strings": [*sampling.stop, *known], "tokenizer": tokenizer}
    return options


def _first(*token_ids: int | list[int] | None) -> int:
    """The first token id that is not None."""
    for token_id in token_ids:
        if isinstance(token_id, int):
            return token_id
        if token_id:
            return token_id[0]
    return 0
