"""From how many rows on a product on the CPU gives each row the same bits in any company."""

from __future__ import annotations

import torch

from lazyahead.cache.kv import BLOCKED_DTYPES

FEWEST_ROWS = 4
"""Measured with torch 2.13 on AVX-512: in bf16, a row alone is summed in another order where the
sum is longer than 1,024, two rows now and then where the outputs are few; fp32 products of one to
three rows always are."""


def fewest_rows(device: torch.device, dtype: torch.dtype) -> int:
    """How many rows a pass must have at least, so that a row's bits do not depend on the others. 1
    where nothing is known of device and dtype."""
    return FEWEST_ROWS if device.type == "cpu" and dtype in BLOCKED_DTYPES else 1
