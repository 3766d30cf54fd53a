"""What a decoding step costs by its number of rows, learned from the steps themselves.

Nothing is run for it: each decoding pass is noted with its rows, its context and its seconds (on a
CPU those of its own thread, so that other processes do not make rows look dear). The
figures are kept apart by context length (below 512 tokens, then by octaves), and in each range by
row count (exactly up to 4 rows, then two ranges an octave). From them follows a `RowCost` curve.

A row count's price is a weighted mean of three things: the low quantile of its latest seconds
(noise only adds), a prior, and the price of the next smaller row count. The prior is what was
learned over the best known context, else what is stated for the device, whose weight halves every
64 passes. The price of the next smaller row count makes those look cheap that were not seen, or not
lately, so that they are tried. What a trial may cost is bounded twice: a step never has more than
twice the rows that were tried before (so it costs at most two steps), and `LossLimit` has to allow
it.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any, Self

from lazyahead.draft.budget import RowCost, Step, choose
from lazyahead.draft.loss_limit import LossLimit
from lazyahead.errors import ConfigError

CPU_FLOAT32 = RowCost([(1, 1.0), (3, 1.1), (4, 2.0), (8, 3.2), (16, 6.0), (32, 12.0)])
CPU_BFLOAT16 = RowCost(
    [(1, 1.0), (4, 1.03), (8, 1.2), (16, 1.7), (32, 3.3), (64, 6.0), (128, 11.0)]
)
GPU = RowCost([(1, 1.0), (4, 1.06), (16, 1.3), (64, 1.95), (128, 3.0)])

_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Largest row count of each range; steps with more rows teach nothing."""
_FIRST_CONTEXT = 512
_NUM_SAMPLES = 16
_NUM_STORED = 4  # samples of a range that a file stands for
_PRIOR_WEIGHT = 2.0  # in samples
_PRIOR_HALF_LIFE = 64  # passes
_SAMPLE_HALF_LIFE = 256  # passes since the latest one
_MAX_PASSES_WITHOUT_PLAIN = 256  # then one step is made without drafts, to know what it costs
_NUM_PLAIN = 2  # steps without drafts before the first one with
_NUM_KNOWN = 3.5  # samples from which on a price is used in place of a single measurement
_CURVE_PASSES = 64  # passes that a curve is used for, at most


def prior_for(device_type: str, dtype: str) -> RowCost:
    """What rows are taken to cost before any were seen; in units of a step of one row."""
    if device_type != "cpu":
        return GPU
    return CPU_FLOAT32 if dtype in ("float32", "float64") else CPU_BFLOAT16


