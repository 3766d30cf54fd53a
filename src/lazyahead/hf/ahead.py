"""Some rows run ahead through deeper layers while the others stand still, to see what they will
attend to there.

States change little from layer to layer: InfiniGen (arXiv 2406.19707) foretells the next layer's
attention from this layer's input. Here the question goes several layers deep, over keys made of the
states that stand at a boundary. The model's own layers are called, with the arguments the model has
called layers of their kind with in this pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lazyahead.cache.kv import LayerKV
from lazyahead.hf.attention import Heads, Rows, attention_of
from lazyahead.hf.segment import Pass, Segment


class FrozenRows(NamedTuple):
    """Tokens at a boundary, as they stand there."""

    hidden: Tensor
    """(T, d) what would enter the layer."""
    positions: Tensor
    """(T,)"""
    entered: Tensor
    """(T,) offset into the tokens of this pass; -1 for those of an earlier one."""

    def slice(self, part: slice) -> FrozenRows:
        return FrozenRows(*(field[part] for field in self))


class _Seen(Exception):  # noqa: N818 (a way out, no error)
    """The keys and values of the tokens that stand still are known: the rest of the layer has
    nothing to do."""


class ScratchKV:
    """Takes the place of a pass's attention while one layer runs ahead."""

    def __init__(self, cached: LayerKV) -> None:
        self.kv = LayerKV()
        if len(cached):
            self.kv.append(cached.keys, cached.values, cached.positions)
        self.positions: Tensor | None = None
        self.runs = False
        self.weights: Tensor | None = None
        """(H, Q, N) what the running rows pay to cached tokens, to those that stand still, and to
        themselves."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, heads: Heads) -> Tensor:
        """As a segment's, with keys and values that nobody keeps."""
        assert self.positions is not None
        self.kv.append(keys, values, self.positions)
        if not self.runs:
            raise _Seen
        rows = Rows(self.positions, int(self.positions[-1]))
        self.weights = attention_of(query, self.kv, rows, heads)
        weights = self.weights.to(values.dtype).view(
            values.shape[1], -1, len(self.kv)
        )  # (H_kv, G * Q, N)
        answers: Tensor = weights @ self.kv.values[0]
        return answers.view(1, query.shape[1], query.shape[2], -1)


def run_ahead(
    pass_: Pass,
    segment: Segment,
    stands: Sequence[FrozenRows],
    running: FrozenRows,
    cached: Sequence[LayerKV],
    layers: range,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each of `layers` that sees everything, the attention (H, Q, N) that the `running` rows pay
    there, and the keys (1, H_kv, N, D). The N tokens: those that the layer has `cached`, then
    those that stand still there (`stands`, one for each layer), then the rows themselves (rising
    positions, the last of the text).

    A layer whose kind was not called yet in this pass is passed by.
    """
    here = pass_.layer
    try:
        for layer, still in zip(layers, stands, strict=True):
            if not pass_.spec.attends_fully[layer] or not pass_.knows_call(layer):
                continue
            pass_.layer, pass_.scratch = layer, ScratchKV(cached[layer])
            if len(still.positions):
                _call(pass_, segment, still)
            pass_.scratch.runs = True
            running = running._replace(hidden=_call(pass_, segment, running))
            assert pass_.scratch.weights is not None
            yield layer, pass_.scratch.weights, pass_.scratch.kv.keys
    finally:
        pass_.layer, pass_.scratch = here, None


def _call(pass_: Pass, segment: Segment, tokens: FrozenRows) -> Tensor:
    """What the layer makes of tokens (T, d); they are returned as they are where it was left early."""
    assert pass_.scratch is not None
    pass_.scratch.positions = tokens.positions
    module: nn.Module = pass_.spec.layers[pass_.layer]
    places, names = pass_.call_for(pass_.layer, segment, tokens.positions, tokens.entered)
    hidden = tokens.hidden[None]
    try:
        output = (
            module(hidden, *places, **names)
            if pass_.is_positional
            else module(hidden_states=hidden, **names)
        )
    except _Seen:
        return tokens.hidden
    rows: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
    return rows
