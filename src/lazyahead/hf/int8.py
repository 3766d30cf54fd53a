"""Linear layers in 8-bit integers on the CPU (W8A8): weights with a scale for each output channel,
activations with one for each row, found as the row comes.

Sums of integers have no order, so a row has the same bits in any company.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lazyahead.hf.few_rows import fits
from lazyahead.hf.native import native

MOST = 127
"""Codes go from -127 to 127."""
_AT_ONCE = 256
"""Rows whose sums stay in the processor's cache; measured."""


class Int8Weights:
    """The weights of a linear layer in 8 bits, and the layer over rows in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Weight (out, in), bias (out,)."""
        self._codes, scales = _quantized(weight.float())
        self._scales = scales[:, 0].contiguous()
        self._offsets = self._codes.sum(1, dtype=torch.int32).mul_(-MOST - 1)
        self._bias = None if bias is None else bias.float()
        loops = native() if fits(*weight.shape) else None
        weights = (self._codes, self._scales, self._offsets, self._bias)
        self.few = None if loops is None else loops.int8_linear(*weights)
        """The layer over up to `MOST_ROWS` rows; None where there is no loop for it."""
        self.nbytes = self._codes.nbytes

    def many(self, input: Tensor) -> Tensor:
        """The layer over any number of rows (..., in), with the same bits."""
        rows = input.reshape(-1, input.shape[-1])
        out = torch.empty(rows.shape[0], len(self._codes), dtype=torch.bfloat16)
        for start in range(0, rows.shape[0], _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            codes, scales = _quantized_rows(rows[part])
            sums = torch._int_mm(codes, self._codes.T)
            self._scale(sums, scales, out[part])
        return out.view(*input.shape[:-1], len(self._codes))

    def _scale(self, sums: Tensor, scales: Tensor, out: Tensor) -> None:
        """Sums (T, out) as numbers; `scales` (T, 1) of the rows."""
        loops = native()
        if loops is not None:
            loops.scale_rows(sums, scales, self._scales, self._bias, out)
            return
        scaled = sums.float().mul_(self._scales).mul_(scales)
        out.copy_(scaled if self._bias is None else scaled.add_(self._bias))


def _quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows (T, d) in bfloat16, and the scale of each (T, 1)."""
    loops = native(rows.dtype)
    return _quantized(rows.float()) if loops is None else loops.quantize_rows(rows)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows (T, d) in fp32, and the scale of each (T, 1): its largest number over 127."""
    top = rows.abs().amax(-1, keepdim=True)
    inverse = torch.where(top == 0, 0, torch.full_like(top, MOST) / top)
    return torch.round(rows * inverse).to(torch.int8), top / MOST


@cache
def why_not() -> str | None:
    """Why there are no 8-bit products on this processor with this torch; None where there are."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((48, 640), (9, 640))
    weights, rows = (
        torch.randint(-MOST, MOST + 1, shape, generator=generator, dtype=torch.int8)
        for shape in shapes
    )
    weights[0] = rows[0] = MOST  # where sums of 16 bits would overflow
    try:
        found = [torch._int_mm(rows[:count], weights.T) for count in (1, len(rows))]
    except RuntimeError as error:
        return f"torch has no 8-bit products on this processor ({error})"
    wanted = rows.int() @ weights.int().T
    if not all(torch.equal(sums, wanted[: len(sums)]) for sums in found):
        return "8-bit products overflow on this processor"
    return None
