"""What rows will attend to in layers that a waiting token has not reached."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.cache.stash import Stash
from lazyahead.hf.ahead import FrozenRows, run_ahead
from lazyahead.hf.attention import NUM_SINKS
from lazyahead.hf.segment import Pass, Segment
from lazyahead.prefill.score import AheadRange, Scorer

_NUM_NEAR = 256


class AheadScores(NamedTuple):
    """What was seen ahead of a boundary, about the N tokens below it."""

    peaks: Tensor
    """(Q, N) attention of the last rows: mean over heads, strongest over layers; 0 for tokens
    already cached there."""
    places: Tensor
    """(N,) of each token its place among `keys`, or -1."""
    keys: dict[int, Tensor]
    """By layer (1, H_kv, M, D), as the tokens stand at the boundary."""

    def tell(self, stash: Stash) -> None:
        """The stash learns the keys that its entries would have."""
        if len(stash):
            entries = self.places[stash.slots].clamp(min=0)
            stash.keys = {layer: keys.index_select(2, entries) for layer, keys in self.keys.items()}


def score_ahead(
    pass_: Pass,
    segment: Segment,
    session: Session,
    scorer: Scorer,
    layer: int,
    rows: FrozenRows,
    below: tuple[int, Tensor],
) -> AheadScores:
    """Lets the last rows run from the boundary at `layer` on to the scorer's depth.

    `rows` are those in segment; `below` is N and the rows' slots among them. Tokens in segment and
    tokens that wait at the boundary are seen as they stand there, those that the deeper layers have
    cached as they are.
    """
    num_below, slots = below
    num_still = max(0, rows.positions.numel() - scorer.window_size)
    still, running = rows.slice(slice(num_still)), rows.slice(slice(num_still, None))
    stash = session.stashes[layer]
    if len(stash):
        live = stash.live
        waiting = FrozenRows(stash.hidden[live], stash.positions[live], torch.full_like(live, -1))
        still = FrozenRows(*map(torch.cat, zip(waiting, still, strict=True)))
        slots = torch.cat([stash.slots[live], slots])
    places = torch.full((num_below,), -1, device=slots.device)
    places[slots] = torch.arange(slots.numel(), device=slots.device)
    peaks = rows.hidden.new_zeros(running.positions.numel(), num_below, dtype=torch.float32)
    keys: dict[int, Tensor] = {}
    near = _local(still, int(running.positions[0]))
    layers = range(
        layer, min(round(AheadRange.of(scorer).stop * session.num_layers), session.num_layers - 1)
    )
    score_from_depth = round(AheadRange.of(scorer).start * session.num_layers)
    stands = [still if deeper >= score_from_depth else near for deeper in layers]
    for deeper, attention, made in run_ahead(pass_, segment, stands, running, session.kv, layers):
        if deeper < score_from_depth:
            continue
        peak = attention.mean(0)[
            :, -slots.numel() :
        ]  # cached tokens come first and need no choosing
        peaks[:, slots] = torch.maximum(peaks[:, slots], peak)
        keys[deeper] = made[:, :, -slots.numel() :]
    return AheadScores(peaks, places, keys)


def _local(still: FrozenRows, first: int) -> FrozenRows:
    """Of the tokens that stand still those that a row from position `first` on needs to know what
    it says: some before it, and the first few, which every row pays something for nothing."""
    near = (still.positions >= first - _NUM_NEAR) | (still.positions < NUM_SINKS)
    return FrozenRows(*(field[near] for field in still))
