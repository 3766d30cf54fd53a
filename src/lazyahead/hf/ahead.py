"""Some rows run ahead through deeper layers while the rest of the prompt stays at a boundary.

Hidden states change little from layer to layer: InfiniGen (arXiv 2406.19707) approximates the next
layer's attention from this layer's input. Here the last rows go several layers deep, over keys
made of the hidden states at the boundary. The model's own layers are called, with the arguments
that the model has called layers of their kind with in this pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lazyahead.cache.kv import LayerKV
from lazyahead.hf.attention import AttentionParams, QueryRows, attention_weights, reduce_heads
from lazyahead.hf.batch import Batch
from lazyahead.hf.segment import Rows, Segment


class AheadLayer(NamedTuple):
    """What one layer gave to rows that ran ahead."""

    layer: int
    weights: Tensor
    """(Q, N) attention of the running rows to the layer's cached tokens, then to the tokens at the
    boundary, then to themselves; mean over heads."""
    keys: Tensor
    """(1, H_kv, N, D)"""


class _KeysKnown(Exception):  # noqa: N818 (a way out, no error)
    """Keys and values of the tokens at the boundary are known: the rest of the layer is skipped."""


class ScratchKV:
    """Takes the place of a pass's cache while one layer runs ahead."""

    def __init__(self, cached: LayerKV, positions: Tensor) -> None:
        self.kv = LayerKV()
        if len(cached):
            self.kv.append(cached.keys, cached.values, cached.positions)
        self.positions = positions
        """Of the rows that the layer is called with next."""
        self.needs_output = False
        self.weights: Tensor | None = None

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams
    ) -> Tensor:
        """As `Segment.attend`, with keys and values that are thrown away."""
        self.kv.append(keys, values, self.positions)
        if not self.needs_output:
            raise _KeysKnown
        rows = QueryRows(self.positions, int(self.positions[-1]))
        weights = attention_weights(query, self.kv, rows, params)  # (H, Q, N)
        self.weights = reduce_heads(weights, "mean")
        grouped = weights.to(values.dtype).view(values.shape[1], -1, len(self.kv))
        output: Tensor = grouped @ self.kv.values[0]  # (H_kv, G * Q, D_v)
        return output.view(1, query.shape[1], query.shape[2], -1)


def run_ahead(
    batch: Batch,
    segment: Segment,
    frozen: Sequence[Rows],
    running: Rows,
    cached: Sequence[LayerKV],
    layers: range,
) -> Iterator[AheadLayer]:
    """Lets `running` rows (the last of the text, rising positions) go through `layers`.

    `frozen` are the tokens that stay at the boundary, one entry for each layer. Layers with a
    window, and layers whose kind was not called yet in this pass, are skipped.
    """
    here = batch.layer
    try:
        for layer, still in zip(layers, frozen, strict=True):
            if not batch.spec.attends_fully[layer] or not batch.knows_call(layer):
                continue
            batch.layer = layer
            scratch = ScratchKV(cached[layer], still.positions)
            batch.scratch = scratch
            if len(still.positions):
                _call(batch, segment, still)
            scratch.positions = running.positions
            scratch.needs_output = True
            running = running._replace(hidden=_call(batch, segment, running))
            assert scratch.weights is not None
            yield AheadLayer(layer, scratch.weights, scratch.kv.keys)
    finally:
        batch.layer = here
        batch.scratch = None


def _call(batch: Batch, segment: Segment, rows: Rows) -> Tensor:
    """The layer's output (T, d) for rows; the rows as they are where it was left early."""
    module: nn.Module = batch.spec.layers[batch.layer]
    args, named = batch.call_for(batch.layer, segment, rows.positions, rows.entered)
    hidden = rows.hidden[None]
    try:
        if batch.is_positional:
            output = module(hidden, *args, **named)
        else:
            output = module(hidden_states=hidden, **named)
    except _KeysKnown:
        return rows.hidden
    states: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
    return states
