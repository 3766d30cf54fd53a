"""Scorers: how much each token matters to the rows that are about to speak.

A scorer is a frozen dataclass with `queries`, the number of last rows in flight whose attention it wants to see,
and one method. Add one here, in `SCORERS`, and in the test matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from lazyahead.errors import ConfigError


class Scorer(Protocol):
    """What a boundary asks: one score per token that has keys at the layer below."""

    @property
    def queries(self) -> int:
        """Rows of attention needed; 0 where the scorer looks at none."""

    @property
    def ahead(self) -> float:
        """Depth, as a fraction of the layers, up to which those rows run ahead of the prompt; 0: they do not."""

    @property
    def looks_from(self) -> float:
        """Depth from which they look at the whole prompt on their way; before it, at what is near."""

    @property
    def reach(self) -> int:
        """How far from a token, by position, its neighbours matter with it."""

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        """Attention (H, Q, N) of the last Q rows, and the N tokens' positions, to scores (N,)."""


class _Alone:
    """Scorers whose rows stay where they are, and to which each token matters by itself."""

    @property
    def ahead(self) -> float:
        return 0.0

    @property
    def looks_from(self) -> float:
        return 0.0

    @property
    def reach(self) -> int:
        return 0


@dataclass(frozen=True)
class LastToken(_Alone):
    """The paper's eq. 1: s_i = mean over heads of the attention that the last row pays to token i."""

    queries: int = 1

    def __post_init__(self) -> None:
        if self.queries != 1:
            raise ConfigError(f"LastToken looks at 1 row, got queries={self.queries}; use Window for more")

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        return attention[:, -1].mean(0)  # (H, 1, N) -> (N,)


@dataclass(frozen=True)
class Window:
    """The last `queries` rows; strongest over rows, mean over heads, spread over `pool` neighbours by position.

    With `ahead`, a fraction of the layers, these rows first run on to that depth while the rest of the prompt stands
    still: each layer's keys and values are made from the states that stand at the boundary. Models find things in
    their middle layers; this asks them there, and still cuts before them. What was seen that way is thrown away.
    Before the depth `looks_from` these rows look only at what is near: what attention says there leads nowhere.
    """

    queries: int = 16
    pool: int = 7
    ahead: float = 0.0
    looks_from: float = 0.0

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ConfigError(f"Window needs at least 1 query row, got queries={self.queries}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ConfigError(f"Window pools over an odd number of neighbours, got pool={self.pool}")
        if not 0 <= self.ahead < 1:
            raise ConfigError(f"ahead must be in 0..1 (a fraction of the layers), got {self.ahead}")
        if not 0 <= self.looks_from <= self.ahead:
            raise ConfigError(f"looks_from must be in 0..ahead ({self.ahead}), got {self.looks_from}")

    @property
    def reach(self) -> int:
        return self.pool // 2

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        scores = attention.mean(0).amax(0)  # (H, Q, N) -> (N,)
        if self.pool == 1:
            return scores
        order = positions.argsort()
        pooled = max_pool1d(scores[order][None, None], self.pool, stride=1, padding=self.pool // 2)[0, 0]
        return torch.empty_like(scores).index_copy_(0, order, pooled)


@dataclass(frozen=True)
class Random(_Alone):
    """Looks at nothing: the random token drop that the paper compares with."""

    seed: int = 0
    queries: int = 0

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        table = torch.rand(int(positions.max()) + 1, generator=generator).to(positions.device)
        return table[positions]  # a function of the position, so that kept sets are nested by depth


SCORERS: dict[str, type[LastToken] | type[Window] | type[Random]] = {
    "last_token": LastToken,
    "window": Window,
    "random": Random,
}