class _Samples:
    """The latest steps within one range of row counts."""

    def __init__(self) -> None:
        self.latest: deque[tuple[float, int]] = deque(maxlen=_NUM_SAMPLES)
        """(seconds, rows) of each."""
        self.last_pass = 0

    def add(self, rows: int, seconds: float, now: int) -> None:
        self.latest.append((seconds, rows))
        self.last_pass = now

    @property
    def typical(self) -> tuple[float, int]:
        """The step that took the lower quartile of the seconds: (seconds, rows)."""
        return sorted(self.latest)[len(self.latest) // 4]

    def weight(self, now: int) -> float:
        """How many sure samples these are worth at pass `now`; a single one is half sure."""
        age = now - self.last_pass
        return max(0.0, len(self.latest) - 0.5) * float(0.5 ** (age / _SAMPLE_HALF_LIFE))


class _CostTable:
    """Steps over contexts of about the same length."""

    def __init__(self) -> None:
        self.samples = [_Samples() for _ in _EDGES]
        self.num_passes = 0
        self.max_rows = 0
        """Largest row count that was seen; 0: none was."""
        self._curve: RowCost | None = None
        self._curve_pass = 0

    def note(self, rows: int, seconds: float) -> None:
        self.num_passes += 1
        self.max_rows = max(self.max_rows, rows)
        samples = self.samples[_place_of(rows)]
        samples.add(rows, seconds, self.num_passes)
        is_new = len(samples.latest) <= _NUM_KNOWN
        max_passes = min(1 + self.num_passes // 8, _CURVE_PASSES)
        if is_new or self.num_passes - self._curve_pass >= max_passes:
            self._curve = None

    def typical(self, rows: int) -> float:
        """Seconds of steps with about so many rows; 0.0 where too few were seen lately."""
        samples = self.samples[_place_of(rows)]
        if samples.weight(self.num_passes) < _NUM_KNOWN:
            return 0.0
        return samples.typical[0]

    def knows(self, rows: int) -> bool:
        """Whether steps of `rows` rows were seen more than once."""
        return len(self.samples[_place_of(rows)].latest) >= _NUM_PLAIN

    def saw_lately(self, rows: int) -> bool:
        last_pass = self.samples[_place_of(rows)].last_pass
        return self.num_passes - last_pass <= _MAX_PASSES_WITHOUT_PLAIN

    def curve(self, prior: RowCost, is_learned: bool) -> RowCost:
        """Remade every few passes, at most 64. `is_learned` tells a prior learned over another
        context, which keeps its weight, from a stated one."""
        if self._curve is None:
            self._curve = self._make_curve(prior, is_learned)
            self._curve_pass = self.num_passes
        return self._curve

    def _make_curve(self, prior: RowCost, is_learned: bool) -> RowCost:
        first = next((i for i, samples in enumerate(self.samples) if samples.latest), None)
        if first is None:
            return prior
        price, rows = self.samples[first].typical
        scale = price / prior.seconds(rows)
        points = [(edge, scale * prior.seconds(edge)) for edge in _EDGES[:first]]
        points.append((rows, price))
        limit = 2 * self.max_rows
        weights = [samples.weight(self.num_passes) for samples in self.samples]
        known = [place for place, weight in enumerate(weights) if weight >= _NUM_KNOWN]
        num_passes = 0 if is_learned else self.num_passes
        prior_weight = _PRIOR_WEIGHT * 0.5 ** (num_passes / _PRIOR_HALF_LIFE)
        for place in range(first + 1, len(_EDGES)):
            samples = self.samples[place]
            before = rows
            seconds, rows = samples.typical if samples.latest else (0.0, _EDGES[place])
            expected = price * prior.seconds(rows) / prior.seconds(before)
            if before > limit:
                break  # the curve goes on as the prior does
            if rows > limit:
                price = expected
            else:
                hoped = price
                following = next((other for other in known if other > place), None)
                if following is not None:  # what lies on the line to a known price
                    most, more = self.samples[following].typical
                    hoped += max(0.0, most - price) * (rows - before) / (more - before)
                total = hoped + prior_weight * expected + weights[place] * seconds
                price = max(price, total / (1.0 + prior_weight + weights[place]))
            points.append((rows, price))
        return RowCost(points)


class LearnedRowCost:
    """Row costs of one model on one machine, for all engines that run it. Thread-safe.

    Each decoding step: `step` says what rows cost, a drafter drafts for it, `choose` says how many
    of its nodes are verified, and `note` tells how long the pass took.

    Args:
        prior: what rows are taken to cost at first, in any unit.
        path: a file that `save` writes; None: nothing is kept.
    """

    def __init__(self, prior: RowCost = GPU, path: Path | None = None) -> None:
        self.prior = prior
        self.path = path
        self.loss_limit = LossLimit()
        self._tables: dict[int, _CostTable] = {}
        self._best_known = _CostTable()  # of most passes: the others start from it
        self._num_notes = 0
        self._num_saved = 0
        self._lock = RLock()

    def curve(self, num_context: int = 0) -> RowCost:
        """Seconds by rows over a context of so many tokens; in the prior's unit before any pass."""
        with self._lock:
            table = self._table(num_context)
            other = self._best_known
            if other is table or not other.num_passes:
                return table.curve(self.prior, is_learned=False)
            return table.curve(other.curve(self.prior, is_learned=False), is_learned=True)

    def step(self, num_requests: int = 1, other_rows: int = 0, num_context: int = 0) -> Step:
        """The next decoding step: of `num_requests`, with `other_rows` besides their roots and
        drafts, behind a mean context of `num_context` tokens."""
        return Step(self.curve(num_context), num_requests, other_rows, num_context)

    def choose(self, candidates: Sequence[Sequence[float]], step: Step) -> list[int]:
        """How many of its likeliest nodes each request has verified, as `budget.choose`; fewer, or
        none, where that would try too much at once or lose too much."""
        with self._lock:
            table = self._table(step.num_context)
            base = step.base_rows
            if not (table.knows(base) and table.saw_lately(base)):
                return [0] * len(candidates)
            return choose(
                candidates,
                step.cost,
                step.other_rows,
                max_rows=2 * max(base, table.max_rows, self._best_known.max_rows),
                max_seconds=step.cost.seconds(base) * (1.0 + self.loss_limit.balance),
            )

    def note(self, step: Step, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A pass for `step` with `num_rows` rows in all took so long and brought `num_tokens`."""
        if not (0 < num_rows <= _EDGES[-1] and 0.0 < seconds < float("inf")):
            return
        with self._lock:
            table = self._table(step.num_context)
            table.note(num_rows, seconds)
            if table.num_passes > self._best_known.num_passes:
                self._best_known = table
            self._num_notes += 1
            base = step.base_rows
            cost = 0.0
            if num_rows > base:
                plain = step.cost.seconds(base)
                typical = table.typical(num_rows)
                taken = typical or min(seconds, 2.0 * step.cost.seconds(num_rows))
                cost = max(0.0, min(taken / plain, num_rows / base) - 1.0)
            self.loss_limit.note(cost, max(0, num_tokens / step.num_requests - 1.0))

    def save(self) -> None:
        """Write what was learned, where it is worth a file: after 32 passes, then each time that
        there are twice as many. A file that cannot be written is given up."""
        with self._lock:
            if self.path is None or self._num_notes < max(32, 2 * self._num_saved):
                return
            self._num_saved = self._num_notes
            text = self.to_json()
            path = self.path
        part = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        except OSError:
            self.path = None
            with suppress(OSError):
                part.unlink()

    @classmethod
    def load(cls, path: Path, prior: RowCost) -> Self:
        """What `save` wrote there; nothing learned if there is no such file, or a damaged one."""
        learned = cls(prior, path)
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
            learned._fill(json.loads(path.read_text(encoding="utf-8")))
        return learned

    def to_json(self) -> str:
        with self._lock:
            tables = {}
            for place, table in self._tables.items():
                known = [samples for samples in table.samples if samples.latest]
                points = [(*samples.typical, len(samples.latest)) for samples in known]
                tables[place] = {"num_passes": table.num_passes, "points": points}
            return json.dumps({"tables": tables})

    def _fill(self, values: dict[str, Any]) -> None:
        tables: dict[int, _CostTable] = {}
        for place, stored in values["tables"].items():
            table = tables[int(place)] = _CostTable()
            for seconds, rows, num_samples in stored["points"]:
                count = min(int(num_samples), _NUM_STORED)
                if not (1 <= rows <= _EDGES[-1] and 0.0 < seconds < float("inf")):
                    raise ConfigError(f"no row cost: {rows} rows in {seconds} s")
                for _ in range(count):
                    table.note(int(rows), float(seconds))
            table.num_passes = max(table.num_passes, int(stored["num_passes"]))
            for samples in table.samples:
                samples.last_pass = table.num_passes
        self._tables = tables
        self._best_known = max(tables.values(), key=lambda table: table.num_passes)

    def _table(self, num_context: int) -> _CostTable:
        place = _range_of(num_context)
        if place not in self._tables:
            self._tables[place] = _CostTable()
        return self._tables[place]


def _place_of(rows: int) -> int:
    """The range of this row count; beyond the last one, the last."""
    return min(bisect_left(_EDGES, rows), len(_EDGES) - 1)


def _range_of(num_context: int) -> int:
    """0 below 512 tokens, then one range an octave."""
    return (num_context // _FIRST_CONTEXT).bit_length()
