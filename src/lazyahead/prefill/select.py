"""Which tokens go on: rules over scores. Tensors in, masks out; no model, no state.

Equal scores are common (pooling, windows, underflow) and go by slot, so that the choice does not depend on which
other rows share the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lazyahead.prefill.stash import Stash


def best(scores: Tensor, pool: Tensor, protected: Tensor, count: int) -> Tensor:
    """Percentile selection as a count: the `count` best of `pool`, protected ones first and always.

    All (N,); scores float, the others bool. Returns a mask.
    """
    sure = pool & protected
    count = min(max(count, int(sure.sum())), int(pool.sum()))
    return _first(scores.masked_fill(sure, torch.inf).masked_fill(~pool, -torch.inf), count)


def demanded(scores: Tensor, waiting: Tensor, threshold: float, limit: int) -> Tensor:
    """Demand: what waits and is paid more than `threshold`, the `limit` best of it. A mask (N,)."""
    hits = waiting & (scores > threshold)
    if int(hits.sum()) <= limit:
        return hits
    return _first(scores.masked_fill(~hits, -torch.inf), limit)


def around(positions: Tensor, centres: Tensor, reach: int) -> Tensor:
    """Which of the `positions` (N,) lie within `reach` of one of the `centres` (M,): a mask (N,)."""
    return ((positions[:, None] - centres).abs() <= reach).any(-1)


def neighbours(paid: Tensor, hits: Tensor, stash: Stash, limit: int, reach: int) -> Tensor:
    """Entries to bring back for one row that pays (M,) and hits (M,) the first M of them: the `limit` best hits, and
    who waits, of the M, within `reach` positions of one."""
    best = paid.masked_fill(~hits, -torch.inf).sort(descending=True, stable=True).indices[: min(limit, int(hits.sum()))]
    known = paid.numel()
    near = around(stash.positions[:known], stash.positions[best], reach)
    return (near & stash.is_live[:known]).nonzero()[:, 0]


def _first(ranked: Tensor, count: int) -> Tensor:
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked.sort(descending=True, stable=True).indices[:count]] = True
    return chosen
