"""Which query row needs which keys, planned once per pass for all layers that share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lazyahead.cache.blocks import BLOCK
from lazyahead.hf.rows import NUM_SINKS, AttentionParams, LocalWindow

_ROWS = 768
"""Query rows times grouped heads per strip."""
_TILE = _ROWS * BLOCK
"""Scores per key head that are weighed in one go: they stay in the second-level cache."""
_FEW = 64
"""Rows times grouped heads up to which nothing is trimmed: whole blocks go in one call."""
_SHORT = 16
"""Rows up to which each is computed over its own range of slots."""
_TRIM = 64
"""Where trailing zeros do not change a product's bits (bf16), large products end at a multiple of
this."""


class Span(NamedTuple):
    """Some query rows over consecutive blocks of keys, weighed in one go."""

    block: int
    num_blocks: int
    width: int
    """Slots of each block that take part: BLOCK, or less where there is one block."""
    biases: tuple[tuple[int, Tensor | slice], ...]
    """By block in the span: (R, 1, width) 0 where a row sees a slot, else -inf, or which slots a
    single row sees; in other blocks all see all."""

    def only(self, rows: Tensor) -> Span:
        """For some of the rows, by their number."""
        biases = tuple(
            (at, bias if isinstance(bias, slice) else bias[rows]) for at, bias in self.biases
        )
        return self._replace(biases=biases)

    def can_grow(self, block: int, width: int, most: int) -> bool:
        """Whether `block`, of which `width` slots take part, may join up to `most` blocks."""
        is_next = self.block + self.num_blocks == block
        return is_next and self.num_blocks < most and width == self.width == BLOCK

    def grown(self, bias: Tensor | slice | None) -> Span:
        """With one more block."""
        more = () if bias is None else ((self.num_blocks, bias),)
        return self._replace(num_blocks=self.num_blocks + 1, biases=self.biases + more)


class Strip(NamedTuple):
    """Consecutive query rows and the spans they need."""

    first: int
    end: int
    spans: tuple[Span, ...]


class Branches(NamedTuple):
    """Draft rows whose paths have gaps in the buffer: the last blocks of each path, in canonical
    order."""

    rows: Tensor
    """(L, Q) offsets among the drafts, the last one repeated as filling."""
    blocks: slice
    """Blocks of keys from the first one that is not the same for all paths."""
    moved: tuple[Tensor, Tensor, Tensor, Tensor]
    """Which rows of these blocks lie elsewhere on a path: (K,) path, block and place in it, and the
    slot where the row stands."""
    bias: Tensor
    """(blocks, L, Q, 1, BLOCK)"""
    source: Tensor
    """(M,) for each draft its place in (L, Q), flat."""


@dataclass(frozen=True)
class Plan:
    """Which row needs which keys: made once per pass, shared by all layers with the same rows, keys
    and windows."""

    num_rows: int
    num_keys: int
    make_strips: Callable[[], tuple[Strip, ...]]
    sees_first: Tensor | None
    """(T, 1, 1) bool: rows that see slot 0; None: all do."""
    branches: Branches | None
    seen: Tensor | None
    """(T, 2) of each of few rows the first slot that it sees, and the one behind the last; None:
    there are gaps, or many rows."""

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        """Made at the first use: few rows that see ranges of slots need none."""
        return self.make_strips()

    @property
    def num_plain(self) -> int:
        """Rows that need no gathered keys."""
        return self.num_rows - (0 if self.branches is None else self.branches.source.numel())


def plan(
    positions: Tensor,
    key_positions: Tensor,
    heads: AttentionParams,
    groups: int,
    dtype: torch.dtype,
    ancestors: Tensor | None = None,
    near: LocalWindow | None = None,
) -> Plan:
    """Plan for T rows at `positions` (T,) over N slots at `key_positions` (N,); the last T slots
    are the rows' own.

    `groups` query heads share a key head. `ancestors` (M, M): the last M rows are drafts, [i, j]
    says that j is i or comes before it on i's path."""
    sight = _Sight(heads, near, groups, dtype)
    num_rows, num_keys = positions.numel(), key_positions.numel()
    paths = [] if ancestors is None else [row.nonzero()[:, 0].tolist() for row in ancestors]
    branches, num_plain, base = None, num_rows, num_keys
    if any(path != list(range(len(path))) for path in paths):  # drafts on several branches
        num_plain, committed = num_rows - len(paths), num_keys - len(paths)
        base = committed // BLOCK * BLOCK
        branches = _branches(positions[num_plain:], key_positions, paths, base, sight)

    def strips() -> tuple[Strip, ...]:
        if branches is None:
            return sight.strips(positions, key_positions)
        return (
            *sight.strips(positions[:num_plain], key_positions[: num_keys - len(paths)]),
            *sight.strips(positions[num_plain:], key_positions[:base], offset=num_plain),
        )

    first = sight.visible(positions, key_positions[:1])
    sees_first = None if bool(first.all()) else first[..., None]
    is_short = num_rows <= _SHORT and branches is None
    seen = sight.ranges(positions, key_positions) if is_short else None
    return Plan(num_rows, num_keys, strips, sees_first, branches, seen)


