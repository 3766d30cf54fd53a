"""How far the prefill of one prompt has come."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PrefillProgress:
    """How far the prefill of one prompt has come.

    A prompt is computed in one pass, or in chunks beside other requests: chunks are stashed at the
    first boundary until the last token has selected, then the selected tokens continue in chunks
    up to the next boundary, and so forth.
    """

    start: int
    """First token of this turn."""
    end: int
    """Length of the prompt."""
    prunes: bool
    """Whether this turn's tokens may be deferred."""
    question: tuple[int, int] | None = None
    """Half-open span of positions that always go on."""
    is_open: bool = False
    """Whether the text only begins here: its tokens are computed up to the first boundary, none is
    answered."""
    shares: bool = False
    """Whether hidden states at the first boundary are collected for other prompts."""
    shared: tuple[Tensor, ...] = ()
    """Those collected: (T, d), from the prompt's first token on."""
    num_entered: int = 0
    """Tokens of this turn that have entered layer 0."""
    stage: int | None = None
    """Boundary at which selected tokens are stashed, to be continued in chunks."""
    selected: Tensor | None = None
    """Stash entries selected there, by position."""
    is_done: bool = False


def chunk_len(remaining: int, limit: int | None, num_queries: int) -> int:
    """Rows of the next chunk: at most `limit`, but the last chunk holds every row that scores."""
    if limit is None or remaining <= limit:
        return remaining
    chunk = min(max(2, limit), remaining - num_queries)
    return chunk if chunk > 1 else remaining  # a single row is the last: no key lies behind it
