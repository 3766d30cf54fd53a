"""Which tokens go on: two rules over scores. Tensors in, masks out; no model, no state."""

from __future__ import annotations

import torch
from torch import Tensor


def best(scores: Tensor, pool: Tensor, protected: Tensor, count: int) -> Tensor:
    """Percentile selection as a count: the `count` best of `pool`, protected ones first and always.

    All (N,); scores float, the others bool. Returns a mask.
    """
    sure = pool & protected
    count = min(max(count, int(sure.sum())), int(pool.sum()))
    ranked = scores.masked_fill(sure, torch.inf).masked_fill(~pool, -torch.inf)
    chosen = torch.zeros_like(pool)
    chosen[ranked.topk(count).indices] = True
    return chosen


def demanded(scores: Tensor, waiting: Tensor, threshold: float, limit: int) -> Tensor:
    """Demand: what waits and is paid more than `threshold`, the `limit` best of it. A mask (N,)."""
    hits = waiting & (scores > threshold)
    if int(hits.sum()) <= limit:
        return hits
    chosen = torch.zeros_like(hits)
    chosen[scores.masked_fill(~hits, -torch.inf).topk(limit).indices] = True
    return chosen
