"""Scorers: how much each prompt token matters to the last rows of the prompt.

A scorer needs two members: `window_size`, the number of last rows whose attention it reads, and
`__call__(attention, positions)`, which turns that attention into one score a token. To add one,
write a frozen dataclass with these two members and pass it as `LazyPrefill(scorer=...)`; put it
into `SCORERS` to let profiles on disk name it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lazyahead.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class Scorer(Protocol):
    """What `LazyPrefill` needs of a scorer."""

    @property
    def window_size(self) -> int:
        """Last rows of the prompt whose attention is scored; 0 for a scorer that reads none."""

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        """Attention (Q, N) of the last Q rows and the N tokens' positions, to scores (N,).

        Heads are reduced to their mean, or to their maximum where the scorer has an attribute
        `head_reduction` that says `max`.
        """


def scorer_name(scorer: Scorer) -> str:
    """The name in `SCORERS`, else `module:Class` of a scorer that is not built in."""
    kind = type(scorer)
    built_in = {known: name for name, known in SCORERS.items()}
    return built_in.get(kind, f"{kind.__module__}:{kind.__qualname__}")


def scorer_to_dict(scorer: Scorer) -> dict[str, Any]:
    """Name and settings. A scorer that is no dataclass is described by its `repr`."""
    kind: Any = type(scorer)
    if is_dataclass(kind):
        values = {field.name: getattr(scorer, field.name) for field in fields(kind)}
        return {"name": scorer_name(scorer), **values}
    return {"name": scorer_name(scorer), "repr": repr(scorer)}


def scorer_from_dict(values: Any) -> Scorer:
    """The inverse of `scorer_to_dict`. Raises ConfigError for a name that is not in `SCORERS`."""
    if not isinstance(values, dict):
        raise ConfigError(f"scorer must be a table with a name, got {values!r}")
    settings = dict(values)
    name = settings.pop("name", None)
    if name not in SCORERS:
        raise ConfigError(
            f"no scorer is called {name!r}; there are {', '.join(SCORERS)} (add your own class to "
            "lazyahead.prefill.score.SCORERS before loading)"
        )
    try:
        scorer: Scorer = SCORERS[name](**settings)
        return scorer
    except TypeError as error:
        raise ConfigError(f"not a setting of the scorer {name!r}: {error}") from None


@dataclass(frozen=True)
class LastToken:
    """The paper's eq. 1: s_i = mean over heads of the attention that the last row pays token i."""

    window_size: int = 1

    def __post_init__(self) -> None:
        if self.window_size != 1:
            raise ConfigError(
                f"LastToken reads 1 row, got window_size={self.window_size}; use Window for more"
            )

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        return attention[-1]  # (1, N) -> (N,)


@dataclass(frozen=True)
class Window:
    """The last `window_size` rows: mean over heads, maximum over rows, maximum over `kernel_size`
    neighbours by position.
    """

    window_size: int = 16
    kernel_size: int = 7

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ConfigError(f"Window needs at least 1 row, got window_size={self.window_size}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"Window pools over an odd number of neighbours, got kernel_size={self.kernel_size}"
            )

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        scores = attention.amax(0)  # (Q, N) -> (N,)
        return max_pool(scores, positions, self.kernel_size)


@dataclass(frozen=True)
class Random:
    """Reads no attention: the random token drop that the paper compares with."""

    seed: int = 0
    window_size: int = 0

    def __call__(self, attention: Tensor, positions: Tensor) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        table = torch.rand(int(positions.max()) + 1, generator=generator).to(positions.device)
        return table[positions]  # a function of the position, so that kept sets are nested


def max_pool(scores: Tensor, positions: Tensor, kernel_size: int) -> Tensor:
    """Each token's maximum over `kernel_size` neighbours by position. Scores and positions (N,)."""
    if kernel_size == 1:
        return scores
    from torch.nn.functional import max_pool1d

    order = positions.argsort()
    rows = scores[order][None, None]  # (1, 1, N)
    pooled = max_pool1d(rows, kernel_size, stride=1, padding=kernel_size // 2)[0, 0]
    return scores.new_empty(scores.shape).index_copy_(0, order, pooled)


SCORERS: dict[str, type[Any]] = {"last_token": LastToken, "window": Window, "random": Random}
"""Scorers that a profile on disk can name."""
