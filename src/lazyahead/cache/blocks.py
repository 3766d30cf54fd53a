"""Keys or values in blocks of slots, laid out as batched products want them."""

from __future__ import annotations

import math

from torch import Tensor

BLOCK = 512
"""Slots per block. The bits of an attention row depend on it."""
EXTRA = 2
"""Columns behind each key: -1 and 0, as products over an odd width are slow."""
_SLACK = 256
"""Free slots behind a first append, so that a short answer never moves it."""
_STEP = 16
"""Buffers double up to this many blocks at a time."""


class Blocks:
    """Rows of keys or values by slot, (blocks, H_kv, BLOCK, width), zeros where nothing is.

    Block-major because a batched product takes it without a copy. Behind each key stand `EXTRA`
    more columns."""

    __slots__ = ("_buffer", "_extra", "_len")

    def __init__(self, *, for_keys: bool = False) -> None:
        self._buffer: Tensor | None = None
        self._extra = EXTRA if for_keys else 0
        self._len = 0

    def __len__(self) -> int:
        return self._len

    @property
    def blocks(self) -> Tensor:
        """(blocks, H_kv, BLOCK, width), those that hold a slot. Raises RuntimeError before
        the first append."""
        if self._buffer is None:
            raise RuntimeError("nothing was appended yet")
        return self._buffer[: math.ceil(self._len / BLOCK)]

    @property
    def num_heads(self) -> int:
        """H_kv. Raises RuntimeError before the first append."""
        return self.blocks.shape[1]

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def append(self, rows: Tensor) -> None:
        """Copies `rows` (1, H_kv, T, D) behind the last slot."""
        self.write(self._len, rows)

    def write(self, start: int, rows: Tensor) -> None:
        """Copies `rows` (1, H_kv, T, D) to slots `start` and on; what is filled then reaches at
        least to their end."""
        end = start + rows.shape[2]
        buffer = self._reserve(end, rows)
        done = start
        if end == start + 1:  # the common case, with few calls
            buffer[start // BLOCK, :, start % BLOCK, : rows.shape[3]] = rows[0, :, 0]
            done = end
        while done < end:
            block, inner = divmod(done, BLOCK)
            size = min(BLOCK - inner, end - done)
            if inner == 0 and end - done >= BLOCK:  # whole blocks at once
                count = (end - done) // BLOCK
                size = count * BLOCK
                part = rows[0, :, done - start : done - start + size]
                whole = part.reshape(part.shape[0], count, BLOCK, -1).transpose(0, 1)
                buffer[block : block + count, ..., : rows.shape[3]] = whole
            else:
                part = rows[0, :, done - start : done - start + size]
                buffer[block, :, inner : inner + size, : rows.shape[3]] = part
            done += size
        self._len = max(self._len, end)

    def at(self, slots: Tensor) -> Tensor:
        """(n, H_kv, D) the rows at `slots` (n,), without the extra columns."""
        rows = self.wide_at(slots)
        return rows[..., : rows.shape[-1] - self._extra]

    def wide_at(self, slots: Tensor) -> Tensor:
        """(n, H_kv, width) the rows at `slots` (n,), as stored."""
        return self.blocks[slots // BLOCK, :, slots % BLOCK]

    def keep(self, base: int, slots: Tensor) -> None:
        """Keeps the first `base` slots and, behind them, those at `slots` (rising, all >= base)."""
        if slots.numel() and int(slots[-1]) != base + slots.numel() - 1:  # else they stand there
            chosen = self.at(slots)
            self.write(base, chosen.transpose(0, 1)[None])
        self._len = base + slots.numel()

    def cut(self, length: int) -> None:
        """Forgets the slots behind the first `length`."""
        self._len = min(self._len, length)

    def dense(self) -> Tensor:
        """(1, H_kv, N, D) all slots in a row, a copy where there are several blocks."""
        rows = self.blocks.transpose(0, 1).flatten(1, 2)[:, : self._len]
        return rows[None, ..., : rows.shape[-1] - self._extra]

    def _reserve(self, need: int, like: Tensor) -> Tensor:
        old = 0 if self._buffer is None else self._buffer.shape[0]
        if self._buffer is None or need > old * BLOCK:
            count = max(-(-(need + _SLACK) // BLOCK), old + min(old, _STEP))
            buffer = like.new_zeros(count, like.shape[1], BLOCK, like.shape[3] + self._extra)
            if self._extra:
                buffer[..., like.shape[3]] = -1
            if self._buffer is not None:
                buffer[:old] = self._buffer
            self._buffer = buffer
        return self._buffer
