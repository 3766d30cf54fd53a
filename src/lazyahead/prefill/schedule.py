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
        """Tokens of a prompt of `num_tokens` that go on: at least one, at most all."""
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
