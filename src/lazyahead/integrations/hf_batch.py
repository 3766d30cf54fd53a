"""Rows of one batch: which processors may see them one by one, and what becomes of the others."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput

from lazyahead.config import LazyPrefill
from lazyahead.engine.request import Request
from lazyahead.errors import RequestError
from lazyahead.results import Stats

_BY_ROW = (MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria, EosTokenCriteria)
"""Criteria that judge each row by itself."""
_PER_ROW = {"prompt_ignore_length", "encoder_input_ids", "generated_ngrams"}
"""What transformers' own processors hold one of per row."""


def across_rows(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> list[str]:
    """Names of those that may look at a batch as a whole: all but transformers' own, which treat
    each row by itself."""
    foreign = [p for p in processors if type(p).__module__ != LogitsProcessorList.__module__]
    return [type(part).__name__ for part in foreign] + [
        type(part).__name__ for part in criteria if type(part) not in _BY_ROW
    ]


def check_reads_whole(
    names: Sequence[str], prefill: LazyPrefill | None, lengths: Sequence[int]
) -> None:
    """Raises RequestError when prompts of these lengths are not read whole, since processors called
    `names` need all rows at each step."""
    if prefill is None or all(ratio == 1 for _, ratio in prefill.schedule):
        return
    if max(lengths) >= prefill.min_tokens:
        raise RequestError(
            f"{', '.join(names)} may look at the whole batch of {len(lengths)}, whose rows a lazy "
            "prefill reads apart; give one prompt per call, or prefill=None"
        )


def sample_together(
    model: PreTrainedModel,
    input_ids: Tensor,
    starts: Sequence[int],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[Any, list[Stats]]:
    """What transformers' own loop gives: all rows a token per step, processors and criteria called
    once per step with the whole batch."""
    timed = _Timed(criteria)
    output = model._sample(input_ids, processors, timed, config, **model_kwargs)
    return output, timed.stats([input_ids.shape[1] - start for start in starts])


class _Timed(StoppingCriteriaList):  # type: ignore[misc]  # transformers has no types
    """The same criteria, and when each step was over for which rows."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self._begin = time.perf_counter()
        self._ends: list[tuple[float, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        before = self._ends[-1][1] if self._ends else torch.zeros_like(done)
        self._ends.append((time.perf_counter(), before | done))
        return done

    def stats(self, prompt_lens: Sequence[int]) -> list[Stats]:
        """Measurements of each row."""
        first = self._ends[0][0]
        found = []
        for row, prompt_len in enumerate(prompt_lens):
            num = 1 + sum(not bool(done[row]) for _, done in self._ends[:-1])
            found.append(
                Stats(
                    prompt_tokens=prompt_len,
                    reused_tokens=0,
                    answer_tokens=num,
                    ttft_s=first - self._begin,
                    decode_s=self._ends[num - 1][0] - first,
                    prompt_tokens_computed=1.0,
                    num_steps=num - 1,
                    revived=0,
                )
            )
        return found


def of_row(processors: LogitsProcessorList, row: int, num_rows: int) -> LogitsProcessorList:
    """transformers' processors for one row of the batch, which they see as a batch of one: what
    they hold per row is cut out."""
    if num_rows == 1:
        return processors
    mine = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            mine.append(
                PrefixConstrainedLogitsProcessor(
                    lambda _, ids, allowed=allowed: allowed(row, ids), 1
                )
            )
            continue
        own = copy.deepcopy(processor)
        for name in _PER_ROW & vars(own).keys():
            held = getattr(own, name)
            if isinstance(held, Tensor | list) and len(held) == num_rows:
                setattr(own, name, held[row : row + 1])
        if hasattr(own, "batch_size"):
            own.batch_size = 1
        mine.append(own)
    return mine


def padded(input_ids: Tensor, rows: Sequence[Request], config: GenerationConfig) -> Any:
    """Rows padded to one length, as `generate` returns them."""
    longest = max(len(request.answer) for request in rows)
    pad = config._pad_token_tensor
    pad_id = int(pad) if pad is not None else 0
    answers = [request.answer + [pad_id] * (longest - len(request.answer)) for request in rows]
    sequences = torch.cat([input_ids, torch.tensor(answers, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_stacked([request.scores for request in rows], longest),
        logits=_stacked([request.logits for request in rows], longest),
    )


def _stacked(rows: Sequence[list[Tensor] | None], longest: int) -> tuple[Tensor, ...] | None:
    """Per step (B, V); a row that has ended repeats its last."""
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    return tuple(
        torch.stack([row[min(step, len(row) - 1)] for row in known]) for step in range(longest)
    )
