"""How many rows a decoding step is worth: what a row costs, what it is likely to bring, and how
many to take."""

import json
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf, pow
from typing import NamedTuple

from lazyahead.draft.tree import ROOT, Draft, Source
from lazyahead.errors import ConfigError


@dataclass(frozen=True)
class RowCost:
    """Seconds of a decoding step by its number of rows, on one model, device and dtype.

    `points` are (rows, seconds); between them the curve is a line, beyond the last it goes on as
    the last line does, it never falls (a point that does is noise), and n times the rows never cost
    more than n steps. Raises ConfigError without points, for rows below 1, or seconds not above 0.
    """

    points: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        points = sorted((int(rows), float(seconds)) for rows, seconds in self.points)
        is_timed = all(0 < seconds < float("inf") for _, seconds in points)
        if not points or points[0][0] < 1 or not is_timed:
            raise ConfigError(
                f"row cost needs points of rows >= 1 and seconds > 0, got {list(self.points)}"
            )
        lowest = float("inf")
        rising: dict[int, float] = {}
        for rows, seconds in reversed(points):  # noise only adds: fewer rows cost no more
            lowest = rising[rows] = min(lowest, seconds)
        for fewer, rows in pairwise(sorted(rising)):  # rows can always go in several steps
            rising[rows] = min(rising[rows], -(-rows // fewer) * rising[fewer])
        object.__setattr__(self, "points", tuple(sorted(rising.items())))

    def seconds(self, rows: float) -> float:
        """Of one step with this many rows (1 = the last token alone)."""
        known = self._seconds
        if rows not in known:
            first, seconds, slope, _ = self.lines[bisect(self.points, (rows, inf))]
            known[rows] = seconds + (rows - first) * slope
        return known[rows]

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
        return json.dumps({"row_cost": self.points})

    @classmethod
    def from_json(cls, text: str) -> "RowCost":
        """Raises ConfigError for a text that `to_json` did not write."""
        try:
            return cls([(rows, seconds) for rows, seconds in json.loads(text)["row_cost"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"not a row cost: {text[:80]!r}") from error

    @cached_property
    def lines(self) -> list[tuple[int, float, float, float]]:
        """What the curve consists of: (first row, its seconds, seconds a row, last row). One leads
        to the first point, and one goes on beyond the last."""
        between = [
            (rows, seconds, (most - seconds) / (more - rows), more)
            for (rows, seconds), (more, most) in pairwise(self.points)
        ]
        slope = between[-1][2] if between else 0.0
        first = self.points[0]
        return [(*first, 0.0, first[0]), *between, (*self.points[-1], slope, inf)]

    @cached_property
    def _seconds(self) -> dict[float, float]:
        return {}


def choose(
    candidates: Sequence[Sequence[float]],
    cost: RowCost,
    other_rows: int = 0,
    *,
    min_gain: float = 0.01,
    max_rows: float = float("inf"),
    max_seconds: float = float("inf"),
) -> list[int]:
    """How many of its likeliest nodes each request shall have verified in the next, common step.

    `candidates` holds, per request, the path probabilities of its draft (`Draft.probs`, any order);
    `other_rows` are rows besides the requests' root rows and drafts, such as revived ones. A node
    accepted with probability p brings p tokens, so taking nodes in order of probability, tokens per
    second are (requests + sum of p) / cost(rows). The count with the most is taken, of those that
    keep the step within `max_rows` and `max_seconds`, and none at all where it gains less than
    `min_gain` over no drafts. Apply the counts with `Draft.best`.
    """
    num_requests = len(candidates)
    counts = [0] * num_requests
    best_counts = counts[:]
    expected = float(num_requests)
    rows = num_requests + other_rows
    best_rate = expected / cost.seconds(rows) * (1.0 + min_gain)
    for minus_p, i in sorted((-p, i) for i, probs in enumerate(candidates) for p in probs):
        counts[i] += 1
        rows += 1
        expected -= minus_p
        seconds = cost.seconds(rows)
        if rows > max_rows or seconds > max_seconds:
            break
        rate = expected / seconds
        if rate > best_rate:
            best_rate = rate
            best_counts = counts[:]
    return best_counts


class Step(NamedTuple):
    """The decoding step that a draft is for: what its rows cost, how many requests it serves, rows
    besides their roots and drafts, and the mean number of context tokens of a request."""

    cost: RowCost
    num_requests: int = 1
    other_rows: int = 0
    num_context: int = 0

    @property
    def base_rows(self) -> int:
        """Rows of the step without drafts."""
        return self.num_requests + self.other_rows


class GainTracker:
    """Tells while a draft grows when no further node can pay, so that what `choose` would not take
    is not grown.

    Ask once a node, likeliest first. It holds whatever the step's other requests draft: each has at
    least its root row, and more rows or more tokens only ask more of a node.
    """

    def __init__(self, step: Step, max_nodes: int) -> None:
        self._cost = step.cost
        self._is_alone = step.num_requests == 1
        self._rows = step.base_rows
        self._max_rows = step.base_rows + max_nodes
        self._expected = float(step.num_requests)
        self._best_rate = self._expected / step.cost.seconds(self._rows)

    def may_pay(self, prob: float) -> bool:
        """Whether a node of this probability, or any after it, may raise tokens per second; it is
        taken if so."""
        rows, expected = self._rows + 1, self._expected + prob
        rate = expected / self._cost.seconds(rows)
        if rate > self._best_rate:
            self._best_rate = rate
        elif not self._may_later(rows, expected, prob):
            return False
        self._rows, self._expected = rows, expected
        return True

    def _may_later(self, rows: int, expected: float, prob: float) -> bool:
        """Whether more rows than these may, were all further nodes as likely as the last one.

        If any number of rows pays, then one where a line of the curve ends that rises less than
        such nodes bring. Which one is unknown where other requests add rows.
        """
        for _, _, slope, end in self._cost.lines:
            if end >= rows and prob > self._best_rate * slope:
                if not self._is_alone:
                    return True
                most = min(end, self._max_rows)
                if expected + (most - rows) * prob > self._best_rate * self._cost.seconds(most):
                    return True
        return False


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
        """Matches are trusted like those of 1, 2, 4, 8 or 16 tokens, whichever is next below."""
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
