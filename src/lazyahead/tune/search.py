"""Which schedule to try next, and when to stop: arithmetic, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.cost import ModelCost, ideal_speedup, kept_counts
from lazyahead.prefill.schedule import Schedule

RATIOS = (0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
MOST_DEPTHS = 16
"""Depths that are tried; deeper models get evenly spaced ones."""
GAIN = 0.03
"""A schedule is worth trying if it promises at least this much more speed than the best one so far.
"""
RETREAT = 0.1
"""Speed that is given up each time when what the search has found does not hold."""


class Candidate(NamedTuple):
    """A schedule, the prompt tokens it computes at each layer, and its ideal speed-up."""

    schedule: Schedule
    kept: tuple[int, ...]
    speedup: float


def candidates(base: LazyPrefill, model: ModelCost, num_tokens: int) -> list[Candidate]:
    """Schedules for `base` of one boundary and of two, with `RATIOS`, that keep different counts of
    a prompt of `num_tokens` tokens.

    Boundaries lie where the layer below attends to every earlier token, if any layer does.
    """
    found: dict[tuple[int, ...], Candidate] = {}
    for schedule in _schedules(model.attends_fully):
        config = replace(base, schedule=schedule)
        kept = kept_counts(config, model, num_tokens)
        if kept not in found:
            found[kept] = Candidate(schedule, kept, ideal_speedup(config, model, num_tokens))
    return list(found.values())


def _schedules(attends_fully: Sequence[bool]) -> list[Schedule]:
    """All pairs of a depth and a ratio, and all two of them where ratios shrink with depth."""
    num_layers = len(attends_fully)
    layers = [
        layer
        for layer in range(1, num_layers)
        if attends_fully[layer - 1] or not any(attends_fully)
    ]
    num = min(MOST_DEPTHS, len(layers))
    depths = [round(layers[index * len(layers) // num] / num_layers, 4) for index in range(num)]
    once = [((depth, ratio),) for depth in depths for ratio in RATIOS]
    twice = [(a, b) for (a,), (b,) in combinations(once, 2) if b[0] > a[0] and b[1] < a[1]]
    return [*once, *twice]


class Search:
    """The strongest candidate that passes, in few trials.

    A candidate that keeps no more tokens at any layer than one that fails is taken to fail; one
    that keeps no fewer than one that passes is taken to pass. The next trial is the one whose less
    informative outcome settles most candidates.
    """

    def __init__(self, found: Sequence[Candidate], gain: float = GAIN, least: float = 1.0) -> None:
        """Searches for a speed-up above `least`, until no open candidate is better by `gain`."""
        self.found = found
        self.gain = gain
        self.least = least
        self.most = inf
        self._speedups = np.array([candidate.speedup for candidate in found])
        kept = np.array([candidate.kept for candidate in found])
        self._stronger = np.ones(
            (len(found), len(found)), dtype=bool
        )  # [a, b]: b keeps no more than a anywhere
        for counts in kept.T:
            self._stronger &= counts[None, :] <= counts[:, None]
        self._fails = np.zeros(len(found), dtype=bool)
        self._passes = np.zeros(len(found), dtype=bool)

    @property
    def open(self) -> NDArray[np.bool_]:
        """Candidates (C,) that may pass and would then be better than the best."""
        bar = self.least if self.best is None else self._speedups[self.best]
        return ~(self._fails | self._passes) & self._between(bar * (1 + self.gain))

    @property
    def best(self) -> int | None:
        """The fastest of those that pass, or are taken to."""
        passing = np.flatnonzero(self._passes & self._between(self.least))
        return int(passing[self._speedups[passing].argmax()]) if passing.size else None

    @property
    def progress(self) -> float:
        """Fraction of the candidates that are settled."""
        return 1 - float(self.open.mean())

    def next(self) -> int | None:
        """Which to try; None when all is settled."""
        left = np.flatnonzero(self.open)
        if not left.size:
            return None
        speedups = self._speedups[left]
        if_fails = self._stronger[np.ix_(left, left)].sum(1)
        if_passes = (speedups[None, :] <= speedups[:, None] * (1 + self.gain)).sum(1)
        return int(left[np.lexsort((speedups, np.minimum(if_fails, if_passes)))[-1]])

    def record(self, index: int, passes: bool) -> None:
        """The outcome of a trial. A failure outweighs what was taken for granted before."""
        if passes:
            self._passes |= self._stronger[:, index] & ~self._fails
        else:
            self._fails |= self._stronger[index]
            self._passes &= ~self._fails

    def retreat(self, index: int) -> None:
        """Marks a candidate that fails on the prompts held out, and leaves out those nearly as
        fast: prompts that judge many candidates would guide the search as well."""
        self.record(index, False)
        self.most = float(self._speedups[index]) / (1 + RETREAT)

    def _between(self, least: float) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = (self._speedups > least) & (self._speedups <= self.most)
        return mask


def strongest(
    search: Search, passes: Callable[[Candidate], bool], holds: Callable[[Candidate], bool]
) -> Candidate | None:
    """The fastest candidate that `passes` and `holds`, or None. After one that does not hold, the
    search goes on with those slower by a margin."""
    while True:
        index = search.next()
        if index is not None:
            search.record(index, passes(search.found[index]))
        elif search.best is None or holds(search.found[search.best]):
            return None if search.best is None else search.found[search.best]
        else:
            search.retreat(search.best)
