"""Llama 4 scales the queries of its layers without rotary positions by their place in the pass;
here it is their position in the text that counts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def tuned_modules(layers: Sequence[nn.Module]) -> frozenset[nn.Module]:
    """The attention modules that scale queries so."""
    return frozenset(
        module
        for layer in layers
        for module in layer.modules()
        if getattr(module, "attn_temperature_tuning", False)
        and not getattr(module, "use_rope", True)
    )


@contextmanager
def untuned(modules: Collection[Any]) -> Iterator[None]:
    """Inside, modules leave their queries as they are: scaled twice, they would be rounded twice,
    and their bits would depend on where a text was cut."""
    before = [(module, module.attn_temperature_tuning) for module in modules]
    try:
        for module in modules:
            module.attn_temperature_tuning = False
        yield
    finally:
        for module, value in before:
            module.attn_temperature_tuning = value


def tuned(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """Query (1, H, T, D), scaled by the positions (T,)."""
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    scales = torch.log1p(steps) * module.attn_scale + 1.0
    scaled: Tensor = query.float() * scales[:, None]
    return scaled.to(query.dtype)
