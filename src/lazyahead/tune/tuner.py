"""The strongest pruning whose greedy answers are those of the full prefill, on given prompts.

No right answers are needed: those of the full prefill are the ones to keep. Half of the prompts
guide the search, the other half checks what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from lazyahead.config import LazyPrefill
from lazyahead.errors import ConfigError, RequestError, UnsupportedModelError
from lazyahead.hf.probe import examine
from lazyahead.inputs import naming
from lazyahead.llm import LLM
from lazyahead.prefill.cost import ModelCost
from lazyahead.prefill.schedule import Schedule
from lazyahead.prefill.score import SCORERS, LastToken, Scorer
from lazyahead.report import Report, silent
from lazyahead.sampling import Sampling
from lazyahead.tune.answers import AgreementCount, Answers, Task, under
from lazyahead.tune.search import Candidate, Search, candidates, strongest

ENOUGH_TO_HOLD_OUT = 8
"""Prompts from which on half of them are held out."""
MOST_TIMED = 8
"""Prompts that are timed."""


class Clock(NamedTuple):
    """Seconds to the first token, medians; `speedup` is the median of the paired ratios."""

    full_ttft_s: float
    ttft_s: float
    speedup: float


@dataclass(frozen=True)
class Found:
    """The strongest strategy that keeps the answers. Speed-ups are over our own full prefill."""

    prefill: LazyPrefill
    search: AgreementCount
    """Of the prompts that guided the search."""
    held_out: AgreementCount | None
    """Of those that did not; None where there are too few to hold any out."""
    ideal_speedup: float
    """By FLOPs, at the median length."""
    clock: Clock


@dataclass(frozen=True)
class Tuned:
    """The result of a search."""

    found: Found | None
    """None: nothing is safe."""
    num_tried: int
    """Strategies."""
    num_answered: int
    """Answers that were compared."""
    num_rejected: int
    """Strategies that passed the search and failed on the prompts held out."""
    num_prompts: int
    """Prompts long enough to be pruned."""
    prompt_tokens: int
    """Their median length."""
    hardest: tuple[str, ...]
    """Prompts whose answers changed, most often changed first, with how often of how many tries."""
    skipped: tuple[str, ...]
    """Prompts too short to be pruned at all."""


def tune(
    llm: LLM,
    tasks: Sequence[Task],
    *,
    base: LazyPrefill = LazyPrefill(),  # noqa: B008 (frozen)
    max_new_tokens: int = 64,
    agree: float = 1.0,
    runs: int = 3,
    progress: Report = silent,
) -> Tuned:
    """Searches schedules for `base`, whose other settings stay, with its scorer and with others.

    At least the fraction `agree` of the answers must stay as they are, among the prompts that guide
    the search and among those held out. Raises ConfigError for an `agree` that is no fraction,
    RequestError where all prompts are shorter than `min_tokens`.
    """
    if not 0 < agree <= 1:
        raise ConfigError(
            f"agree is the least fraction of answers that must stay, above 0 and at most 1, "
            f"got {agree}"
        )
    lengths = [_length(llm, task) for task in tasks]
    fitting = [
        task for task, length in zip(tasks, lengths, strict=True) if length >= base.min_tokens
    ]
    if not fitting:
        raise RequestError(
            f"all {len(tasks)} prompts are shorter than min_tokens {base.min_tokens} and would not "
            f"be pruned (the longest has {max(lengths, default=0)}); give longer ones, or a lower "
            "min_tokens"
        )
    length = int(median(length for length in lengths if length >= base.min_tokens))
    answers = Answers(under(llm, None), fitting, max_new_tokens, progress)
    tuning = _Tuning(llm, answers, base, agree, length, progress)
    for scorer in scorers(base.scorer):
        tuning.improve(scorer)
    return Tuned(
        found=tuning.found(lambda rule: _time(llm, rule, fitting[:MOST_TIMED], runs, progress)),
        num_tried=answers.num_tried,
        num_answered=answers.num_answered,
        num_rejected=tuning.num_rejected,
        num_prompts=len(fitting),
        prompt_tokens=length,
        hardest=answers.hardest,
        skipped=tuple(
            f"{task.name} ({num} tokens)"
            for task, num in zip(tasks, lengths, strict=True)
            if num < base.min_tokens
        ),
    )


def scorers(first: Scorer) -> list[Scorer]:
    """`first`, the paper's, and the default of each other kind that reads attention."""
    kinds = [kind() for kind in SCORERS.values()]
    return list(
        dict.fromkeys(scorer for scorer in (first, LastToken(), *kinds) if scorer.window_size)
    )


