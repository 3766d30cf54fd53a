"""`kept`: how much of what the context adds to the likelihood of the right answer survives.

kept = (way - none) / (full - none), log-likelihoods of the dictated answer, pooled over samples;
`none` is the model that reads the last tokens of the prompt only. 1: nothing is lost; 0: no better
than not reading; below 0: worse than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lazyahead.bench.bootstrap import Interval, ratio_interval
from lazyahead.bench.data.encode import encode_answer, without_context
from lazyahead.bench.data.sample import Sample
from lazyahead.integrations.likelihood import dictate
from lazyahead.llm import LLM
from lazyahead.text import Prompt

LEAST_GAIN = 0.3
"""Nats a token that the context must add for a sample to count."""
LONGEST_ANSWER = 128
"""Tokens of the right answer that are dictated."""


class Likelihood(NamedTuple):
    """Log-likelihoods of one right answer, sums over its tokens, in nats."""

    num_tokens: int
    none: float
    full: float
    ways: tuple[float, ...]
    """Of the ways compared; empty where the sample does not count."""

    @property
    def counts(self) -> bool:
        """Whether the context adds enough."""
        return self.full - self.none >= LEAST_GAIN * self.num_tokens


def measure_likelihood(ways: Sequence[LLM], sample: Sample, prompt: Prompt) -> Likelihood:
    """Dictates the sample's first right answer to the plain model, with context and without, and,
    where the context adds enough, to each of `ways`, which share that model."""
    llm = ways[0]
    answer = encode_answer(llm.tokenizer, sample, LONGEST_ANSWER)
    if not answer:
        return Likelihood(1, 0.0, 0.0, ())
    floor = without_context(llm.tokenizer, prompt.token_ids)
    none, full = (_log_likelihood(llm, context, answer) for context in (floor, prompt.token_ids))
    found = Likelihood(len(answer), none, full, ())
    if not found.counts:
        return found
    pairs, questions = [(prompt.token_ids, answer)], [prompt.question]
    return found._replace(ways=tuple(dictate(way, pairs, questions)[0][0] for way in ways))


def kept_interval(likelihoods: Sequence[Likelihood], way: int, seed: int = 0) -> Interval | None:
    """`kept` of one of `Likelihood.ways` over the samples that count; None where none does."""
    counted = [one for one in likelihoods if one.counts]
    if not counted:
        return None
    return ratio_interval(
        [one.ways[way] - one.none for one in counted],
        [one.full - one.none for one in counted],
        seed,
    )


@torch.no_grad()
def _log_likelihood(llm: LLM, context: Sequence[int], answer: Sequence[int]) -> float:
    """Sum over the answer's tokens, in one pass of the plain model."""
    token_ids = torch.tensor([[*context, *answer][:-1]], device=llm.model.device)
    logits = llm.model(token_ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
    wanted = torch.tensor(answer, device=logits.device)
    return float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum())
