"""What reading lazily does to answers over real text, and how much sooner they begin.

Every sample is answered by all ways, in an order that rotates, so that a machine that slows down
slows all of them; some are read by transformers' own `generate` in the same round. Beside the
benchmark's score stand `kept` (see `kept.py`), which is far more sensitive, and agreement with the
full reading's own greedy answer: how much of it comes before the first token that differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import fmean, median

from lazyahead.bench.baseline import run_baseline
from lazyahead.bench.bootstrap import mean_interval
from lazyahead.bench.data.encode import encode_sample
from lazyahead.bench.data.longbench import CATEGORIES
from lazyahead.bench.data.metrics import score
from lazyahead.bench.data.sample import Sample
from lazyahead.bench.kept import Likelihood, kept_interval, measure_likelihood
from lazyahead.bench.methods import FULL, Cost, Method
from lazyahead.errors import RequestError
from lazyahead.llm import LLM
from lazyahead.report import Report, silent
from lazyahead.results import Completion
from lazyahead.sampling import Sampling
from lazyahead.text import Prompt

ALL = "all"
TEMPLATE_TOKENS = 64
"""Room for a chat template around a prompt."""


@dataclass(frozen=True)
class RealTextRow:
    """One category, read one way. Bounds hold the value with 95 % (bootstrap over samples)."""

    category: str
    method: str
    prefill: str
    """The preset or profile."""
    num: int
    """Samples."""
    score: float
    """Mean of the benchmark's own metric, 0 to 1."""
    score_low: float
    score_high: float
    relative: float | None
    """Score over that of the full reading; None where that is 0."""
    kept: float | None
    """Share of the context's gain in likelihood that survives; None where `num_kept` is 0."""
    kept_low: float | None
    kept_high: float | None
    num_kept: int
    """Samples whose context adds at least 0.3 nats a token of the right answer."""
    num_kept_tokens: int
    """Tokens of their right answers."""
    agreement: float
    """With the full reading's greedy answer: tokens before the first that differs, over those of
    the longer answer, mean."""
    ttft_s: float
    """Time to the first token, median in seconds."""
    ttft_speedup: float | None
    """transformers' time to the first token over ours, median of the samples that both read in the
    same round."""
    num_timed: int
    """Those samples."""
    ideal_speedup: float
    """FLOPs of the full prefill over this one's, median."""
    prompt_tokens_computed: float
    """Mean over layers and samples, fraction, revived tokens included."""
    prompt_tokens: float
    answer_tokens: float


@dataclass(frozen=True)
class _Reading:
    """One sample, read all ways; the first is the full reading."""

    sample: Sample
    answers: tuple[Completion, ...]
    scores: tuple[float, ...]
    likelihood: Likelihood
    transformers_ttft_s: float | None


def fitting_length(llm: LLM, length: int, max_new_tokens: int) -> int:
    """`length`, or what the model's context leaves beside template and answer.

    Raises RequestError where that is nothing.
    """
    room = llm.max_context - max_new_tokens - TEMPLATE_TOKENS
    if room < 1:
        raise RequestError(
            f"answers of {max_new_tokens} tokens leave no room in {llm.name}'s context of "
            f"{llm.max_context}; give a smaller --max-new-tokens"
        )
    return min(length, room)


def measure_real_text(
    llm: LLM,
    methods: Sequence[Method],
    work: Mapping[str, Sequence[Sample]],
    *,
    length: int,
    max_new_tokens: int,
    num_timed: int,
    seed: int = 0,
    progress: Report = silent,
) -> list[RealTextRow]:
    """One row for each category and way, and each way's over `all`; the full reading comes first.

    `llm` reads everything and drafts nothing. Prompts lose their middle beyond `length` tokens,
    answers end at the task's length or at `max_new_tokens`; transformers reads `num_timed` samples
    of each category too. Raises RequestError for samples without answers.
    """
    methods = [FULL, *methods]
    engines = [method.on(llm) for method in methods]
    total, done = sum(map(len, work.values())), 0
    readings: dict[str, list[_Reading]] = {name: [] for name in work}
    for name, samples in work.items():
        timed = _spread(len(samples), num_timed)
        for number, sample in enumerate(samples):
            progress(f"{name} {number + 1}/{len(samples)}", done / total)
            prompt = encode_sample(llm.tokenizer, sample, length)
            if not done:
                _warm_up(engines, prompt)
            sampling = Sampling(max_new_tokens=min(sample.max_new_tokens, max_new_tokens))
            reading = _read(engines, sample, prompt, sampling, number, number in timed)
            readings[name].append(reading)
            done += 1
    everything = [reading for category in readings.values() for reading in category]
    groups = {**readings, ALL: everything}
    cost = Cost.of(llm, length)
    return [
        _row(name, method, index, group, cost, seed)
        for name, group in groups.items()
        for index, method in enumerate(methods)
    ]


