"""Keys and values of one request at one layer, each with its position, in a buffer that grows ahead
of need."""

from __future__ import annotations

from torch import Tensor

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
    """What one layer remembers of one request. Slots are in order of computation, not of position."""

    __slots__ = ("_keys", "_positions", "_values")

    def __init__(self) -> None:
        self._keys, self._values, self._positions = (
            GrowableTensor(dim=2),
            GrowableTensor(dim=2),
            GrowableTensor(),
        )

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def keys(self) -> Tensor:
        """(1, H_kv, N, D)"""
        return self._keys.rows

    @property
    def values(self) -> Tensor:
        """(1, H_kv, N, D_v)"""
        return self._values.rows

    @property
    def positions(self) -> Tensor:
        """(N,) place of each slot's token in the text."""
        return self._positions.rows

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes + self._positions.nbytes

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Adds T slots: keys and values (1, H_kv, T, D), positions (T,)."""
        self._keys.append(keys)
        self._values.append(values)
        self._positions.append(positions)

    def commit(self, num_drafts: int, accepted: Tensor | None) -> None:
        """Of the last `num_drafts` slots keeps those at `accepted` (offsets into them; None: none),
        in place."""
        base = len(self) - num_drafts
        for part in (self._keys, self._values, self._positions):
            if accepted is None:
                part.cut(base)
            else:
                part.keep(base, accepted + base)

    def crop(self, num_tokens: int) -> Tensor:
        """Forgets tokens at position `num_tokens` and later. Returns the slots (old numbering) that
        stayed."""
        stay = (self.positions < num_tokens).nonzero()[:, 0]
        for part in (self._keys, self._values, self._positions):
            part.keep(0, stay)
        return stay
