"""RMSNorm, SiLU-gated products, and linear layers and attention of few rows on NVIDIA GPUs, in a
kernel or two each (`triton_kernels.py`). Of few rows each has the same bits in any company.

Where there is no Triton, where the GPU is older than Ampere, or where a kernel fails or computes
something else than torch, all of this is left to torch. That is decided once per device and dtype.
Kernels are compiled when a model is loaded: whoever makes a product here has run it once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from lazyahead.checks import environment_flag
from lazyahead.hf.native import ENVIRONMENT, LANES, MOST_ROWS, Rows

DTYPES = (torch.bfloat16, torch.float16)
MOST_LAYERS = 3
"""Linear layers of one product."""
_OLDEST = (8, 0)
"""Compute capability from which on tensor cores know bfloat16."""
_ALIGNED = 16
"""Bytes at whose multiples rows begin: kernels are compiled for it."""
_FEW_OUTPUTS = 8192
"""Up to so many, the programs of a product are smaller."""
_SILU_COLUMNS = 1024
_MOST_WIDTH = 256
"""Of an attention head."""
_KEYS = 128
"""Keys that a program attends to: half as many of heads wider than this."""
_PARTS = 16
"""Parts of the keys that are merged at once."""

log = logging.getLogger(__name__)


def triton_loops(like: Tensor) -> TritonLoops | None:
    """The kernels for tensors like this one, tried at the first call; None where torch does it all.
    Raises ConfigError for a wrong `LAZYAHEAD_NATIVE`."""
    is_known = like.device.type == "cuda" and like.dtype in DTYPES
    return _made(like.device, like.dtype) if is_known else None


@cache
def _made(device: torch.device, dtype: torch.dtype) -> TritonLoops | None:
    wanted = environment_flag(ENVIRONMENT)
    is_amd = torch.version.hip is not None
    if wanted is False or is_amd or torch.cuda.get_device_capability(device) < _OLDEST:
        return None
    try:
        from lazyahead.hf import triton_kernels

        loops = TritonLoops(triton_kernels)
        if _computes_the_same(loops, device, dtype):
            return loops
        log.warning("Triton's kernels compute something else than torch's here: torch's are used")
    except ImportError:
        pass
    except Exception as error:  # of Triton's compiler, of the C compiler it calls, of the driver
        log.warning("kernels are torch's, since Triton's do not run here: %s", error)
    return None


class TritonLoops:
    """The kernels on tensors, as `Native` has them for the CPU."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def rms_norm(
        self, rows: Tensor, weight: Tensor, epsilon: float, offset: float, rounds: bool
    ) -> Tensor:
        """Rows (..., d), scaled to a mean square of 1, rounded if `rounds`, times the weight (d,)
        plus an offset."""
        rows = _aligned(rows)
        out, width = torch.empty_like(rows), rows.shape[-1]
        columns = _power_of_two(width)
        with _on(rows):
            self._kernels.rms_norm_rows[(rows.numel() // width,)](
                *(rows, weight, out, epsilon, width),
                OFFSET=offset,
                ROUNDS=rounds,
                COLUMNS=columns,
                num_warps=min(8, max(1, columns // 512)),
            )
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, of rows (1, T, d)."""
        if gate.stride() != up.stride() or gate.stride(-1) != 1:
            gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _, num_rows, width = gate.shape
        with _on(gate):
            self._kernels.silu_mul_rows[(num_rows, -(-width // _SILU_COLUMNS))](
                *(gate, up, out, gate.stride(1), width), COLUMNS=_SILU_COLUMNS, num_warps=4
            )
        return out

    def linear(self, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Rows:
        """Up to `MOST_LAYERS` linear layers that share an input, each with its weight (out, d) and
        bias (all have one or none has), over up to `MOST_ROWS` rows (..., d): (..., all outputs).
        A row has the same bits in any company."""
        sizes, width = [weight.shape[0] for weight, _ in layers], layers[0][0].shape[1]
        total, dtype = sum(sizes), layers[0][0].dtype
        has_bias, num = layers[0][1] is not None, len(layers)
        filled = [*layers, *[layers[0]] * (MOST_LAYERS - num)]
        weights = [weight.detach() for weight, _ in filled]
        biases = [
            weight if bias is None else bias.detach()  # one that is not read
            for weight, (_, bias) in zip(weights, filled, strict=True)
        ]
        outputs, columns, num_warps, num_stages = _blocks(total)
        grid = (sum(-(-size // outputs) for size in sizes),)
        places = (*sizes, *[0] * (MOST_LAYERS - num))

        def product(rows: Tensor) -> Tensor:
            if rows.dtype != dtype:  # as under autocast
                return torch.cat([linear(rows, *layer) for layer in layers], -1)
            rows = _aligned(rows)
            out = torch.empty((*rows.shape[:-1], total), dtype=dtype, device=rows.device)
            with _on(rows):
                self._kernels.linear_rows[grid](
                    *(rows, *weights, *biases, out, rows.numel() // width, width, *places),
                    NUM=num,
                    HAS_BIAS=has_bias,
                    IS_EVEN=width % columns == 0,
                    ROWS=MOST_ROWS,
                    OUTPUTS=outputs,
                    COLUMNS=columns,
                    num_warps=num_warps,
                    num_stages=num_stages,
                )
            return out

        product(torch.zeros(1, width, dtype=dtype, device=weights[0].device))
        return product

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention of R rows, query (1, H, R, D), over keys and values (1, H_kv, N, D) that
        `can_attend`: (1, H, R, D_v). `bias` (G * R, N) is added to the logits. Keys that it hides
        change no bits, wherever they stand behind those that are seen."""
        if query.stride(-1) != 1:
            query = query.contiguous()
        (_, num_heads, num_rows, width), (_, num_kv, num_keys, value_width) = (
            query.shape,
            values.shape,
        )
        num_queries = num_heads // num_kv * num_rows
        size = _KEYS if max(width, value_width) <= _KEYS else _KEYS // 2
        num_parts, num_blocks = -(-num_keys // size), -(-num_queries // MOST_ROWS)
        shape = (num_heads * num_rows, num_parts)
        sums = query.new_empty((*shape, value_width), dtype=torch.float32)
        tops, totals = sums.new_empty(shape), sums.new_empty(shape)
        out = query.new_empty(1, num_rows, num_heads, value_width)
        columns, value_columns = _power_of_two(width), _power_of_two(value_width)
        shown = query if bias is None else bias  # one that is not read
        with _on(query):
            self._kernels.attend_parts[(num_parts, num_blocks, num_kv)](
                *(query, keys, values, shown, sums, tops, totals, num_queries, num_rows, num_keys),
                *(int(bias is not None), shown.stride(0), query.stride(1), query.stride(2)),
                *(keys.stride(1), values.stride(1), scaling),
                WIDTH=width,
                VALUE_WIDTH=value_width,
                COLUMNS=columns,
                VALUE_COLUMNS=value_columns,
                ROWS=MOST_ROWS,
                KEYS=size,
                num_warps=4,
            )
            self._kernels.merge_parts[(num_heads * num_rows,)](
                *(sums, tops, totals, out, num_rows, num_heads, num_parts),
                VALUE_WIDTH=value_width,
                VALUE_COLUMNS=value_columns,
                PARTS=_PARTS,
                num_warps=4,
            )
        return out.transpose(1, 2)


def _blocks(total: int) -> tuple[int, int, int, int]:
    """Outputs and columns that a program computes at once, its warps, and how many such parts of a
    weight are on their way: fastest on an H200 of a dozen each, for the layers of Llama 2 7B. It
    depends on the layer alone, so that a row's bits do."""
    return (16, 512, 2, 3) if total <= _FEW_OUTPUTS else (64, 128, 4, 4)


def fits(weight: Tensor) -> bool:
    """Whether `linear` is for a weight (out, d): one whose rows are all aligned."""
    return weight.shape[0] > 1 and weight.shape[1] % LANES == 0


def can_attend(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` is for this: few rows, keys and values that lie in one row."""
    widths = (query.shape[-1], values.shape[-1])
    return (
        query.shape[2] <= MOST_ROWS
        and all(width % LANES == 0 and width <= _MOST_WIDTH for width in widths)
        and all(part.dtype == query.dtype for part in (keys, values))
        and all(part.stride()[2:] == (part.shape[3], 1) for part in (keys, values))
    )


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous, and in memory where kernels expect it."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % _ALIGNED == 0 else rows.clone()


def _on(rows: Tensor) -> AbstractContextManager[object]:
    """Inside, kernels are launched where the rows are."""
    return torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()


def _power_of_two(width: int) -> int:
    return 1 << max(0, width - 1).bit_length()


@torch.no_grad()
def _computes_the_same(loops: TritonLoops, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all kernels compute what torch does, and a row what it does among others: a
    millisecond, once they are compiled."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def product_is_torchs(width: int, *sizes: int) -> bool:
        rows, weights = drawn(MOST_ROWS, width), [drawn(size, width) for size in sizes]
        product = loops.linear([(weight, None) for weight in weights])
        found, wanted = product(rows), linear(rows, torch.cat(weights))
        alone = [product(rows[i : i + 1]) for i in range(MOST_ROWS)]
        return torch.equal(found, torch.cat(alone)) and _are_near(found, wanted)

    gate, up = drawn(1, MOST_ROWS, 1152).split_with_sizes([576, 576], -1)
    query, keys, values = drawn(1, 8, 5, 64), drawn(1, 2, 300, 64), drawn(1, 2, 300, 64)
    found = loops.attend(query, keys, values, None, 0.125)
    alone = [loops.attend(query[:, :, i : i + 1], keys, values, None, 0.125) for i in range(5)]
    heads = keys.repeat_interleave(4, 1), values.repeat_interleave(4, 1)
    return (
        product_is_torchs(576, 96, 48)
        and product_is_torchs(512, _FEW_OUTPUTS + 16)
        and _are_near(loops.silu_mul(gate, up), silu(gate) * up)
        and torch.equal(found, torch.cat(alone, 2))
        and _are_near(found, scaled_dot_product_attention(query, *heads))
    )


def _are_near(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours.float(), theirs.float(), rtol=2**-6, atol=2**-3)