def by_category(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples that have answers, by category, LongBench's first and in its order.

    Raises RequestError where none has.
    """
    work: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.answers:
            work.setdefault(sample.category, []).append(sample)
    if not work:
        raise RequestError(
            "no sample has answers to compare with; use `bench decode --data` for prompts alone"
        )
    names = [*(name for name in CATEGORIES if name in work), *work]
    return {name: work[name] for name in names}


def agreement(full: Sequence[int], own: Sequence[int]) -> float:
    """Tokens before the first that differs, over those of the longer answer; 1 for equal ones."""
    pairs = zip(full, own, strict=False)
    num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return num_same / max(len(full), len(own)) if full or own else 1.0


def _spread(num_samples: int, wanted: int) -> set[int]:
    """Indices of `wanted` samples, evenly spread."""
    wanted = min(wanted, num_samples)
    return {index * num_samples // wanted for index in range(wanted)}


def _warm_up(engines: Sequence[LLM], prompt: Prompt) -> None:
    """A prompt for each and for transformers, not counted."""
    for engine in engines:
        list(engine.stream(prompt, sampling=Sampling(max_new_tokens=2)))
    run_baseline(engines[0].model, prompt.token_ids, Sampling(max_new_tokens=1))


def _read(
    engines: Sequence[LLM],
    sample: Sample,
    prompt: Prompt,
    sampling: Sampling,
    turn: int,
    is_timed: bool,
) -> _Reading:
    """All ways, beginning with another one each time; transformers is one more of them."""
    answers, plain_s = dict[int, Completion](), None
    for step in range(len(engines) + 1):
        index = (turn + step) % (len(engines) + 1)
        if index < len(engines):
            pieces = list(engines[index].stream(prompt, sampling=sampling))
            answers[index] = Completion.fold(pieces)
        elif is_timed:
            once = Sampling(max_new_tokens=1)
            plain_s = run_baseline(engines[0].model, prompt.token_ids, once).ttft_s
    ordered = tuple(answers[index] for index in range(len(engines)))
    scores = tuple(score(sample, answer.text) for answer in ordered)
    likelihood = measure_likelihood(engines, sample, prompt)
    return _Reading(sample, ordered, scores, likelihood, plain_s)


def _row(
    category: str,
    method: Method,
    index: int,
    readings: Sequence[_Reading],
    cost: Cost,
    seed: int,
) -> RealTextRow:
    found = mean_interval([one.scores[index] for one in readings], seed)
    full_score = fmean(one.scores[0] for one in readings)
    kept = kept_interval([one.likelihood for one in readings], index, seed)
    counted = [one.likelihood for one in readings if one.likelihood.counts]
    stats = [one.answers[index].stats for one in readings]
    timed = [
        one.transformers_ttft_s / one.answers[index].stats.ttft_s
        for one in readings
        if one.transformers_ttft_s is not None
    ]
    pairs = [(one.answers[0].token_ids, one.answers[index].token_ids) for one in readings]
    return RealTextRow(
        category=category,
        method=method.name,
        prefill=method.prefill,
        num=len(readings),
        score=found.value,
        score_low=found.low,
        score_high=found.high,
        relative=found.value / full_score if full_score else None,
        kept=kept.value if kept else None,
        kept_low=kept.low if kept else None,
        kept_high=kept.high if kept else None,
        num_kept=len(counted),
        num_kept_tokens=sum(one.num_tokens for one in counted),
        agreement=fmean(agreement(full, own) for full, own in pairs),
        ttft_s=median(one.ttft_s for one in stats),
        ttft_speedup=median(timed) if timed else None,
        num_timed=len(timed),
        ideal_speedup=median(
            replace(cost, num_tokens=one.prompt_tokens).ideal_speedup(method.rule) for one in stats
        ),
        prompt_tokens_computed=fmean(one.prompt_tokens_computed for one in stats),
        prompt_tokens=fmean(one.prompt_tokens for one in stats),
        answer_tokens=fmean(one.answer_tokens for one in stats),
    )
