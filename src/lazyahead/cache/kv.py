"""Keys and values of one request at one layer, each with its position, in a buffer that grows ahead
of need."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lazyahead.cache.blocks import Blocks

BLOCKED_DTYPE = torch.bfloat16
"""What the CPU computes in blocks: a row's last bits must not depend on its company, as in bf16
they decide which token is likeliest. In fp32 they do not, and torch's own attention is faster."""
_SLACK = 256
"""Free slots behind a prompt, so that a short answer never moves it."""
_STEP = 4096
"""Buffers double up to this much at a time: beyond it, doubling a long prompt would waste more than
copying costs."""


class GrowableTensor:
    """Rows of a tensor along one dimension, appended in place. `capacity` rows are allocated, `len`
    are filled."""

    __slots__ = ("_buffer", "_len", "dim")

    def __init__(self, dim: int = 0) -> None:
        self._buffer: Tensor | None = None
        self._len = 0
        self.dim = dim

    def __len__(self) -> int:
        return self._len

    @property
    def rows(self) -> Tensor:
        """The filled part, a view. Raises RuntimeError before the first append."""
        if self._buffer is None:
            raise RuntimeError("nothing was appended yet")
        return self._buffer.narrow(self.dim, 0, self._len)

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def buffer(self) -> Tensor:
        """All allocated rows, a view. Raises RuntimeError before the first append."""
        if self._buffer is None:
            raise RuntimeError("nothing was appended yet")
        return self._buffer

    def reserve(self, length: int) -> None:
        """Allocates at least `length` rows."""
        if length > self.buffer.shape[self.dim]:
            self._grow(length, self.rows)

    def extend(self, num: int) -> None:
        """Counts `num` allocated rows as filled, which were written to `buffer`."""
        self._len += num

    def append(self, rows: Tensor) -> None:
        """Copies `rows` behind the filled part."""
        self.write(self._len, rows)

    def write(self, start: int, rows: Tensor) -> None:
        """Copies `rows` to places `start` and on; the filled part then reaches at least to their
        end."""
        end = start + rows.shape[self.dim]
        if self._buffer is None or end > self._buffer.shape[self.dim]:
            self._grow(end, rows)
        assert self._buffer is not None
        self._buffer.narrow(self.dim, start, rows.shape[self.dim]).copy_(rows)
        self._len = max(self._len, end)

    def scatter(self, places: Tensor, rows: Tensor, end: int) -> None:
        """Copies `rows` to `places`, all below `end`; the filled part then reaches at least to
        `end`."""
        if self._buffer is None or end > self._buffer.shape[self.dim]:
            self._grow(end, rows)
        assert self._buffer is not None
        self._buffer.index_copy_(self.dim, places, rows)
        self._len = max(self._len, end)

    def keep(self, base: int, indices: Tensor) -> None:
        """Keeps the first `base` rows and, behind them, the rows at `indices` (rising, all >=
        base)."""
        if indices.numel():
            chosen = self.rows.index_select(self.dim, indices)
            self._len = base
            self.append(chosen)
        else:
            self._len = base

    def cut(self, length: int) -> None:
        """Forgets the rows behind the first `length`."""
        self._len = min(self._len, length)

    def _grow(self, need: int, like: Tensor) -> None:
        old = 0 if self._buffer is None else self._buffer.shape[self.dim]
        shape = list(like.shape)
        shape[self.dim] = max(need + _SLACK, old + min(old, _STEP))
        buffer = like.new_empty(shape)
        if self._buffer is not None:
            buffer.narrow(self.dim, 0, self._len).copy_(self.rows)
        self._buffer = buffer


class LayerKV:
    """What one layer remembers of one request. Slots are in order of computation, not of position.

    Keys and values lie in blocks where attention goes block by block (on the CPU, in
    `BLOCKED_DTYPE`), else in one row."""

    __slots__ = ("_keys", "_positions", "_values")

    def __init__(self) -> None:
        self._keys: Blocks | GrowableTensor | None = None
        self._values: Blocks | GrowableTensor | None = None
        self._positions = GrowableTensor()

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def is_blocked(self) -> bool:
        """Whether keys and values lie in blocks."""
        return isinstance(self._keys, Blocks)

    @property
    def key_blocks(self) -> Blocks:
        assert isinstance(self._keys, Blocks)
        return self._keys

    @property
    def value_blocks(self) -> Blocks:
        assert isinstance(self._values, Blocks)
        return self._values

    @property
    def keys(self) -> Tensor:
        """(1, H_kv, N, D), a copy where they lie in blocks. Raises RuntimeError before the first
        append."""
        return _rows(self._keys)

    @property
    def values(self) -> Tensor:
        """(1, H_kv, N, D_v), as `keys`."""
        return _rows(self._values)

    @property
    def positions(self) -> Tensor:
        """(N,) place of each slot's token in the text."""
        return self._positions.rows

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts())

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Adds T slots: keys and values (1, H_kv, T, D), positions (T,)."""
        if self._keys is None or self._values is None:
            if keys.device.type == "cpu" and keys.dtype == BLOCKED_DTYPE:
                self._keys, self._values = Blocks(for_keys=True), Blocks()
            else:
                self._keys, self._values = GrowableTensor(dim=2), GrowableTensor(dim=2)
        self._keys.append(keys)
        self._values.append(values)
        self._positions.append(positions)

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """All allocated keys and values (1, H_kv, C, D) and positions (C,), where they lie in one
        row; at least the first `len` are filled."""
        keys, values = self._keys, self._values
        assert isinstance(keys, GrowableTensor)
        assert isinstance(values, GrowableTensor)
        return keys.buffer, values.buffer, self._positions.buffer

    def reserve(self, length: int) -> None:
        """Allocates at least `length` slots, where keys and values lie in one row."""
        for part in self._parts():
            assert isinstance(part, GrowableTensor)
            part.reserve(length)

    def extend(self, num: int) -> None:
        """Counts `num` more slots as filled, which were written to `buffers`."""
        for part in self._parts():
            assert isinstance(part, GrowableTensor)
            part.extend(num)

    def commit(self, num_drafts: int, accepted: Tensor | None) -> None:
        """Of the last `num_drafts` slots keeps those at `accepted` (offsets into them; None: none),
        in place."""
        base = len(self) - num_drafts
        for part in self._parts():
            if accepted is None:
                part.cut(base)
            else:
                part.keep(base, accepted + base)

    def crop(self, num_tokens: int) -> Tensor:
        """Forgets tokens at position `num_tokens` and later. Returns the slots (old numbering) that
        stayed."""
        stay = (self.positions < num_tokens).nonzero()[:, 0]
        for part in self._parts():
            part.keep(0, stay)
        return stay

    def _parts(self) -> Iterator[Blocks | GrowableTensor]:
        for part in (self._keys, self._values, self._positions):
            if part is not None:
                yield part


def _rows(part: Blocks | GrowableTensor | None) -> Tensor:
    if part is None:
        raise RuntimeError("nothing was appended yet")
    return part.dense() if isinstance(part, Blocks) else part.rows
