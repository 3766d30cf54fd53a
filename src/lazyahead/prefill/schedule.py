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

    `attends_fully[l]` says that layer l sees every earlier token. A boundary whose layer below sees
    only a window would be blind beyond it, so it moves down to the next layer whose predecessor
    sees everything, if there is one. Two pairs that land on the same layer become the stricter one.
    A scorer that looks at no attention may cut at layer 0.
    """
    num_layers = len(attends_fully)
    placed: dict[int, float] = {}
    for depth, keep_ratio in schedule:
        layer = max(int(needs_attention), min(num_layers - 1, round(depth * num_layers)))
        if needs_attention and any(attends_fully):
            layer = next((at for at in range(layer, num_layers) if attends_fully[at - 1]), layer)
        placed[layer] = min(keep_ratio, placed.get(layer, 1.0))
    return tuple(
        Boundary(layer, placed[layer]) for layer in sorted(placed) if 0 <= layer < num_layers
    )


def kept_by_layer(placed: Sequence[Boundary], num_layers: int, num_tokens: int) -> tuple[int, ...]:
    """Prompt tokens computed at each layer by a prefill of `num_tokens`."""
    counts = [num_tokens] * num_layers
    for boundary in placed:
        for layer in range(boundary.layer, num_layers):
            counts[layer] = min(counts[layer], boundary.keep_count(num_tokens))
    return tuple(counts)


def num_local_layers(placed: Sequence[Boundary], num_layers: int, score_from_depth: float) -> int:
    """How many of the first layers attend within the local window: those before the first boundary
    and before `score_from_depth`; none where nothing is pruned."""
    if all(boundary.keep_ratio == 1 for boundary in placed):
        return 0
    return min(*(boundary.layer for boundary in placed), round(score_from_depth * num_layers))
