"""Inner loops in C for bfloat16 on the CPU: `native.c`, compiled once and kept in the cache folder.

Where the processor has no AVX-512 bf16, where there is no C compiler, or where a product here has
other bits than torch's, all of this is left to torch. That is decided once per process, so that a
row has the same bits in every pass.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazyahead.cache.blocks import BLOCK, EXTRA
from lazyahead.cache.kv import BLOCKED_DTYPE
from lazyahead.checks import environment_flag
from lazyahead.folders import cache_folder

ENVIRONMENT = "LAZYAHEAD_NATIVE"
"""0 leaves all to torch."""
LANES = 16
"""Rows are computed in vectors of so many numbers; other widths are left to torch."""
MOST_ROWS = 16
"""Rows of a linear layer that are few."""
_MOST_QUERIES, _MOST_WIDTH = 16, 256
_SOURCE = Path(__file__).with_name("native.c")
_COMPILERS = ("cc", "gcc", "clang")
_EXTENSIONS = (
    *("fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    *("avx512bf16", "avx512vnni"),
)
_NEEDED = ("_is_avx512_bf16_supported", "_is_vnni_supported")
"""What torch must say of the processor; whoever has these has the others."""
_FLAGS = (
    *("-O3", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off"),
    *(f"-m{name}" for name in _EXTENSIONS),
)
Rows = Callable[[Tensor], Tensor]
_POINTER, _NUM, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rms_norm": (*[_POINTER] * 3, _NUM, _NUM, _FLOAT, _FLOAT, _INT, _INT),
    "silu_mul": (*[_POINTER] * 3, _NUM, _NUM, _NUM, _INT),
    "linear_rows": (*[_POINTER] * 4, *[_NUM] * 5, _INT),
    "quantize_rows": (*[_POINTER] * 3, *[_NUM] * 3, _INT),
    "scale_rows": (*[_POINTER] * 5, _NUM, _NUM, _INT),
    "int8_linear_rows": (*[_POINTER] * 6, *[_NUM] * 3, _INT),
    "weigh_rows": (*[_POINTER] * 2, _NUM, _NUM, _INT),
    "dot_rows": (*[_POINTER] * 5, *[_NUM] * 4, _INT),
    "attend_rows": (*[_POINTER] * 6, *[_NUM] * 5, _FLOAT, _INT),
}


def native(dtype: torch.dtype = BLOCKED_DTYPE) -> Native | None:
    """The compiled loops, made at the first call; None where torch does it all. Raises
    ConfigError."""
    return _made() if dtype == BLOCKED_DTYPE else None


@cache
def _made() -> Native | None:
    wanted = environment_flag(ENVIRONMENT)
    has = [getattr(torch.cpu, name, lambda: False) for name in _NEEDED]
    if wanted is False or not all(check() for check in has):
        return None
    path = _compiled()
    if path is None:
        return None
    try:
        loops = Native(ctypes.CDLL(str(path)))
    except OSError:
        return None
    return loops if _has_same_bits(loops) else None


def _compiled() -> Path | None:
    """The library, compiled unless the cache folder holds it; None where that fails."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    source = _SOURCE.read_bytes()
    name = hashlib.sha256(source + " ".join(_FLAGS).encode()).hexdigest()[:16]
    path = cache_folder() / "native" / f"{name}.so"
    if path.exists():
        return path if _is_safe(path) else None
    if compiler is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            made.chmod(0o755)
            os.replace(made, path)
    except (OSError, subprocess.SubprocessError):
        return None
    return path


def _is_safe(path: Path) -> bool:
    """Whether nobody but this user, or root, can have written the file."""
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022


