"""Linear layers over few rows in bfloat16 on the CPU, as fast as memory gives the weights, with the
bits that the same rows have among many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lazyahead.hf.native import LANES, MOST_ROWS, native

MOST_WIDTH = 1 << 15
_PARTS = (512, 1024)
"""Columns that oneDNN sums before it adds the sums up: of narrow rows, of wide ones."""
_NUM_SHOWN = 2**19
"""Outputs that show the order of summation: in another one, one of 50,000 or more differs."""
_FIRST_COUNTS = tuple(range(1, MOST_ROWS))
"""Rows of the first passes that are compared; then there are the most."""
_MOST_OUTPUTS = 2**14
"""Outputs that stand for more."""


def few_rows(layers: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor] | None:
    """Up to `native.MOST_ROWS` rows (..., d) through layers that share an input: the outputs of
    all, side by side. None where that has other bits than torch's product of many rows. The layers
    must outlive it, with the weights that they have now."""
    loops = native(layers[0].weight.dtype)
    shapes = [layer.weight.shape for layer in layers]
    if loops is None or not all(fits(*shape) for shape in shapes):
        return None
    has_bias = layers[0].bias is not None
    parts = {_part(*shape, has_bias, torch.get_num_threads()) for shape in shapes}
    part = parts.pop()
    if parts or part is None:
        return None
    return loops.linear([(layer.weight, layer.bias) for layer in layers], part)


def fits(size: int, width: int) -> bool:
    """Whether the loops know a weight (size, width)."""
    return size % LANES == 0 and width % LANES == 0 and width <= MOST_WIDTH


@cache
@torch.no_grad()
def _part(size: int, width: int, has_bias: bool, num_threads: int) -> int | None:
    """The columns that torch's product sums before it adds the sums up, measured once: some
    milliseconds. None where it goes another way."""
    loops = native()
    assert loops is not None
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    size = min(size, _MOST_OUTPUTS)
    num_full = -(-_NUM_SHOWN // (size * MOST_ROWS))
    counts = [*_FIRST_COUNTS, *[MOST_ROWS] * max(num_full, MOST_ROWS)]
    rows, weight = drawn(sum(counts), width), drawn(size, width)
    bias = drawn(size) if has_bias else None
    wanted = linear(rows, weight, bias).split_with_sizes(counts)
    few = rows.split_with_sizes(counts)
    for part in _PARTS:
        if all(map(torch.equal, map(loops.linear([(weight, bias)], part), few), wanted)):
            return part
    return None
