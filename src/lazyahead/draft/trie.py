"""The token trie of Lookahead (arXiv 2312.12728, section 3.2), without a node per token.

The paper inserts, at every position of a text, the branch of `branch_length` tokens that starts
there, and counts how often each node was inserted. Asked with the last tokens of an answer, it goes
down the trie along the longest suffix it knows; the counted sub-trie below is the draft.

Here the text itself is the trie. The node that a suffix leads to is the set of *positions* that
follow an occurrence of that suffix; its count is how many there are; its children are the tokens
standing at those positions. So only an index from suffixes to positions is kept, in the manner of
LZ77's hash chains: for each order n in (1, 2, 4, 8), the newest position after each n-gram
(`heads`), and for each position the next older one after the same n-gram (`older`).

    text        a b c a b d a b         match([.. a, b]) -> positions 5 (before d) and 2 (before c),
    newest first position    0 1 2 3 4 5 6 7

Adding a token touches four chains, matching walks a few links, and both are independent of the
length of the text.
"""

from array import array
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lazyahead.errors import ConfigError

SEPARATOR = -1
"""Stands between sequences; no query contains it, so no match and no branch reaches across."""

ORDERS = (1, 2, 4, 8)
_LONGEST = ORDERS[-1]
_ORDER_OF = [
    bisect(ORDERS, length) - 1 for length in range(_LONGEST + 1)
]  # of matches at least so long
_MULTIPLIERS = (
    0x9E3779B1,
    0x85EBCA6B,
    0xC2B2AE35,
    0x27D4EB2F,
    0x165667B1,
    0xD3A2646D,
    0xFD7046C5,
    0xB55A4F09,
)
_WORD = 0xFFFFFFFF

_BYTES_PER_SLOT = 4 * (1 + 2 * len(ORDERS))
MIN_CAPACITY_BYTES = 2048 * _BYTES_PER_SLOT
_PIECE = 256  # tokens; long sequences are evicted in pieces of this
_FIRST_SIZE = 64  # slots
_CHUNK = 1 << 16  # tokens indexed at once
_SCALAR_CHUNK = 24  # below this many tokens plain Python beats numpy
_LAST_POSITION = 2**31 - 1

Ints: TypeAlias = "array[int]"
Match: TypeAlias = tuple[int, int]
"""(position of the continuation's first token, number of query tokens that match before it)"""


