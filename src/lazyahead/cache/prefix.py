"""What prompts have in common, kept: keys, values and hidden states of their first tokens.

Only what no later token can change is kept, so that a prompt gets the same answer whatever was
cached: keys and values of the layers below the first boundary and the hidden states at it (of all
layers where nothing is deferred). Every prompt then selects anew from all of its tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lazyahead.cache.kv import GrowableTensor
from lazyahead.cache.session import Session
from lazyahead.checks import check_count


@dataclass(eq=False)
class Block:
    """Some tokens behind those of `parent`."""

    parent: Block | None = None
    token_ids: tuple[int, ...] = ()
    kv: tuple[tuple[Tensor, Tensor], ...] = ()
    """By layer: keys and values (1, H_kv, B, D)."""
    hidden: Tensor | None = None
    """(B, d) what enters the first boundary; None where nothing is deferred."""
    token_args: tuple[Tensor, ...] = ()
    """The model's per-token layer arguments, (B, ...) each."""
    children: dict[tuple[int, ...], Block] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        parts = [part for pair in self.kv for part in pair]
        parts += [*self.token_args, *([] if self.hidden is None else [self.hidden])]
        return sum(part.nbytes for part in parts) + 8 * len(self.token_ids)


class PrefixCache:
    """Blocks of prompts in a tree per group; the least recently used go when `max_bytes` are
    exceeded.

    Groups share nothing. Blocks are copied into a session, so that none needs to be locked
    while a request runs. Not safe across threads: the engine calls it under its lock. Raises
    ConfigError for a size below 1.
    """

    def __init__(self, max_bytes: int, block_tokens: int = 128) -> None:
        """Prompts share whole blocks of `block_tokens`."""
        check_count("max_bytes", max_bytes, least=1)
        check_count("block_tokens", block_tokens, least=1)
        self.max_bytes = max_bytes
        self.block_tokens = block_tokens
        self.nbytes = 0
        self._roots: dict[Hashable, Block] = {}
        self._blocks: OrderedDict[Block, Hashable] = OrderedDict()  # oldest first, with its group

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._blocks)

    def match(self, group: Hashable, token_ids: Sequence[int]) -> list[Block]:
        """The blocks that `token_ids` begins with, in order."""
        found = self._path(group, token_ids)
        self._touch(found)
        return found

    def insert(
        self, group: Hashable, token_ids: Sequence[int], session: Session, hidden: Tensor | None
    ) -> None:
        """Keeps the whole blocks of `token_ids`, with which the session begins. `hidden` (N, d) are
        their states at the first boundary, where tokens are deferred."""
        path = self._path(group, token_ids)
        parent = path[-1] if path else self._roots.setdefault(group, Block())
        size = sum(block.nbytes for block in path)
        for block in self._blocks_of(parent, token_ids, len(path), session, hidden):
            size += block.nbytes
            if size > self.max_bytes:
                break
            assert block.parent is not None
            block.parent.children[block.token_ids] = block
            self._blocks[block] = group
            self.nbytes += block.nbytes
            path.append(block)
        self._touch(path)
        self._evict()

    def clear(self) -> None:
        """Forgets everything."""
        while self._blocks:
            self._drop(next(iter(self._blocks)))

    def _blocks_of(
        self,
        parent: Block,
        token_ids: Sequence[int],
        num_held: int,
        session: Session,
        hidden: Tensor | None,
    ) -> Iterator[Block]:
        """The whole blocks of `token_ids` behind the first `num_held`, as copies of what the
        session holds. Below the first boundary, its slots stand by position."""
        size = self.block_tokens
        starts = range(num_held * size, len(token_ids) - size + 1, size)
        if not starts:  # the common case: spares a copy of all keys and values
            return
        layers = [(kv.keys, kv.values) for kv in session.kv[: first_boundary(session)]]
        for start in starts:
            part = slice(start, start + size)
            parent = Block(
                parent,
                tuple(token_ids[part]),
                tuple((k[:, :, part].clone(), v[:, :, part].clone()) for k, v in layers),
                None if hidden is None else hidden[part].clone(),
                tuple(table.rows[part].clone() for table in session.token_args),
            )
            yield parent

    def _path(self, group: Hashable, token_ids: Sequence[int]) -> list[Block]:
        path: list[Block] = []
        block = self._roots.get(group)
        for start in range(0, len(token_ids), self.block_tokens):
            if block is None:
                break
            block = block.children.get(tuple(token_ids[start : start + self.block_tokens]))
            if block is not None:
                path.append(block)
        return path

    def _touch(self, path: Sequence[Block]) -> None:
        """The last block first: so the oldest block of all never has children."""
        for block in reversed(path):
            self._blocks.move_to_end(block)

    def _evict(self) -> None:
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._blocks)))

    def _drop(self, block: Block) -> None:
        group = self._blocks.pop(block)
        self.nbytes -= block.nbytes
        assert block.parent is not None
        block.parent.children.pop(block.token_ids, None)
        root = self._roots.get(group)
        if root is not None and not root.children:
            del self._roots[group]


def first_boundary(session: Session) -> int:
    """The layer at which tokens are first deferred; the number of layers where none are."""
    return min(session.boundaries, default=session.num_layers)


def begin_with(session: Session, blocks: Sequence[Block]) -> None:
    """Puts the tokens of `blocks` into an empty session, as if they had been computed there."""
    num_tokens = sum(len(block.token_ids) for block in blocks)
    device = blocks[0].kv[0][0].device
    positions = torch.arange(num_tokens, device=device)
    for layer, pairs in enumerate(zip(*(block.kv for block in blocks), strict=True)):
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
        session.kv[layer].append(keys, values, positions)
    hidden = [block.hidden for block in blocks if block.hidden is not None]
    if hidden:
        session.stashes[first_boundary(session)].add(torch.cat(hidden), positions, positions)
    for rows in zip(*(block.token_args for block in blocks), strict=True):
        table = GrowableTensor()
        table.append(torch.cat(rows))
        session.token_args.append(table)
    session.token_ids = [token for block in blocks for token in block.token_ids]
