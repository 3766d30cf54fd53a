"""How far the reading of one prompt has come."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Reading:
    """How far the reading of one prompt has come. A prompt is read in one pass, or in parts beside
    other requests: parts wait at the first boundary until the last token has chosen, then the
    chosen go on in parts, and so forth.
    """

    start: int
    """First token of this turn."""
    end: int
    """Length of the prompt."""
    prunes: bool
    """Whether this turn's tokens may be deferred."""
    question: tuple[int, int] | None = None
    """Positions that always go on."""
    num_entered: int = 0
    """Tokens of this turn that have entered layer 0."""
    stage: int | None = None
    """Boundary at which chosen tokens wait to be carried on."""
    wanted: Tensor | None = None
    """Stash entries chosen there, by position."""
    is_done: bool = False


def chunk_len(remaining: int, limit: int | None, num_queries: int) -> int:
    """Rows of the next part: at most `limit`, but the last part holds every row that scores."""
    if limit is None or remaining <= limit:
        return remaining
    part = min(max(2, limit), remaining - num_queries)
    return (
        part if part > 1 else remaining
    )  # a row that flies alone is the last: nothing cached lies behind it