class TokenTrie:
    """A trie over token sequences: append tokens, match a suffix, read the branches that follow.

    Sizes are in tokens, `capacity_bytes` in bytes of index (36 a slot). Without a capacity the trie
    grows; with one, the oldest sequence leaves first (long ones in pieces of 256 tokens), and one
    that was touched since it was written is written anew instead of leaving: least recently used,
    by the clock algorithm. Not thread-safe.

    Raises ConfigError for a capacity below 72 KiB (2048 slots), or a branch or query length below
    1.
    """

    def __init__(
        self, branch_length: int = 16, *, query_length: int = 32, capacity_bytes: int | None = None
    ) -> None:
        if branch_length < 1 or query_length < 1:
            raise ConfigError(
                f"branch_length {branch_length} and query_length {query_length} must be at least 1"
            )
        if capacity_bytes is not None and capacity_bytes < MIN_CAPACITY_BYTES:
            raise ConfigError(
                f"capacity_bytes {capacity_bytes} is too small: at least {MIN_CAPACITY_BYTES} is "
                "needed"
            )
        self._tokens: Ints
        self._pieces: list[int]  # first positions of what is evicted at once, ascending
        self._used: set[int]  # those of them that were touched since they were written
        self._heads: list[Ints]  # by order: slot of an n-gram's hash -> newest position after it
        self._older: list[
            Ints
        ]  # by order: slot of a position -> next older position after the same hash
        self.branch_length = branch_length
        self.query_length = query_length
        slots = (
            capacity_bytes // _BYTES_PER_SLOT if capacity_bytes is not None else _LAST_POSITION // 2
        )
        self._max_size = 1 << (slots.bit_length() - 1)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._start = self._end = 0
        self._allocate(_FIRST_SIZE)
        self._start = self._end = (
            _LONGEST  # so that the n-grams of the first token reach back into separators
        )
        self._pieces, self._used = [_LONGEST], set()

    def __len__(self) -> int:
        """Tokens held, separators included."""
        return self._end - self._start

    @property
    def max_tokens(self) -> int:
        """Tokens held at most."""
        return self._max_size

    @property
    def nbytes(self) -> int:
        """Bytes of index and text."""
        return self._size * _BYTES_PER_SLOT

    @property
    def end(self) -> int:
        """The position that the next token will have."""
        return self._end

    # ---- writing ----

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the current sequence. Of more than half the capacity at once, the last
        part is kept."""
        tokens = tokens[-(self._max_size // 2) :]
        if self._end + len(tokens) > self._size:
            self._make_room(len(tokens))
        if len(tokens) <= _SCALAR_CHUNK:
            self._append(tokens)
        else:
            values = np.asarray(tokens, dtype=np.int32)
            for i in range(0, len(values), _CHUNK):
                self._append_chunk(values[i : i + _CHUNK])
        if self._end - self._pieces[-1] > _PIECE:
            self._pieces += range(self._pieces[-1] + _PIECE, self._end, _PIECE)

    def end_sequence(self) -> None:
        """Close the current sequence: nothing later is a continuation of it."""
        if self._end > self._pieces[-1]:
            self.extend((SEPARATOR,))
            self._begin_piece()

    def touch(self, position: int) -> None:
        """Mark the sequence (or piece) that holds this position as used, so that eviction spares it
        once."""
        self._used.add(self._pieces[bisect(self._pieces, position) - 1])

    def reserve(self, num_tokens: int) -> None:
        """Make room for this many more tokens now, so that appending them never pauses to grow."""
        needed = self._end + num_tokens
        if needed > self._size and self._size < self._max_size:
            self._allocate(min(1 << (needed - 1).bit_length(), self._max_size))

    # ---- reading ----

    def match(
        self, query: Sequence[int], limit: int = 16, max_links: int = 64, min_length: int = 1
    ) -> list[Match]:
        """Positions that follow the longest suffixes of `query` (its last `query_length` tokens),
        at most `limit`.

        The chain of the highest order goes first, newest position first, and each order adds only
        the matches too short for the order above; `max_links` bounds the walk along each chain, and
        orders below `min_length` are left out. Sorted longest match first, newest first among
        equals. With both bounds above the length of the text these are *all* occurrences of all
        suffixes.
        """
        backwards = query[: -self.query_length - 1 : -1]
        start, shift = self._start, self._shift
        least = _ORDER_OF[min_length if min_length < _LONGEST else _LONGEST]
        shortest = ORDERS[least]
        hashed = sum(map(mul, backwards[:shortest], _MULTIPLIERS)) & _WORD
        if len(backwards) < shortest or self._heads[least][hashed >> shift] <= start:
            return []  # what a long n-gram leads to, its end leads to as well
        tokens, mask, found = self._tokens, self._mask, list[Match]()
        sums = list(
            accumulate(map(mul, backwards, _MULTIPLIERS))
        )  # a multilinear hash: that of order n is the nth
        num_sums = len(sums)
        shorter_than = self.query_length + 1
        for i in range(bisect(ORDERS, num_sums) - 1, least - 1, -1):
            order, older, position = (
                ORDERS[i],
                self._older[i],
                self._heads[i][(sums[ORDERS[i] - 1] & _WORD) >> shift],
            )
            if position <= start:
                shorter_than = order
                continue
            links, compared = (
                max_links,
                backwards[:shorter_than],
            )  # all that agree are matches of the order above
            num_compared = len(compared)
            while position > start and links:
                length = 0
                last = position - 1
                for token in (
                    compared if position - start > num_compared else compared[: position - start]
                ):
                    if tokens[(last - length) & mask] != token:
                        break
                    length += 1
                if order <= length < shorter_than and tokens[position & mask] != SEPARATOR:
                    found.append((position, length))
                    if len(found) == limit:
                        return sorted(found, key=_longest_newest)
                position = older[position & mask]
                links -= 1
            shorter_than = order
        if len(found) > 1:
            found.sort(key=_longest_newest)
        return found

    def branch(self, position: int) -> list[int]:
        """The at most `branch_length` tokens from `position` to the end of its sequence."""
        first = position & self._mask
        length = self._end - position
        stop = first + (length if length < self.branch_length else self.branch_length)
        tokens = self._tokens[first:stop].tolist()
        if stop > self._size:
            tokens += self._tokens[: stop - self._size].tolist()
        return tokens[: tokens.index(SEPARATOR)] if SEPARATOR in tokens else tokens

    # ---- the index ----

    def _append(self, tokens: Sequence[int]) -> None:
        """Link a few tokens into the chains, one after the other: `_index` without numpy."""
        held, mask, shift, position = self._tokens, self._mask, self._shift, self._end
        (heads1, heads2, heads4, heads8), (older1, older2, older4, older8) = (
            self._heads,
            self._older,
        )
        m1, m2, m3, m4, m5, m6, m7, m8 = _MULTIPLIERS
        first = (position - _LONGEST) & mask
        before = held[first : first + _LONGEST]
        t8, t7, t6, t5, t4, t3, t2, t1 = before + held[: _LONGEST - len(before)]
        for token in tokens:
            slot = position & mask
            held[slot] = token
            total = t1 * m1
            head = (total & _WORD) >> shift
            older1[slot], heads1[head] = heads1[head], position
            total += t2 * m2
            head = (total & _WORD) >> shift
            older2[slot], heads2[head] = heads2[head], position
            total += t3 * m3 + t4 * m4
            head = (total & _WORD) >> shift
            older4[slot], heads4[head] = heads4[head], position
            total += t5 * m5 + t6 * m6 + t7 * m7 + t8 * m8
            head = (total & _WORD) >> shift
            older8[slot], heads8[head] = heads8[head], position
            t8, t7, t6, t5, t4, t3, t2, t1 = t7, t6, t5, t4, t3, t2, t1, token
            position += 1
        self._end = position

    def _append_chunk(self, values: npt.NDArray[np.int32]) -> None:
        positions = np.arange(self._end, self._end + len(values))
        _view(self._tokens)[positions & self._mask] = values
        self._index(positions)
        self._end += len(values)

    def _index(self, positions: npt.NDArray[np.int64]) -> None:
        """Link consecutive positions into the chains, as `_append` does one by one."""
        before = _view(self._tokens)[
            np.arange(positions[0] - _LONGEST, positions[-1]) & self._mask
        ].view(np.uint32)
        hashes = np.zeros(len(positions), np.uint32)
        for n in range(1, _LONGEST + 1):
            hashes += before[_LONGEST - n :][: len(positions)] * np.uint32(_MULTIPLIERS[n - 1])
            if n in ORDERS:
                i = ORDERS.index(n)
                self._link(
                    _view(self._heads[i]),
                    _view(self._older[i]),
                    hashes >> np.uint32(self._shift),
                    positions,
                )

    def _link(
        self,
        heads: npt.NDArray[np.int32],
        older: npt.NDArray[np.int32],
        slots: npt.NDArray[np.uint32],
        positions: npt.NDArray[np.int64],
    ) -> None:
        by_slot = np.sort(
            (slots.astype(np.int64) << 32) | positions
        )  # equal slots side by side, oldest first
        slot, position = by_slot >> 32, by_slot & _WORD
        is_first = np.empty(len(slot), np.bool_)
        is_first[0] = True
        np.not_equal(slot[1:], slot[:-1], out=is_first[1:])
        link = np.empty(len(slot), np.int32)
        link[1:] = position[:-1]
        link[is_first] = heads[slot[is_first]]
        older[position & self._mask] = link
        heads[slot] = position  # the last of equal slots wins: the newest

    def _allocate(self, size: int) -> None:
        """Change the number of slots (a power of two); only ever before the ring has turned, so
        slots stay."""
        held = self._tokens[: self._end] if self._end else array("i", [SEPARATOR]) * _LONGEST
        self._size, self._mask, self._shift = size, size - 1, 33 - size.bit_length()
        self._tokens = held + array("i", bytes(4 * (size - len(held))))
        self._heads = [array("i", bytes(4 * size)) for _ in ORDERS]
        self._older = [array("i", bytes(4 * size)) for _ in ORDERS]
        for first in range(_LONGEST, self._end, _CHUNK):
            self._index(np.arange(first, min(first + _CHUNK, self._end)))

    def _make_room(self, num_tokens: int) -> None:
        """Grow, or evict the oldest pieces; used ones move to the front instead, a few times
        `num_tokens` at most."""
        self.reserve(num_tokens)
        spared: list[int] = []
        spare_limit, spared_until = min(4 * (num_tokens + _PIECE), self._size // 4), -1
        while self._end + num_tokens + len(spared) + bool(spared) - self._start > self._size:
            first = self._pieces.pop(0)
            self._start = stop = self._pieces[0]
            if first in self._used and len(spared) + stop - first < spare_limit:
                if spared_until != first:
                    spared.append(SEPARATOR)
                spared += [self._tokens[position & self._mask] for position in range(first, stop)]
                spared_until = stop
            self._used.discard(first)
        if self._end > _LAST_POSITION - 2 * self._size:
            self._renumber()
        if spared:
            self._begin_piece()
            self._append((*spared, SEPARATOR))
            self._begin_piece()

    def _begin_piece(self) -> None:
        if self._pieces[-1] != self._end:
            self._pieces.append(self._end)

    def _renumber(self) -> None:
        """Move all positions down by whole turns of the ring before they outgrow 32 bits."""
        turns = (self._start // self._size - 1) * self._size
        for chain in (*self._heads, *self._older):
            links = _view(chain)
            np.maximum(links - turns, 0, out=links)
        self._start -= turns
        self._end -= turns
        self._pieces = [first - turns for first in self._pieces]
        self._used = {first - turns for first in self._used}


def _longest_newest(match: Match) -> tuple[int, int]:
    return -match[1], -match[0]


def _view(values: Ints) -> npt.NDArray[np.int32]:
    return np.frombuffer(values, dtype=np.int32)
