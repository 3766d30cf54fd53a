"""Sampling settings as transformers' own logits processors, in the order that `generate` applies
them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lazyahead.sampling import Picker, Sampling


class CountPenalty:
    """OpenAI's presence and frequency penalties: on tokens of the answer, once, and once per
    occurrence."""

    def __init__(self, presence: float, frequency: float, prompt_len: int) -> None:
        self.presence, self.frequency, self.prompt_len = presence, frequency, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Token ids (1, N) and logits (1, V) to logits (1, V)."""
        answer = input_ids[0, self.prompt_len :].to(scores.device)
        counts = torch.zeros_like(scores[0]).index_add_(
            0, answer, torch.ones_like(answer, dtype=scores.dtype)
        )
        return scores - self.frequency * counts - self.presence * (counts > 0)


def picker_for(sampling: Sampling, prompt_len: int, eos_ids: tuple[int, ...]) -> Picker:
    """What chooses the tokens of one answer to a prompt of `prompt_len` tokens."""
    found = LogitsProcessorList()
    if sampling.logit_bias:
        found.append(
            SequenceBiasLogitsProcessor(
                {(token,): bias for token, bias in sampling.logit_bias.items()}
            )
        )
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(
            CountPenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_len)
        )
    if sampling.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.bad_words:
        found.append(NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.min_new_tokens and eos_ids:
        found.append(
            MinNewTokensLengthLogitsProcessor(prompt_len, sampling.min_new_tokens, list(eos_ids))
        )
    if sampling.ignore_eos and eos_ids:
        found.append(SequenceBiasLogitsProcessor({(token,): float("-inf") for token in eos_ids}))
    do_sample = sampling.temperature > 0
    if do_sample:
        if sampling.temperature != 1.0:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            found.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0.0:
            found.append(MinPLogitsWarper(sampling.min_p))
    return Picker(found if len(found) else None, do_sample, sampling.seed)