class _Sight(NamedTuple):
    """Who sees whom, by position."""

    heads: AttentionParams
    near: LocalWindow | None
    groups: int
    dtype: torch.dtype

    def visible(self, positions: Tensor, key_positions: Tensor) -> Tensor:
        """(T, N) bool."""
        queries = positions[:, None]
        seen = key_positions <= queries
        if self.heads.window is not None:
            seen &= key_positions > queries - self.heads.window
        if self.heads.chunk is not None:
            seen &= key_positions // self.heads.chunk == queries // self.heads.chunk
        if self.near is not None:
            is_near = (key_positions > queries - self.near.num_tokens) | (key_positions < NUM_SINKS)
            seen &= is_near | (queries >= self.near.until)
        return seen

    def ranges(self, positions: Tensor, key_positions: Tensor) -> Tensor | None:
        """`Plan.seen`."""
        seen = self.visible(positions, key_positions)
        numbers = torch.arange(1, seen.shape[1] + 1)
        ends = (seen * numbers).amax(1)
        firsts = ends - seen.sum(1)
        has_gaps = seen.shape[1] - (seen * numbers.flip(0)).amax(1) != firsts
        return None if bool(has_gaps.any()) else torch.stack([firsts, ends], 1)

    def strips(
        self, positions: Tensor, key_positions: Tensor, offset: int = 0
    ) -> tuple[Strip, ...]:
        size = max(1, _ROWS // self.groups)
        parts = torch.split(positions, size) if positions.numel() else ()
        firsts = range(offset, offset + positions.numel(), size)
        return tuple(
            Strip(first, first + part.numel(), self.spans(part, key_positions))
            for first, part in zip(firsts, parts, strict=True)
        )

    def spans(self, positions: Tensor, key_positions: Tensor) -> tuple[Span, ...]:
        num_rows, num_keys = positions.numel(), key_positions.numel()
        num_blocks = math.ceil(num_keys / BLOCK)
        seen = pad(self.visible(positions, key_positions), (0, num_blocks * BLOCK - num_keys))
        by_block = seen.view(num_rows, num_blocks, BLOCK)
        is_whole = by_block.all(-1).all(0).tolist()
        is_needed = is_whole if all(is_whole) else by_block.any(-1).any(0).tolist()
        most = max(1, _TILE // (num_rows * self.groups * BLOCK))
        spans: list[Span] = []
        for block in range(num_blocks):
            if not is_needed[block]:
                continue
            width, bias = BLOCK, None
            if not is_whole[block]:
                width, bias = self._partial(by_block[:, block])
            last = spans[-1] if spans else None
            if last is not None and last.can_grow(block, width, most):
                spans[-1] = last.grown(bias)
            else:
                spans.append(Span(block, 1, width, () if bias is None else ((0, bias),)))
        return tuple(spans)

    def _partial(self, seen: Tensor) -> tuple[int, Tensor | slice | None]:
        """Width and bias of a block (R, BLOCK) that not all rows see whole."""
        width = BLOCK
        if seen.shape[0] == 1:
            slots = seen[0].nonzero()[:, 0]
            first, end = int(slots[0]), int(slots[-1]) + 1
            is_range = slots.numel() == end - first
            return width, slice(first, end) if is_range else self.to_bias(seen)[:, None]
        if seen.shape[0] * self.groups > _FEW:
            end = int(seen.any(0).nonzero()[-1]) + 1
            width = min(BLOCK, math.ceil(end / _TRIM) * _TRIM)
        seen = seen[:, :width]
        return width, None if bool(seen.all()) else self.to_bias(seen)[:, None]

    def to_bias(self, seen: Tensor) -> Tensor:
        """0 where `seen`, else -inf."""
        zeros = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return zeros.masked_fill_(~seen, -torch.inf)


def _branches(
    positions: Tensor, key_positions: Tensor, paths: Sequence[list[int]], base: int, sight: _Sight
) -> Branches:
    """`positions` (M,) of the drafts; `paths` of each, itself included; blocks from slot `base` on
    are gathered."""
    num_drafts, committed = len(paths), key_positions.numel() - len(paths)
    inner = {path[-2] for path in paths if len(path) > 1}
    leaves = [node for node in range(num_drafts) if node not in inner]
    place: dict[int, tuple[int, int]] = {}
    members: list[list[int]] = []
    for leaf in leaves:
        new = [node for node in paths[leaf] if node not in place]
        place.update({node: (len(members), column) for column, node in enumerate(new)})
        members.append(new)
    most = max(map(len, members))
    width = math.ceil((committed - base + max(map(len, paths))) / BLOCK) * BLOCK
    slots = torch.zeros(len(leaves), width, dtype=torch.long)
    rows = torch.tensor([nodes + nodes[-1:] * (most - len(nodes)) for nodes in members])
    seen = torch.zeros(len(leaves), most, width, dtype=torch.bool)
    behind = torch.arange(width) - (committed - base)  # place on the path; committed ones < 0
    depth = torch.tensor([len(path) - 1 for path in paths])
    for index, leaf in enumerate(leaves):
        order = torch.cat([torch.arange(base, committed), committed + torch.tensor(paths[leaf])])
        slots[index, : order.numel()] = order
        visible = sight.visible(positions[rows[index]], key_positions[order])
        seen[index, :, : order.numel()] = visible
    seen &= behind <= depth[rows][..., None]
    bias = sight.to_bias(seen).view(len(leaves), most, 1, -1, BLOCK).movedim(3, 0).contiguous()
    here = base + torch.arange(width)
    paths_of, places = ((slots != here) & (slots > 0)).nonzero(as_tuple=True)
    moved = (paths_of, places // BLOCK, places % BLOCK, slots[paths_of, places])
    tail = slice(base // BLOCK, (base + width) // BLOCK)
    source = [place[node][0] * most + place[node][1] for node in range(num_drafts)]
    return Branches(rows, tail, moved, bias, torch.tensor(source))
