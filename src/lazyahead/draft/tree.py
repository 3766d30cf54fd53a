"""The draft: a forest of guessed tokens under the last token of an answer, shared prefixes merged.

The paper's hierarchical multi-branch draft (arXiv 2312.12728, section 3.2). Row 0 of a decoding
step is the last token (the root, -1 here); draft node i is the row after it numbered i + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from operator import lt
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

ROOT = -1


class Source(IntEnum):
    """Where the text stands that a guess was read from."""

    PROMPT = 0
    OUTPUT = 1
    MEMORY = 2


@dataclass(frozen=True)
class Draft:
    """`token_ids[i]` is guessed to follow node `parents[i]` (-1: the last token of the answer).

    Parents stand before children, and nodes in depth-first order with the likelier child first, so
    that the likeliest run of accepted tokens is a contiguous run of rows. `sources`, `match_lens`
    (tokens of context that led to the guess) and `probs` (probability that the node and all above
    it are accepted) are either given for all nodes or for none. Raises ValueError for lengths that
    differ, a parent that is not before its child, or a negative token.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    sources: Sequence[Source] = ()
    match_lens: Sequence[int] = ()
    probs: Sequence[float] = ()

    EMPTY: ClassVar["Draft"]

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if len(self.parents) != n:
            raise ValueError(f"{n} token_ids but {len(self.parents)} parents")
        for name, values in (
            ("sources", self.sources),
            ("match_lens", self.match_lens),
            ("probs", self.probs),
        ):
            if values and len(values) != n:
                raise ValueError(f"{n} token_ids but {len(values)} {name}")
        if n and (min(self.parents) < ROOT or not all(map(lt, self.parents, range(n)))):
            i = next(i for i, parent in enumerate(self.parents) if not ROOT <= parent < i)
            raise ValueError(f"parent {self.parents[i]} of node {i} is not -1 or an earlier node")
        if n and min(self.token_ids) < 0:
            raise ValueError(f"token id {min(self.token_ids)} is negative")

    @classmethod
    def unchecked(
        cls,
        token_ids: Sequence[int],
        parents: Sequence[int],
        sources: Sequence[Source],
        match_lens: Sequence[int],
        probs: Sequence[float],
    ) -> Self:
        """A draft that is a forest by the way it was made: a decoding step has no time to look
        again."""
        draft = object.__new__(cls)
        draft.__dict__.update(
            token_ids=token_ids,
            parents=parents,
            sources=sources,
            match_lens=match_lens,
            probs=probs,
        )
        return draft

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def depths(self) -> list[int]:
        """Distance to the root row: 1 for its children. The position of a node is that of the last
        token plus this."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    @cached_property
    def children(self) -> list[list[int]]:
        """Of each node, and last (index -1) of the root row, likelier first."""
        children: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for i, parent in enumerate(self.parents):
            children[parent].append(i)
        return children

    @cached_property
    def ancestors(self) -> npt.NDArray[np.bool_]:
        """(n, n): [i, j] says that j is i or above i, that is, that row i may attend to row j."""
        n = len(self)
        lines: list[int] = []  # one bit a node
        for i, parent in enumerate(self.parents):
            lines.append(1 << i if parent == ROOT else lines[parent] | 1 << i)
        width = (n + 7) // 8
        packed = np.frombuffer(b"".join(line.to_bytes(width, "little") for line in lines), np.uint8)
        return np.unpackbits(packed.reshape(n, width), axis=1, count=n, bitorder="little").astype(
            np.bool_
        )

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def child(self, nodes: Sequence[int], tokens: Sequence[int]) -> int | None:
        """The node of the last of a walk's `tokens`, where the draft has one below the last of its
        `nodes`."""
        children = self.children[nodes[-1] if nodes else ROOT]
        return next(
            (node for node in children if tokens and self.token_ids[node] == tokens[-1]), None
        )

    def sources_of(self, nodes: Sequence[int], num_tokens: int) -> tuple[Source | None, ...]:
        """Of the first `num_tokens` of a step's tokens, whose drafted ones are `nodes`; None: the
        model's own."""
        drafted = [self.sources[node] for node in nodes[:num_tokens]] if self.sources else []
        return (*drafted, *[None] * (num_tokens - len(drafted)))

    def within(self, depth: int) -> Self:
        """The nodes at most this deep, in the same order; the draft itself if it is no deeper."""
        if len(self) <= depth or max(self.depths) <= depth:
            return self
        return self._take(
            [node for node, its_depth in enumerate(self.depths) if its_depth <= depth]
        )

    def best(self, num_nodes: int) -> Self:
        """The `num_nodes` likeliest nodes, in the same order; the draft itself where it has no more
        than that."""
        if num_nodes >= len(self):
            return self
        if num_nodes <= 0:
            return type(self)((), ())
        probs = self.probs or [1.0 / depth for depth in self.depths]
        # A child is never likelier than its parent and stands after it, so its parent is kept too.
        keep = sorted(sorted(range(len(self)), key=lambda i: -probs[i])[:num_nodes])
        return self._take(keep)

    def _take(self, keep: Sequence[int]) -> Self:
        """The nodes `keep`, in that order, which must hold the parent of each before it."""
        new = {old: i for i, old in enumerate(keep)}
        new[ROOT] = ROOT
        return self.unchecked(
            [self.token_ids[i] for i in keep],
            [new[self.parents[i]] for i in keep],
            [self.sources[i] for i in keep] if self.sources else (),
            [self.match_lens[i] for i in keep] if self.match_lens else (),
            [self.probs[i] for i in keep] if self.probs else (),
        )


Draft.EMPTY = Draft((), ())
