"""From how many rows on a product on the CPU gives each row the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from lazyahead.cache.blocks import BLOCK
from lazyahead.cache.kv import BLOCKED_DTYPE

FEWEST_ROWS = 4
"""Measured with torch 2.13 on AVX-512: in bf16, a row alone is summed in another order where the
sum is longer than 1,024, two rows now and then where the outputs are few."""


def fewest_rows(device: torch.device, dtype: torch.dtype) -> int:
    """How many rows a pass must have at least, so that a row's bits do not depend on the others. 1
    where that decides no token (fp32), or nothing is known of the device."""
    return FEWEST_ROWS if device.type == "cpu" and dtype == BLOCKED_DTYPE else 1


@torch.no_grad()
def is_steady() -> bool:
    """Whether this processor's bf16 products of at least `FEWEST_ROWS` rows give a row the same
    bits in any company, measured: some milliseconds."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(BLOCKED_DTYPE)

    for width, height in ((576, 192), (576, 1536), (1536, 576), (4096, 128)):
        if not _same(partial(linear, weight=drawn(height, width)), drawn(64, width)):
            return False
    keys, rows = drawn(3, 66, BLOCK), drawn(64, 3, 66)
    return _same(lambda part: torch.bmm(part.transpose(0, 1), keys).transpose(0, 1), rows)


def _same(product: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether the first rows alone give what they give among all."""
    whole = product(rows)
    counts = (FEWEST_ROWS, FEWEST_ROWS + 1, 7, 16, 33)
    return all(torch.equal(product(rows[:count]), whole[:count]) for count in counts)
