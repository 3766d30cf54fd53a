"""Which tokens go on: rules over scores. Tensors in, masks out; no model, no state.

Equal scores are common (pooling, windows, underflow) and go by slot, so that the choice does not
depend on which other rows share the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best(scores: Tensor, pool: Tensor, protected: Tensor, count: int) -> Tensor:
    """Percentile selection as a count: the `count` best of `pool`, protected ones first and always.

    All (N,); scores float, the others bool. Returns a mask.
    """
    sure = pool & protected
    count = min(max(count, int(sure.sum())), int(pool.sum()))
    return _first(scores.masked_fill(sure, torch.inf).masked_fill(~pool, -torch.inf), count)


def demanded(scores: Tensor, stashed: Tensor, threshold: float, limit: int) -> Tensor:
    """Demand: the `limit` best stashed tokens that score above `threshold`. A mask (N,)."""
    hits = stashed & (scores > threshold)
    if int(hits.sum()) <= limit:
        return hits
    return _first(scores.masked_fill(~hits, -torch.inf), limit)


def _first(ranked: Tensor, count: int) -> Tensor:
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked.sort(descending=True, stable=True).indices[:count]] = True
    return chosen
