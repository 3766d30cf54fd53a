"""How many prompt tokens go on at which layer, and what that saves. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

Schedule = tuple[tuple[float, float], ...]
"""Pairs of depth (fraction of the layers already passed) and keep ratio (fraction of the prompt
that goes on)."""


class Boundary(NamedTuple):
    """The entry to `layer`, where `keep_ratio` of the prompt goes on."""

    layer: int
    keep_ratio: float

    def keep_count(self, num_tokens: int) -> int:
        """Tokens of a prompt of `num_tokens` that go on: at least one, never more than there are."""
        return max(1, min(num_tokens, ceil(self.keep_ratio * num_tokens)))


def boundaries(
    schedule: Schedule, attends_fully: Sequence[bool], needs_attention: bool = True
) -> tuple[Boundary, ...]:
    """Places a schedule on a model's layers.

    `attends_fully[l]` says that layer l attends to every earlier token. The layer below a boundary
    must, or no token beyond its window could be scored: a boundary moves to the nearest earlier
    layer where that holds, else to the nearest later one. Two pairs that land on the same layer
    become the stricter one. A scorer that reads no attention may cut at layer 0.
    """
    num_layers = len(attends_fully)
    placed: dict[int, float] = {}
    for depth, keep_ratio in schedule:
        layer = max(int(needs_attention), min(num_layers - 1, round(depth * num_layers)))
        if needs_attention and any(attends_fully[:-1]):
            fit = [at for at in range(1, num_layers) if attends_fully[at - 1]]
            earlier = [at for at in fit if at <= layer]
            layer = earlier[-1] if earlier else fit[0]
        placed[layer] = min(keep_ratio, placed.get(layer, 1.0))
    return tuple(Boundary(layer, placed[layer]) for layer in sorted(placed) if layer < num_layers)


def local_layers(placed: Sequence[Boundary], num_layers: int, local_from: float) -> range:
    """The layers in which all rows but the last ones attend to a window only: from the depth
    `local_from` to the first boundary; none where nothing is cut."""
    cuts = [boundary.layer for boundary in placed if boundary.keep_ratio < 1]
    return range(round(local_from * num_layers), cuts[0]) if cuts else range(0)


def kept_by_layer(placed: Sequence[Boundary], num_layers: int, num_tokens: int) -> tuple[int, ...]:
    """Prompt tokens computed at each layer by a prefill of `num_tokens`."""
    counts = [num_tokens] * num_layers
    for boundary in placed:
        for layer in range(boundary.layer, num_layers):
            counts[layer] = min(counts[layer], boundary.keep_count(num_tokens))
    return tuple(counts)


class LayerShape(NamedTuple):
    """What one decoder layer costs: weights that each token multiplies with, and width of its
    attention."""

    num_weights: int
    attention_width: int
    """Heads times head dimension of the queries."""
    num_projected: int = 0
    """Those of the weights that make queries, keys and values."""


def num_local_layers(placed: Sequence[Boundary], num_layers: int, score_from_depth: float) -> int:
    """How many of the first layers may look only at what is near: where anything is cut, those
    before the first boundary, and before the depth from which scorers look far."""
    if all(boundary.keep_ratio == 1 for boundary in placed):
        return 0
    return min(*(boundary.layer for boundary in placed), round(score_from_depth * num_layers))


def prefill_flops(
    counts: Sequence[int], shape: LayerShape, near: int = 0, num_near: int = 0
) -> float:
    """Floating-point operations of a prefill that computes `counts[l]` tokens at layer l, causal
    attention included.

    In the first `num_near` layers a token attends to `near` tokens, if `near` is not 0.
    """
    per_token = 2.0 * shape.num_weights
    spans = [min(n, near) if near and layer < num_near else n for layer, n in enumerate(counts)]
    pairs = [n * span - span * span / 2 for n, span in zip(counts, spans, strict=True)]
    return sum(
        n * per_token + 4.0 * pair * shape.attention_width
        for n, pair in zip(counts, pairs, strict=True)
    )


def ahead_flops(
    placed: Sequence[Boundary],
    counts: Sequence[int],
    shape: LayerShape,
    ahead: float,
    score_from_depth: float = 0.0,
) -> float:
    """What scorers that run ahead to the depth `ahead` add: queries, keys and values of all that
    stands at a boundary, at each layer on the way from `score_from_depth` on. The few rows that
    run cost next to nothing."""
    until, first = (
        min(round(ahead * len(counts)), len(counts) - 1),
        round(score_from_depth * len(counts)),
    )
    standing = sum(
        counts[at.layer - 1] * max(0, until - max(first, at.layer))
        for at in placed
        if at.keep_ratio < 1
    )
    return 2.0 * standing * shape.num_projected
