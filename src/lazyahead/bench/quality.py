"""How prefill strategies change answers, and how much sooner they come (the paper's tables 1, 2).

Every sample is answered by all methods, one after the other, in an order that rotates, so that a
machine that slows down slows all of them. Speed-ups are medians over the samples: the time of the
full prefill of the same sample, in the same round, over the method's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

from lazyahead.bench.baseline import run_baseline
from lazyahead.bench.methods import FULL, Method
from lazyahead.errors import ConfigError
from lazyahead.llm import LLM
from lazyahead.reader import CATEGORIES, Sample, samples, score
from lazyahead.report import Report, silent
from lazyahead.results import Completion
from lazyahead.sampling import Sampling

SPARE_TOKENS = 16
"""Tokens that an answer may have beyond those of the right one."""
AVERAGE = "average"
Work = Mapping[str, Sequence[Sample]]
"""Samples by category."""
Round = TypeVar("Round")


@dataclass(frozen=True)
class QualityRow:
    """One category under one method. Times are medians in seconds; speed-ups are over the full
    prefill of our engine."""

    category: str
    method: str
    prefill: str
    """The preset or profile; for a baseline the one whose cost it shares."""
    num_samples: int
    score: float
    """Mean, 0 to 1, in the category's measure."""
    relative: float | None
    """Score over that of the full prefill on the same samples; None where that is 0."""
    agree: float
    """Fraction of answers that equal those of the full prefill, character by character."""
    ttft_s: float
    ttft_speedup: float
    generation_speedup: float
    """Of the whole answer; answers may differ in length."""
    prompt_tokens_computed: float
    """Mean over layers of the fraction of prompt tokens, revived ones included."""
    revived: float
    """Revived tokens, mean of the samples."""
    prompt_tokens: float
    answer_tokens: float
    transformers_ttft_s: float | None
    """transformers `generate` on the first samples of the category, in the same rounds."""
    transformers_ttft_speedup: float | None
    """That over `ttft_s`, paired."""


@dataclass(frozen=True)
class _QualityRound:
    """One sample under all methods; the first is the full prefill."""

    sample: Sample
    answers: list[Completion]
    transformers_ttft_s: float | None


def draw(
    llm: LLM,
    categories: Sequence[str],
    length: int,
    num_samples: int,
    seed: int = 0,
    *,
    heldout: bool = False,
) -> Work:
    """The samples. Raises ConfigError for an unknown category or length, and where the package of a
    measure is missing."""
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown or not categories:
        raise ConfigError(
            f"no category is called {(unknown or [''])[0]!r}; there are {', '.join(CATEGORIES)}"
        )
    if llm.tokenizer is None:
        raise ConfigError("this model has no tokenizer; the samples are text")
    try:
        work = {
            name: samples(name, length, seed, num_samples, heldout)
            for name in dict.fromkeys(categories)
        }
        for first, *_ in work.values():
            score(first, first.answer)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    return work


def measure_quality(
    llm: LLM,
    methods: Sequence[Method],
    work: Work,
    runs: int = 3,
    *,
    progress: Report = silent,
) -> tuple[list[QualityRow], list[QualityRow]]:
    """Rows by category, the full prefill first in each, and one row of each method over all
    samples.

    The methods run on the weights of `llm`; plain transformers answers the first `runs` samples of
    each category too.
    """
    methods = with_full(methods)
    engines = [method.on(llm) for method in methods]
    progress("warm-up")
    _warm_up(engines, next(iter(work.values()))[0], with_transformers=runs > 0)

    def measure(sample: Sample, number: int) -> _QualityRound:
        return _measure_round(engines, sample, number, with_transformers=number < runs)

    rounds = measure_rounds(work, measure, progress)
    rows = [row for name, category in rounds.items() for row in _rows(name, methods, category)]
    return rows, _rows(AVERAGE, methods, [one for category in rounds.values() for one in category])


def with_full(methods: Sequence[Method]) -> list[Method]:
    """The methods with the full prefill first."""
    return [FULL, *(method for method in methods if method.name != FULL.name)]


