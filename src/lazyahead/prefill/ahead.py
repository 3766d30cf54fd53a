"""Scores from layers above a boundary: the last rows run ahead of the rest of the prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.cache.stash import Stash
from lazyahead.hf.ahead import run_ahead
from lazyahead.hf.attention import NUM_SINKS
from lazyahead.hf.batch import Batch
from lazyahead.hf.segment import Rows, Segment
from lazyahead.prefill.boundary import Below
from lazyahead.prefill.score import AheadRange, Scorer

_NUM_RECENT = 256
"""Tokens before the running rows that they attend to in layers which are not scored."""


class AheadScores(NamedTuple):
    """What rows that ran ahead of a boundary attended to, over the N tokens below it."""

    attention: Tensor
    """(Q, N) of the last rows: mean over heads, maximum over layers; 0 for tokens cached there."""
    key_rows: Tensor
    """(N,) each token's row in `keys`, or -1."""
    keys: dict[int, Tensor]
    """Layer -> (1, H_kv, M, D), made from the hidden states at the boundary."""

    def store(self, stash: Stash) -> None:
        """Gives the stash the approximate keys of its entries."""
        if len(stash):
            entries = self.key_rows[stash.slots].clamp(min=0)
            stash.keys = {layer: keys.index_select(2, entries) for layer, keys in self.keys.items()}


def score_ahead(
    batch: Batch,
    segment: Segment,
    session: Session,
    scorer: Scorer,
    layer: int,
    rows: Rows,
    below: Below,
) -> AheadScores:
    """Lets the last rows run from the boundary at `layer` to the scorer's depth.

    Tokens in flight and tokens stashed at the boundary count as they are there; tokens that the
    deeper layers have cached count as cached.
    """
    num_frozen = max(0, rows.positions.numel() - scorer.window_size)
    frozen = rows.slice(slice(num_frozen))
    running = rows.slice(slice(num_frozen, None))
    slots = below.row_slots
    stash = session.stashes[layer]
    if len(stash):
        live = stash.live
        stashed = Rows(stash.hidden[live], stash.positions[live], torch.full_like(live, -1))
        frozen = Rows(*map(torch.cat, zip(stashed, frozen, strict=True)))
        slots = torch.cat([stash.slots[live], slots])
    num_below = below.positions.numel()
    key_rows = torch.full((num_below,), -1, device=slots.device)
    key_rows[slots] = torch.arange(slots.numel(), device=slots.device)
    num_running = running.positions.numel()
    attention = rows.hidden.new_zeros(num_running, num_below, dtype=torch.float32)
    keys: dict[int, Tensor] = {}
    recent = _recent(frozen, int(running.positions[0]))
    scored = AheadRange.of(scorer).layers(session.num_layers)
    layers = range(layer, scored.stop)
    stands = [frozen if deeper >= scored.start else recent for deeper in layers]
    for seen in run_ahead(batch, segment, stands, running, session.kv, layers):
        if seen.layer < scored.start:
            continue
        weights = seen.weights[:, -slots.numel() :]  # cached tokens come first
        attention[:, slots] = torch.maximum(attention[:, slots], weights)
        keys[seen.layer] = seen.keys[:, :, -slots.numel() :]
    return AheadScores(attention, key_rows, keys)


def _recent(frozen: Rows, first: int) -> Rows:
    """The tokens shortly before position `first`, and the first few of the text."""
    return frozen.where((frozen.positions >= first - _NUM_RECENT) | (frozen.positions < NUM_SINKS))
