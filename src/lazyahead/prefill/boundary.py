"""What every policy does at a boundary: rows in flight and the stash meet, are scored, and go on
or are stashed (LazyLLM, sections 3.1 and 3.2).

    rows in flight + stash  --score-->  which tokens matter  --select-->  rows that go on / stashed
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.cache.stash import Stash
from lazyahead.hf.segment import Policy, Segment
from lazyahead.prefill.config import LazyPrefill


class Below(NamedTuple):
    """The tokens at the layer below a boundary."""

    positions: Tensor
    """(N,) in the order of that layer's cache."""
    row_slots: Tensor
    """(T,) where the rows in flight stand among them."""


class BoundaryPolicy(Policy):
    """What prefill and decoding share: moving rows into the stash and back."""

    def __init__(self, session: Session, config: LazyPrefill) -> None:
        self.session = session
        self.config = config
        self.num_revived = 0
        """Rows in flight that were revived in this pass."""

    def below(self, layer: int, segment: Segment) -> Below:
        """All tokens that entered the layer below, in its cache's order."""
        if layer == 0:
            device = segment.positions.device
            return Below(torch.arange(segment.last + 1, device=device), segment.positions)
        positions = self.session.kv[layer - 1].positions
        first = len(positions) - segment.num_rows
        return Below(positions, torch.arange(first, len(positions), device=positions.device))

    def may_revive(self, stash: Stash, segment: Segment, below: Below) -> Tensor:
        """(N,) tokens that are stashed here, or that were revived at an earlier boundary."""
        waiting = torch.zeros_like(below.positions, dtype=torch.bool)
        if len(stash):
            waiting[stash.slots[stash.live]] = True
        if self.num_revived:
            waiting[below.row_slots[segment.entered < 0]] = True
        return waiting

    def regroup(
        self, stash: Stash, hidden: Tensor, segment: Segment, below: Below, chosen: Tensor
    ) -> Tensor | None:
        """Stashes the rows that `chosen` (N,) leaves out, revives the stashed tokens it selects;
        rows then stand by position, drafts last. None where nothing changes."""
        stays = self.stays(chosen[below.row_slots], segment)
        returning = entries_of(stash, chosen)
        num_staying = int(stays.sum())
        if num_staying == segment.num_rows and not returning.numel():
            return None
        if num_staying < segment.num_rows:
            defer(stash, hidden, segment, below.row_slots, ~stays)
            hidden = hidden[stays]
            segment.keep(stays)
        if returning.numel():
            hidden = self._revive(stash, returning, hidden, segment)
        self.num_revived = int((segment.entered < 0).sum())
        return hidden

    def _revive(self, stash: Stash, entries: Tensor, hidden: Tensor, segment: Segment) -> Tensor:
        rows, positions = stash.take(entries)
        self.session.num_revived += int((positions < self.first_new_position).sum())
        head = entries.numel() + segment.num_rows - segment.num_drafts
        all_positions = torch.cat([positions, segment.positions])
        entered = torch.cat([torch.full_like(positions, -1), segment.entered])
        order = torch.arange(all_positions.numel(), device=positions.device)
        order[:head] = all_positions[:head].argsort(stable=True)  # drafts keep their own order
        segment.replace(all_positions[order], entered[order])
        return torch.cat([rows, hidden])[order]

    def stays(self, chosen: Tensor, segment: Segment) -> Tensor:
        """(T,) which rows in flight go on, where `chosen` (T,) were selected."""
        return chosen

    @property
    def first_new_position(self) -> int:
        """Tokens before it count as revived when they come back from a stash."""
        return self.session.prompt_len


def defer(stash: Stash, hidden: Tensor, segment: Segment, slots: Tensor, which: Tensor) -> None:
    """Stashes rows (T, d) of the segment where `which` (T,) is true; `slots` (T,) say where their
    keys stand at the layer below."""
    stash.add(hidden[which], segment.positions[which], slots[which])


def defer_all(stash: Stash, hidden: Tensor, segment: Segment, slots: Tensor) -> Tensor:
    """Stashes every row in flight. Returns no rows (0, d)."""
    defer(stash, hidden, segment, slots, torch.ones_like(slots, dtype=torch.bool))
    segment.replace(segment.positions[:0], segment.entered[:0])
    return hidden[:0]


def entries_of(stash: Stash, chosen: Tensor) -> Tensor:
    """The live entries of a stash that `chosen` (N,) selects."""
    live = stash.live
    return live[chosen[stash.slots[live]]] if len(stash) else live
