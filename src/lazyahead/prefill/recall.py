"""Recall while decoding: stashed tokens that a row attends to in layers above their boundary.

A stashed token has no keys there, but the keys it would have, made from its hidden state at the
boundary, are kept with the stash. A row whose attention to such a key exceeds the threshold, and
whose next token is uncertain, has its pass repeated with that token and its neighbours revived.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.score import reach_of
from lazyahead.prefill.select import best_with_neighbours

_REPEATED = 4
"""Times as many tokens may be revived by a repeated pass as in passing: such passes are rare."""


class StashAttention(NamedTuple):
    """Attention of the root and its drafts, in one layer, to tokens stashed at `boundary`."""

    boundary: int
    weights: Tensor
    """(Q, E), maximum over heads."""
    exceeds: Tensor
    """(Q, E), whether that is above the threshold."""


class Recall:
    """What the rows of one decoding pass attended to among stashed tokens."""

    def __init__(self, session: Session, config: LazyPrefill, num_rows: int) -> None:
        self._session = session
        self._config = config
        self._seen: list[StashAttention] = []
        device = session.kv[0].positions.device
        self.uncertain = torch.zeros(num_rows, dtype=torch.bool, device=device)
        """(Q,) root and drafts that need a stashed token and are uncertain of their next one."""

    def observe(self, boundary: int, weights: Tensor) -> None:
        """Weights (Q, E) over the stash at `boundary`."""
        exceeds = weights > self._config.revive_threshold
        self._seen.append(StashAttention(boundary, weights, exceeds))

    def check(self, logits: Tensor, *, root_was_checked: bool) -> None:
        """Sets `uncertain` from the rows' logits (Q, V)."""
        if not self._seen:
            return
        asking = torch.stack([seen.exceeds.any(-1) for seen in self._seen]).any(0)  # (Q,)
        if root_was_checked:
            asking[0] = False
        if bool(asking.any()):
            likeliest = logits[asking].float().softmax(-1).amax(-1)
            self.uncertain[asking] = likeliest < self._config.recall_below_prob

    def entries_for(self, row: int) -> Mapping[int, Tensor]:
        """Stash entries that `row` needs, neighbours included, by boundary."""
        found: dict[int, list[Tensor]] = {}
        limit = _REPEATED * self._config.revive_limit
        reach = reach_of(self._config.scorer)
        for boundary, weights, exceeds in self._seen:
            if not bool(exceeds[row].any()):
                continue
            stash = self._session.stashes[boundary]
            known = exceeds.shape[1]
            positions = stash.positions[:known]
            live = stash.is_live[:known]
            chosen = best_with_neighbours(weights[row], exceeds[row], positions, live, limit, reach)
            found.setdefault(boundary, []).append(chosen.nonzero()[:, 0])
        return {boundary: torch.unique(torch.cat(parts)) for boundary, parts in found.items()}
