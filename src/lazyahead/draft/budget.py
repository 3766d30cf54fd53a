"""How many rows a decoding step is worth: what a row costs, what it is likely to bring, and how
many to take."""

import json
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import pow
from typing import NamedTuple

from lazyahead.draft.tree import ROOT, Draft, Source
from lazyahead.errors import ConfigError

_CONTEXT_STEP = 256


@dataclass(frozen=True)
class RowCost:
    """Seconds of a decoding step by its number of rows, as measured on one model, device and dtype.

    `points` are (rows, seconds); between them the curve is a line, beyond the last it goes on as
    the last line does, it never falls (a measurement that does is noise), and n times the rows
    never cost more than n steps. `per_token` holds the seconds that each token of context adds, for
    the rows of `points`; empty: none. Raises ConfigError without points, for rows below 1, seconds
    not above 0, or a `per_token` that does not fit.
    """

    points: Sequence[tuple[int, float]]
    per_token: Sequence[float] = ()
    is_sure: bool = True
    """Whether measuring again gave the same."""

    def __post_init__(self) -> None:
        points = sorted((int(rows), float(seconds)) for rows, seconds in self.points)
        if (
            not points
            or points[0][0] < 1
            or not all(0 < seconds < float("inf") for _, seconds in points)
        ):
            raise ConfigError(
                f"row cost needs points of rows >= 1 and seconds > 0, got {list(self.points)}"
            )
        lowest, rising = float("inf"), dict[int, float]()
        for rows, seconds in reversed(
            points
        ):  # noise only adds: a step costs no more than a larger one
            lowest = rising[rows] = min(lowest, seconds)
        for fewer, rows in pairwise(sorted(rising)):  # rows can always go in several steps
            rising[rows] = min(rising[rows], -(-rows // fewer) * rising[fewer])
        object.__setattr__(self, "points", tuple(sorted(rising.items())))
        if self.per_token and (
            len(self.per_token) != len(rising) or not all(0 <= s < 1 for s in self.per_token)
        ):
            raise ConfigError(
                f"per_token needs seconds >= 0 for each of {len(rising)} points, got {self.per_token}"
            )

    def at(self, num_tokens: int) -> "RowCost":
        """The curve over a context of about so many tokens."""
        place = num_tokens // _CONTEXT_STEP
        if not self.per_token or not place:
            return self
        if place not in self._by_context:
            added = [place * _CONTEXT_STEP * seconds for seconds in self.per_token]
            self._by_context[place] = RowCost(
                [(r, s + more) for (r, s), more in zip(self.points, added, strict=True)]
            )
        return self._by_context[place]

    def seconds(self, rows: int) -> float:
        """Of one step with this many rows (1 = the last token alone)."""
        table = self._table
        while len(table) <= rows:
            table.append(self._interpolate(len(table)))
        return table[rows]

    def __call__(self, rows: int) -> float:
        """Cost relative to a step of one row."""
        return self.seconds(rows) / self.seconds(1)

    def max_nodes(self, limit: int, other_rows: int = 0) -> int:
        """How many draft nodes could pay at best, up to `limit`: as many as would if all were sure
        to be accepted.

        Where even sure tokens do not raise tokens per second beyond n nodes, less likely ones do
        not either.
        """
        return choose([[1.0] * limit], self, other_rows, min_gain=0.0)[0]

    def to_json(self) -> str:
        return json.dumps({"row_cost": self.points, "per_token": self.per_token})

    @classmethod
    def from_json(cls, text: str) -> "RowCost":
        """Raises ConfigError for a text that `to_json` did not write."""
        try:
            values = json.loads(text)
            return cls(
                [(rows, seconds) for rows, seconds in values["row_cost"]],
                tuple(values.get("per_token", ())),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"not a row cost: {text[:80]!r}") from error

    def tables(self, rows: int) -> tuple[Sequence[float], Sequence[float]]:
        """By rows, up to so many or more: the seconds of a step, and the fewest that any row from
        there on adds."""
        if len(self._least) <= rows:
            last = max(rows, self.points[-1][0])  # from where on all rows add the same
            least = [self.seconds(last + 1) - self.seconds(last)]
            for n in range(last - 1, -1, -1):
                least.append(min(least[-1], self.seconds(n + 1) - self.seconds(n)))
            self._least[:] = least[::-1]
        return self._table, self._least

    @cached_property
    def _by_context(self) -> dict[int, "RowCost"]:
        return {}

    @cached_property
    def _table(self) -> list[float]:
        return []

    @cached_property
    def _least(self) -> list[float]:
        return []

    def _interpolate(self, rows: int) -> float:
        points = self.points
        if len(points) == 1 or rows <= points[0][0]:
            return points[0][1]
        i = next((i for i in range(1, len(points)) if rows <= points[i][0]), len(points) - 1)
        (r0, s0), (r1, s1) = points[i - 1], points[i]
        seconds = s0 + (s1 - s0) * (rows - r0) / (r1 - r0)
        return min(seconds, s1) if rows <= r1 else seconds  # rounding never makes a curve fall


def choose(
    candidates: Sequence[Sequence[float]],
    cost: RowCost,
    other_rows: int = 0,
    *,
    min_gain: float = 0.01,
) -> list[int]:
    """How many of its likeliest nodes each request shall have verified in the next, common step.

    `candidates` holds, per request, the path probabilities of its draft (`Draft.probs`, any order);
    `other_rows` are rows besides the requests' root rows and drafts, such as revived ones. A node
    accepted with probability p brings p tokens, so taking nodes in order of probability, tokens per
    second are (requests + sum of p) / cost(rows). The count with the most is taken, and none at all
    where it gains less than `min_gain` over no drafts. Apply the counts with `Draft.best`.
    """
    num_requests = len(candidates)
    counts, best_counts = [0] * num_requests, [0] * num_requests
    expected, rows = float(num_requests), num_requests + other_rows
    best_rate = expected / cost.seconds(rows) * (1.0 + min_gain)
    for minus_p, i in sorted((-p, i) for i, probs in enumerate(candidates) for p in probs):
        counts[i] += 1
        rows += 1
        expected -= minus_p
        rate = expected / cost.seconds(rows)
        if rate > best_rate:
            best_rate, best_counts = rate, counts[:]
    return best_counts


class Step(NamedTuple):
    """The step that a draft is for: of `num_requests`, with `other_rows` as in `choose`, over this
    much context."""

    row_cost: RowCost
    num_requests: int = 1
    other_rows: int = 0
    num_context: int = 0

    @property
    def cost(self) -> RowCost:
        return self.row_cost.at(self.num_context)


class GainTracker:
    """Tells while a draft grows when no further node can pay, so that what `choose` would not take
    is not grown.

    Ask once a node, likeliest first. It holds whatever the step's other requests draft: each has at
    least its root row, and more rows or more tokens only ask more of a node.
    """

    def __init__(self, step: Step, max_nodes: int) -> None:
        self._rows, self._expected = step.num_requests + step.other_rows, float(step.num_requests)
        self._seconds, self._least = step.cost.tables(self._rows + max_nodes)
        self._best_rate = self._expected / self._seconds[self._rows]

    def may_pay(self, prob: float) -> bool:
        """Whether a node of this probability, or any after it, may raise tokens per second; it is
        taken if so."""
        rows = self._rows
        if prob <= self._best_rate * self._least[rows]:
            return False
        self._rows = rows = rows + 1
        self._expected = expected = self._expected + prob
        rate = expected / self._seconds[rows]
        self._best_rate = max(self._best_rate, rate)
        return True


MAX_DEPTH = 256
"""No draft is deeper."""

_LENGTHS = (1, 2, 4, 8, 16)  # lowest match length of each class
_DEPTHS = (1, 2, 4, 8)  # lowest depth of each class
_LENGTH_CLASS = [bisect(_LENGTHS, length) - 1 for length in range(_LENGTHS[-1] + 1)]
DEPTH_CLASS = [bisect(_DEPTHS, depth) - 1 for depth in range(MAX_DEPTH + 1)]


def _prior(match_len: int, depth: int) -> float:
    """Longer agreement makes the next guess surer, and so does every level that was right."""
    return 1.0 - 0.7 / pow(match_len + depth - 1, 0.7)


class AcceptanceBucket:
    """How often guesses of one source and match length class are right once all above them are, by
    depth class."""

    __slots__ = ("_judged", "_right", "_shorter", "length", "rates")

    def __init__(
        self, length: int, prior_weight: float, shorter: Sequence["AcceptanceBucket"]
    ) -> None:
        priors = [_prior(_LENGTHS[length], depth) for depth in _DEPTHS]
        self.length = length
        # [DEPTH_CLASS[depth]] -> chance, between 0.001 and 0.995; depth 1 follows the last token
        self.rates = priors
        self._right = [prior_weight * prior for prior in priors]
        self._judged = [prior_weight] * len(priors)
        self._shorter = tuple(shorter)  # of the same source

    def trust(self) -> tuple[float, int]:
        """By which kinds are ranked: of one source, a longer match is never trusted less."""
        best = self.rates[0]
        for kind in self._shorter:
            best = max(best, kind.rates[0])
        return best, self.length

    def count(self, depth: int, is_right: bool, decay: float) -> None:
        step, rates = DEPTH_CLASS[depth], self.rates
        self._judged[step] = judged = self._judged[step] * decay + 1.0
        self._right[step] = right = self._right[step] * decay + is_right
        rates[step] = min(max(right / judged, 0.001), 0.995)


@dataclass
class Acceptance:
    """Chance that a guess is right once all above it are, learned by source, match length and
    depth.

    Each cell counts the guesses judged and those that were right, starting from `prior_weight`
    imagined ones and forgetting at `decay` a guess, so that it follows a text which changes its
    manner.
    """

    decay: float = 0.98
    prior_weight: float = 4.0

    def __post_init__(self) -> None:
        self._kinds: list[
            list[AcceptanceBucket]
        ] = []  # [source][match length, the longest together]
        for _ in Source:
            kinds: list[AcceptanceBucket] = []
            for length in range(len(_LENGTHS)):
                kinds.append(AcceptanceBucket(length, self.prior_weight, kinds))
            self._kinds.append([kinds[length] for length in _LENGTH_CLASS])

    def kind(self, source: Source, match_len: int) -> AcceptanceBucket:
        """Matches are as trustworthy as those of 1, 2, 4, 8 or 16 tokens, whichever is next below."""
        return self._kinds[source][match_len if match_len < _LENGTHS[-1] else _LENGTHS[-1]]

    def rates(self, source: Source, match_len: int) -> list[float]:
        return self.kind(source, match_len).rates

    def trust(self, source: Source, match_len: int) -> tuple[float, int]:
        return self.kind(source, match_len).trust()

    def learn(self, draft: Draft, tokens: Sequence[int]) -> None:
        """Judge a draft (with sources, match lengths and probabilities) by the tokens that came.

        Every node whose parent was right is judged, verified or not, so that a source which no
        longer pays is noticed when it does again. Guesses of one kind at one place are one
        judgement, right where one of them is; kinds are judged most trusted first, and none that is
        less trusted than the one that was right.
        """
        parents, token_ids = draft.parents, draft.token_ids
        node: int | None = ROOT
        for depth, token in enumerate(tokens, 1):
            kinds: dict[AcceptanceBucket, int | None] = {}  # the child that was right
            for child, parent in enumerate(parents):
                if parent == node:
                    kind = self.kind(draft.sources[child], draft.match_lens[child])
                    if token_ids[child] == token:
                        kinds[kind] = child
                    elif kind not in kinds:
                        kinds[kind] = None
            node = None
            for kind in (
                sorted(kinds, key=AcceptanceBucket.trust, reverse=True) if len(kinds) > 1 else kinds
            ):
                node = kinds[kind]
                kind.count(depth, node is not None, self.decay)
                if node is not None:
                    break
            if node is None:
                return
