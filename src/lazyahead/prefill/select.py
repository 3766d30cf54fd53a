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


def demanded(scores: Tensor, waiting: Tensor, threshold: float, limit: int) -> Tensor:
    """Demand: what waits and is paid more than `threshold`, the `limit` best of it. A mask (N,)."""
    hits = waiting & (scores > threshold)
    if int(hits.sum()) <= limit:
        return hits
    return _first(scores.masked_fill(~hits, -torch.inf), limit)


def best_with_neighbours(
    paid: Tensor, hits: Tensor, positions: Tensor, waiting: Tensor, limit: int, reach: int
) -> Tensor:
    """What comes back for one row that pays (N,) and hits (N,): of the `waiting` tokens those
    within `reach` of a hit, at most `limit`. The best hit comes first with what stands around
    it, nearest first and before that what follows. A mask (N,)."""
    num_hits = min(limit, int(hits.sum()))
    if not num_hits:
        return torch.zeros_like(waiting)
    centres = positions[
        paid.masked_fill(~hits, -torch.inf).sort(descending=True, stable=True).indices[:num_hits]
    ]
    ahead = positions[:, None] - centres  # (N, M)
    ranks = (
        torch.arange(num_hits, device=positions.device) * (2 * reach + 2)
        + 2 * ahead.abs()
        + (ahead < 0)
    )
    far = torch.iinfo(ranks.dtype).max
    best = ranks.masked_fill((ahead.abs() > reach) | ~waiting[:, None], far).amin(1)
    chosen = torch.zeros_like(waiting)
    chosen[best.sort().indices[:limit]] = True
    return chosen & (best < far)


def _first(ranked: Tensor, count: int) -> Tensor:
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked.sort(descending=True, stable=True).indices[:count]] = True
    return chosen