def measure_rounds(
    work: Work, measure: Callable[[Sample, int], Round], progress: Report
) -> dict[str, list[Round]]:
    """What `measure` gives for each sample and its number in its category, by category."""
    total = sum(map(len, work.values()))
    rounds: dict[str, list[Round]] = {category: [] for category in work}
    num_done = 0
    for category, drawn in work.items():
        for number, sample in enumerate(drawn):
            progress(f"{category} {number + 1}/{len(drawn)}", num_done / total)
            rounds[category].append(measure(sample, number))
            num_done += 1
    return rounds


def rotated(count: int, first: int) -> Iterator[int]:
    """0 to `count` - 1, beginning with `first`."""
    return ((first + step) % count for step in range(count))


def greedy(llm: LLM, answer: str) -> Sampling:
    """Greedy, with room for the right answer and `SPARE_TOKENS` more."""
    return Sampling(max_new_tokens=len(llm.tokenizer(answer)["input_ids"]) + SPARE_TOKENS)


def _warm_up(engines: Sequence[LLM], sample: Sample, *, with_transformers: bool) -> None:
    """One answer by each, not counted; long enough for drafting to measure its row costs."""
    for engine in engines:
        engine.generate(sample.document, sample.question, sampling=Sampling(max_new_tokens=4))
    if with_transformers:
        _transformers_ttft_s(engines[0], sample)


def _transformers_ttft_s(llm: LLM, sample: Sample) -> float:
    token_ids = llm.encode(sample.document, sample.question).token_ids
    return run_baseline(llm.model, token_ids, Sampling(max_new_tokens=1)).ttft_s


def _measure_round(
    engines: Sequence[LLM], sample: Sample, number: int, *, with_transformers: bool
) -> _QualityRound:
    """One answer by each engine, in an order that depends on the sample's number."""
    sampling = greedy(engines[0], sample.answer)
    answers: dict[int, Completion] = {}
    for index in rotated(len(engines), number):
        engine = engines[index]
        answers[index] = engine.generate(sample.document, sample.question, sampling=sampling)
    plain_s = _transformers_ttft_s(engines[0], sample) if with_transformers else None
    return _QualityRound(sample, [answers[index] for index in range(len(engines))], plain_s)


def _rows(
    category: str, methods: Sequence[Method], rounds: Sequence[_QualityRound]
) -> list[QualityRow]:
    return [_row(category, method, index, rounds) for index, method in enumerate(methods)]


def _row(category: str, method: Method, index: int, rounds: Sequence[_QualityRound]) -> QualityRow:
    pairs = [(one.answers[0], one.answers[index]) for one in rounds]
    stats = [ours.stats for _, ours in pairs]
    full_score, own_score = (
        fmean(score(one.sample, one.answers[i].text) for one in rounds) for i in (0, index)
    )
    plain = [
        (one.transformers_ttft_s, one.answers[index].stats.ttft_s)
        for one in rounds
        if one.transformers_ttft_s
    ]
    return QualityRow(
        category=category,
        method=method.name,
        prefill=method.prefill,
        num_samples=len(rounds),
        score=own_score,
        relative=own_score / full_score if full_score else None,
        agree=fmean(ours.text == full.text for full, ours in pairs),
        ttft_s=median(one.ttft_s for one in stats),
        ttft_speedup=median(full.stats.ttft_s / ours.stats.ttft_s for full, ours in pairs),
        generation_speedup=median(_total_s(full) / _total_s(ours) for full, ours in pairs),
        prompt_tokens_computed=fmean(one.prompt_tokens_computed for one in stats),
        revived=fmean(one.revived for one in stats),
        prompt_tokens=fmean(one.prompt_tokens for one in stats),
        answer_tokens=fmean(one.answer_tokens for one in stats),
        transformers_ttft_s=median(theirs for theirs, _ in plain) if plain else None,
        transformers_ttft_speedup=median(theirs / ours for theirs, ours in plain)
        if plain
        else None,
    )


def _total_s(answer: Completion) -> float:
    return answer.stats.ttft_s + answer.stats.decode_s
