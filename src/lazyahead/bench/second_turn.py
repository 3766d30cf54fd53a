"""Questions of the second turn: what pruning costs when the first turn did not say what matters.

The first turn brings a document and asks for nothing in it, or for another fact. The question
comes in the second turn, on the same session. A method that drops tokens for good has then dropped
them without knowing the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from lazyahead.bench.methods import Method
from lazyahead.bench.quality import AVERAGE, Work, greedy, measure_rounds, rotated, with_full
from lazyahead.cache.session import Session
from lazyahead.errors import ConfigError
from lazyahead.llm import LLM
from lazyahead.reader import Sample, score
from lazyahead.reader.prompt import READ_FIRST
from lazyahead.report import Report, silent
from lazyahead.results import Completion
from lazyahead.sampling import Sampling
from lazyahead.text import Message, encode_turn

CATEGORIES = ("single_doc_qa", "multi_doc_qa", "synthetic")
"""Measured unless others are named: those whose answers stand in one place of the document."""
FIRST_TURNS = ("neutral", "question")
"""What the first turn asks: to read the document, or for another fact of it."""


@dataclass(frozen=True)
class SecondTurnRow:
    """One category under one method. Times are medians in seconds; ratios are of the same sample in
    the same round."""

    category: str
    method: str
    prefill: str
    num_samples: int
    score: float
    """Of the second turn's answer."""
    relative: float | None
    """Score over that of the full prefill on the same samples; None where that is 0."""
    agree: float
    """Fraction of answers that equal those of the full prefill, character by character."""
    revived: float
    """Tokens revived in the second turn, counted once per boundary; mean of the samples."""
    first_ttft_speedup: float
    """First turn: time of the full prefill over this one's."""
    ttft_s: float
    """Second turn: time to its first token."""
    reread_ttft_s: float
    """The same prompt, computed from its start with nothing pruned."""
    ttft_ratio: float
    """`ttft_s` over `reread_ttft_s`, paired."""
    prompt_tokens_computed: float
    """After the second turn: mean over layers, fraction."""
    prompt_tokens: float
    answer_tokens: float


class Turns(NamedTuple):
    """A conversation of two turns."""

    first: Completion
    second: Completion


@dataclass(frozen=True)
class _TurnsRound:
    """One sample under all methods; the first is the full prefill."""

    sample: Sample
    turns: list[Turns]
    reread_ttft_s: float


def measure_second_turn(
    llm: LLM,
    methods: Sequence[Method],
    work: Work,
    first: str = "neutral",
    *,
    progress: Report = silent,
) -> tuple[list[SecondTurnRow], list[SecondTurnRow]]:
    """Rows by category, the full prefill first in each, and one row of each method over all
    samples.

    `first` is one of `FIRST_TURNS`. Raises ConfigError where a category has no other question.
    """
    for drawn in work.values():
        opening(drawn[0], first)  # refused before any work
    methods = with_full(methods)
    engines = [method.on(llm) for method in methods]
    progress("warm-up")
    _measure_round(engines, next(iter(work.values()))[0], first, 0)

    def measure(sample: Sample, number: int) -> _TurnsRound:
        return _measure_round(engines, sample, first, number)

    rounds = measure_rounds(work, measure, progress)
    rows = [row for name, category in rounds.items() for row in _rows(name, methods, category)]
    return rows, _rows(AVERAGE, methods, [one for category in rounds.values() for one in category])


def opening(sample: Sample, first: str) -> tuple[str, str]:
    """The first turn's question and the answer that is expected. Raises ConfigError where there is
    none."""
    if first not in FIRST_TURNS:
        raise ConfigError(f"--first is one of {', '.join(FIRST_TURNS)}, got {first!r}")
    if first == "neutral":
        return READ_FIRST
    if not sample.others:
        raise ConfigError(
            f"{sample.category} documents have one question only; leave it out, or use "
            "--first neutral"
        )
    return sample.others[0]


def converse(llm: LLM, sample: Sample, first: str = "neutral") -> tuple[Turns, list[int]]:
    """Both turns on one session, and the second one's prompt as token ids."""
    session = llm.session()
    request, expected = opening(sample, first)
    messages: list[Message] = [{"role": "user", "content": f"{sample.document}\n\n{request}"}]
    begun = _chat(llm, messages, greedy(llm, expected), session)
    messages += [
        {"role": "assistant", "content": begun.text.strip()},
        {"role": "user", "content": sample.question},
    ]
    prompt = encode_turn(llm.tokenizer, messages, session.history).token_ids
    return Turns(begun, _chat(llm, messages, greedy(llm, sample.answer), session)), prompt


def _chat(llm: LLM, messages: list[Message], sampling: Sampling, session: Session) -> Completion:
    return Completion.fold(list(llm.chat(messages, sampling=sampling, session=session)))


def _measure_round(engines: Sequence[LLM], sample: Sample, first: str, number: int) -> _TurnsRound:
    """Both turns on each engine, in an order that depends on the sample's number; then the full
    prefill of the second turn's prompt from its start."""
    turns: dict[int, Turns] = {}
    prompts: dict[int, list[int]] = {}
    for index in rotated(len(engines), number):
        turns[index], prompts[index] = converse(engines[index], sample, first)
    *_, last = engines[0].stream(prompts[0], sampling=Sampling(max_new_tokens=1))
    return _TurnsRound(sample, [turns[index] for index in range(len(engines))], last.stats.ttft_s)


def _rows(
    category: str, methods: Sequence[Method], rounds: Sequence[_TurnsRound]
) -> list[SecondTurnRow]:
    return [_row(category, method, index, rounds) for index, method in enumerate(methods)]


def _row(category: str, method: Method, index: int, rounds: Sequence[_TurnsRound]) -> SecondTurnRow:
    turns = [one.turns[index] for one in rounds]
    stats = [pair.second.stats for pair in turns]
    full_score, own_score = (
        fmean(score(one.sample, one.turns[i].second.text) for one in rounds) for i in (0, index)
    )
    return SecondTurnRow(
        category=category,
        method=method.name,
        prefill=method.prefill,
        num_samples=len(rounds),
        score=own_score,
        relative=own_score / full_score if full_score else None,
        agree=fmean(one.turns[0].second.text == one.turns[index].second.text for one in rounds),
        revived=fmean(one.revived for one in stats),
        first_ttft_speedup=median(
            one.turns[0].first.stats.ttft_s / one.turns[index].first.stats.ttft_s for one in rounds
        ),
        ttft_s=median(one.ttft_s for one in stats),
        reread_ttft_s=median(one.reread_ttft_s for one in rounds),
        ttft_ratio=median(
            one.turns[index].second.stats.ttft_s / one.reread_ttft_s for one in rounds
        ),
        prompt_tokens_computed=fmean(one.prompt_tokens_computed for one in stats),
        prompt_tokens=fmean(one.prompt_tokens for one in stats),
        answer_tokens=fmean(one.answer_tokens for one in stats),
    )