class Native:
    """The loops of `native.c` on tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
        library.attend_rows.restype = _FLOAT
        self._library = library

    def rms_norm(
        self, rows: Tensor, weight: Tensor, epsilon: float, offset: float, rounds: bool
    ) -> Tensor:
        """Rows (..., d), scaled to a mean square of 1, rounded if `rounds`, times the weight (d,)
        plus an offset."""
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        width = rows.shape[-1]
        self._library.rms_norm(
            *(rows.data_ptr(), weight.data_ptr(), out.data_ptr()),
            *(rows.numel() // width, width, epsilon, offset, rounds, torch.get_num_threads()),
        )
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, of rows (1, T, d)."""
        if gate.stride() != up.stride() or gate.stride(-1) != 1:
            gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty(gate.shape, dtype=gate.dtype)
        self._library.silu_mul(
            *(gate.data_ptr(), up.data_ptr(), out.data_ptr()),
            *(gate.shape[1], gate.shape[2], gate.stride(1), torch.get_num_threads()),
        )
        return out

    def linear(self, layers: Sequence[tuple[Tensor, Tensor | None]], part: int) -> Rows:
        """Linear layers that share an input, each with its weight (out, d) and bias, over up to
        `MOST_ROWS` rows (..., d): (..., all outputs). Sums are those of parts of `part` columns.
        The tensors must outlive what is returned."""
        width, sizes = layers[0][0].shape[-1], [weight.shape[0] for weight, _ in layers]
        size, dtype = sum(sizes), layers[0][0].dtype
        starts = [sum(sizes[:index]) * dtype.itemsize for index in range(len(sizes))]
        places = [
            (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), own, start)
            for (weight, bias), own, start in zip(layers, sizes, starts, strict=True)
        ]
        loop = self._library.linear_rows

        def product(rows: Tensor) -> Tensor:
            rows = rows.contiguous()
            out = torch.empty((*rows.shape[:-1], size), dtype=dtype)
            count, threads = rows.numel() // width, torch.get_num_threads()
            source, target = rows.data_ptr(), out.data_ptr()
            for weight, bias, own, start in places:
                loop(source, weight, bias, target + start, count, width, own, size, part, threads)
            return out

        return product

    def quantize_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (T, d) as 8-bit codes, and the scale of each (T, 1)."""
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        count, width = rows.shape
        codes, scales = torch.empty(count, width, dtype=torch.int8), torch.empty(count, 1)
        self._library.quantize_rows(
            *(rows.data_ptr(), codes.data_ptr(), scales.data_ptr()),
            *(count, width, rows.stride(0), torch.get_num_threads()),
        )
        return codes, scales

    def scale_rows(
        self, sums: Tensor, scales: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        """Sums of codes (T, d), each times the scales of its row (T, 1) and of its channel (d,),
        plus the bias (d,), into `out`."""
        self._library.scale_rows(
            *(sums.data_ptr(), scales.data_ptr(), weights.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), out.data_ptr()),
            *(*sums.shape, torch.get_num_threads()),
        )

    def int8_linear(
        self, weight: Tensor, scales: Tensor, offsets: Tensor, bias: Tensor | None
    ) -> Rows:
        """A linear layer of 8-bit weights (out, d), with a scale for each output, over up to
        `MOST_ROWS` rows (..., d). `offsets` (out,): -128 times the sum of each output's codes.
        The tensors must outlive what is returned."""
        size, width = weight.shape
        places = [
            0 if part is None else part.data_ptr() for part in (weight, scales, offsets, bias)
        ]
        loop = self._library.int8_linear_rows

        def product(rows: Tensor) -> Tensor:
            rows = rows.contiguous()
            out = torch.empty((*rows.shape[:-1], size), dtype=rows.dtype)
            count, threads = rows.numel() // width, torch.get_num_threads()
            loop(rows.data_ptr(), *places, out.data_ptr(), count, width, size, threads)
            return out

        return product

    def weigh(self, scores: Tensor) -> Tensor:
        """Contiguous scores (..., W) become weights in place: the sums of rows (..., 1) in fp32."""
        totals = torch.empty((*scores.shape[:-1], 1))
        width = scores.shape[-1]
        self._library.weigh_rows(
            *(scores.data_ptr(), totals.data_ptr()),
            *(totals.numel(), width, torch.get_num_threads()),
        )
        return totals

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """The products (H, R, G, 1) of rows (H, R, G, D) with rows that are spread to them."""
        right = right.expand_as(left)
        out = left.new_empty(*left.shape[:-1], 1)
        if left.stride(-1) != 1 or right.stride(-1) != 1:
            left, right = left.contiguous(), right.contiguous()
        strides = ((_NUM * 3)(*part.stride()[:3]) for part in (left, right))
        (left_strides, right_strides), threads = strides, torch.get_num_threads()
        self._library.dot_rows(
            *(left.data_ptr(), left_strides, right.data_ptr(), right_strides, out.data_ptr()),
            *(*left.shape, threads),
        )
        return out

    def attend_rows(
        self,
        query: Tensor,
        own: Tensor,
        keys: Tensor,
        values: Tensor,
        seen: Tensor,
        scaling: float,
    ) -> tuple[Tensor, float]:
        """Few rows, query (1, H, T, D) and own keys (1, H_kv, T, D), over blocks of keys and
        values: their answers (1, T, H, D_v), and the largest sum of weights. `seen` (T, 2): of each
        row the first slot that it sees, and the one behind the last."""
        (_, num_heads, num_rows, width), num_kv = query.shape, own.shape[1]
        query, own = query.transpose(1, 2).contiguous(), own.transpose(1, 2).contiguous()
        out = torch.empty((1, num_rows, num_heads, values.shape[-1]), dtype=query.dtype)
        most = self._library.attend_rows(
            *(part.data_ptr() for part in (query, own, keys, values, out, seen)),
            *(num_rows, num_kv, num_heads // num_kv, width, values.shape[-1]),
            *(scaling, torch.get_num_threads()),
        )
        return out, most


def fits(groups: int, *widths: int) -> bool:
    """Whether heads of these widths, `groups` to a key head, can be computed."""
    are_whole = all(width % LANES == 0 and width <= _MOST_WIDTH for width in widths)
    return are_whole and groups <= _MOST_QUERIES


def _has_same_bits(loops: Native) -> bool:
    """Whether one row has the bits that torch's products give it, measured: a millisecond."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(BLOCKED_DTYPE)

    for groups, width in ((1, 64), (3, 64), (4, 256), (2, 48)):
        keys, values = drawn(1, 2, BLOCK, width + EXTRA), drawn(1, 2, BLOCK, width)
        keys[..., width], keys[..., width + 1] = -1, 0
        query, own = drawn(1, 2 * groups, 1, width), keys[0, :, -1:, :width][None]
        scaling = width**-0.5
        seen = torch.tensor([[0, BLOCK]])
        answer, _ = loops.attend_rows(query, own, keys, values, seen, scaling)
        folded = (query * scaling).view(2, 1, groups, width)
        firsts = (own[0, :, None], keys[0, :, None, :1, :width])
        shift = torch.maximum(*(loops.dot(folded, key) for key in firsts))
        rows = torch.cat([folded, shift, shift], -1)[:, 0]
        weights = torch.bmm(rows, keys[0].transpose(1, 2))
        totals = loops.weigh(weights)
        wanted = (torch.bmm(weights, values[0]).float() / totals).to(query.dtype)
        if not torch.equal(answer.view_as(wanted), wanted):
            return False
    return True