def _length(llm: LLM, task: Task) -> int:
    """Tokens of its prompt. Raises ContextLengthError naming it."""
    with naming(task.name):
        return len(llm.encode(task.text, task.question).token_ids)


class _Tuning:
    """The best rule so far, and the search for better ones."""

    def __init__(
        self,
        llm: LLM,
        answers: Answers,
        base: LazyPrefill,
        agree: float,
        length: int,
        progress: Report,
    ) -> None:
        self._answers = answers
        self._base = base
        self._agree = agree
        self._progress = progress
        support, spec = examine(llm.model)
        if spec is None:
            raise UnsupportedModelError(f"{llm.name} can only decode: {support.reason}")
        self._model = ModelCost.of(spec)
        self._length = length
        every = range(answers.num_tasks)
        holds_out = len(every) >= ENOUGH_TO_HOLD_OUT
        self._guides: Sequence[int] = every[::2] if holds_out else every
        self._judges: Sequence[int] = every[1::2] if holds_out else ()
        self._best: tuple[LazyPrefill, float] | None = None
        """The strongest rule so far and its ideal speed-up."""
        self.num_rejected = 0

    def improve(self, scorer: Scorer) -> None:
        """Keeps this scorer's strongest schedule if it is stronger than those before it."""
        least = self._best[1] if self._best is not None else 1.0

        def rule(candidate: Candidate) -> LazyPrefill:
            return replace(self._base, schedule=candidate.schedule, scorer=scorer)

        def passes(candidate: Candidate) -> bool:
            kept = ", ".join(f"{depth:.2g}: {ratio:.0%}" for depth, ratio in candidate.schedule)
            best = least if search.best is None else search.found[search.best].speedup
            self._progress(f"{kept} ({type(scorer).__name__}), best {best:.2f}x", search.progress)
            return self._answers.agree(rule(candidate), self._guides, self._agree)

        def holds(candidate: Candidate) -> bool:
            if not passes(candidate):
                return False
            is_good = self._answers.agree(rule(candidate), self._judges, self._agree)
            self.num_rejected += not is_good
            return is_good

        base = replace(self._base, scorer=scorer)
        search = Search(candidates(base, self._model, self._length), least=least)
        best = strongest(search, passes, holds)
        if best is not None:
            self._best = rule(best), best.speedup

    def found(self, timed: Callable[[LazyPrefill], Clock]) -> Found | None:
        """The best rule and its measurements."""
        if self._best is None:
            return None
        rule, speedup = self._best
        return Found(rule, *self._agreement(rule), speedup, timed(rule))

    def _agreement(self, rule: LazyPrefill) -> tuple[AgreementCount, AgreementCount | None]:
        guides, judges = (
            self._answers.agreement(rule, which) for which in (self._guides, self._judges)
        )
        return guides, judges if judges.of else None


def words(schedule: Schedule) -> str:
    """A schedule in words."""
    return ", then ".join(
        f"{ratio:.0%} from {depth:.0%} of the layers on" for depth, ratio in schedule
    )


def _time(llm: LLM, rule: LazyPrefill, tasks: Sequence[Task], runs: int, progress: Report) -> Clock:
    """Both sides on each task, one after the other, the order alternating."""
    sampling = Sampling(max_new_tokens=1)
    sides = [under(llm, None), under(llm, rule)]
    shots: list[tuple[float, float]] = []
    for run in range(runs):
        for number, task in enumerate(tasks):
            progress("timing", (run * len(tasks) + number) / (runs * len(tasks)))
            took = [0.0, 0.0]
            for side in ((0, 1), (1, 0))[(run + number) % 2]:
                *_, last = sides[side].stream(task.text, task.question, sampling=sampling)
                took[side] = last.stats.ttft_s
            shots.append((took[0], took[1]))
    full, ours = (median(seconds) for seconds in zip(*shots, strict=True))
    return Clock(full, ours, median(a / b for a, b in shots))
