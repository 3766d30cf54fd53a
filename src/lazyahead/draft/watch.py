"""The cost of rows as it is known now: measured when first needed, and again where passes prove it
wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lazyahead.draft.budget import RowCost

_ENOUGH = 32
"""Passes in a row that prove a curve wrong."""
_WRONG = 0.7
"""Time of a pass over what the curve says: noise only adds, so a curve that passes keep beating was
measured in it."""
_MOST_TIMES = 4
"""Measurements at most: on a machine that never gets quiet, measuring would be most of the noise.
"""


class WatchedCost:
    """Asks `measure` for the curve when it is first needed, and anew where the last passes all took
    far less than it says, or where it was not sure of itself. Each new measurement waits for
    eight times as many passes."""

    def __init__(self, measure: Callable[[], RowCost]) -> None:
        self._measure = measure
        self._num_measured, self._num_passes, self._wait = 0, 0, _ENOUGH
        self._ratios: deque[float] = deque(maxlen=_ENOUGH)
        self.cost: RowCost | None = None
        """None: not needed yet."""

    def get(self) -> RowCost:
        """The curve, measured where it is not known or not believed any more."""
        if self.cost is None or self._is_wrong:
            self.cost = self._measure()
            self._num_measured += 1
            self._ratios.clear()
            self._num_passes, self._wait = 0, self._wait * (8 if self._num_measured > 1 else 1)
        return self.cost

    def note(self, rows: int, num_tokens: int, seconds: float) -> None:
        """A decoding pass of so many rows over about so many tokens of context took so long."""
        if self.cost is not None:
            self._num_passes += 1
            self._ratios.append(seconds / self.cost.at(num_tokens).seconds(rows))

    @property
    def _is_wrong(self) -> bool:
        assert self.cost is not None
        if self._num_measured >= _MOST_TIMES or self._num_passes < self._wait:
            return False
        return not self.cost.is_sure or max(self._ratios) < _WRONG
