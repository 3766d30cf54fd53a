"""What an attention call is told beside queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from lazyahead.hf.plan import Plan

NUM_SINKS = 4
"""First tokens of a text that every row sees: models pay them attention for nothing."""


class AttentionParams(NamedTuple):
    """What a layer says about its attention."""

    scaling: float
    window: int | None = None
    """Sliding window: a row sees keys less than this many positions back."""
    chunk: int | None = None
    """Chunked attention: a row sees keys of its own chunk of this many positions."""
    softcap: float | None = None
    """Logits x become softcap * tanh(x / softcap)."""
    sinks: Tensor | None = None
    """(H,) one logit per head that takes part in the softmax and leads nowhere."""
    ranks: int = 1
    """Processes that each attend with a share of the heads."""


class LocalWindow(NamedTuple):
    """Rows before position `until` see only the `num_tokens` keys up to their own and the first few
    of the text."""

    num_tokens: int
    until: int


class Shared:
    """What layers with the same rows and the same keys need alike, made once."""

    __slots__ = ("masks", "plans")

    def __init__(self) -> None:
        self.masks: dict[tuple[AttentionParams, int], Tensor] = {}
        """By heads and how often the mask repeats."""
        self.plans: dict[tuple[int | None, int | None, bool, int], Plan] = {}
        """By window, chunk, whether attention is local, and query heads per key head."""


class QueryRows(NamedTuple):
    """The query rows of one request at one layer."""

    positions: Tensor
    """(T,), rising but for drafts."""
    last: int
    """Highest position, known without asking the device."""
    ancestors: Tensor | None = None
    """(M, M) for the last M rows, which are drafts: [i, j] says that j is i or comes before it."""
    shared: Shared | None = None
    first: int | None = None
    """Lowest position of rows that rise by one and are the last of the text; None: unknown."""
    local: LocalWindow | None = None
    """Where rows see less than all; their positions then rise by one, and every earlier token has
    its key."""
