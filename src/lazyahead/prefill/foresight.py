"""What the last rows of a prompt will attend to in layers that the prompt has not reached."""

from __future__ import annotations

import torch
from torch import Tensor

from lazyahead.hf.ahead import Standing, run_ahead
from lazyahead.hf.rows import Flight, Pass
from lazyahead.prefill.score import Scorer
from lazyahead.session import Session


def foresee(
    pass_: Pass, flight: Flight, session: Session, scorer: Scorer, layer: int, rows: Standing, below: tuple[int, Tensor]
) -> Tensor:
    """Attention (Q, N) of the last rows to the N tokens below the boundary at `layer`: mean over heads, strongest
    over the layers from there to the scorer's depth.

    `rows` are those in flight; `below` is N and the rows' slots among them. Tokens in flight and tokens that wait at
    the boundary are seen as they stand there, those that the deeper layers have cached as they are.
    """
    num_below, slots = below
    layers = range(layer, min(round(scorer.ahead * session.num_layers), session.num_layers - 1))
    num_still = max(0, rows.positions.numel() - scorer.queries)
    still, running = rows.slice(slice(num_still)), rows.slice(slice(num_still, None))
    stash = session.stashes[layer]
    if len(stash):
        live = stash.live
        waiting = Standing(stash.hidden[live], stash.positions[live], torch.full_like(live, -1))
        still = Standing(*map(torch.cat, zip(waiting, still, strict=True)))
        slots = torch.cat([stash.slots[live], slots])
    peaks = rows.hidden.new_zeros(running.positions.numel(), num_below, dtype=torch.float32)
    for attention in run_ahead(pass_, flight, still, running, session.kv, layers):
        peak = attention.mean(0)[:, -slots.numel() :]  # cached tokens come first and need no choosing
        peaks[:, slots] = torch.maximum(peaks[:, slots], peak)
    return peaks
