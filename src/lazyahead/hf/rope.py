"""Rotary tables that depend on the longest position in a pass (`dynamic`, `longrope`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lazyahead.hf.trace import Unfit


@dataclass(frozen=True)
class Rope:
    """The rotary modules of a model whose tables change with length."""

    modules: tuple[nn.Module, ...]
    changes_at: int
    """Passes that stay below this position all have the same tables."""
    keeps_changing: bool
    """Behind it, every length has its own."""

    def is_steady(self, start: int, end: int) -> bool:
        """Whether a pass that reaches `end` has the tables of one that reaches `start` only."""
        return end < self.changes_at or (start >= self.changes_at and not self.keeps_changing)

    @contextmanager
    def as_new(self) -> Iterator[None]:
        """Afterwards the modules remember nothing of what ran inside: no pass changes the tables of
        another."""
        before = [({**vars(module)}, {**module._buffers}) for module in self.modules]
        try:
            yield
        finally:
            for module, (attributes, buffers) in zip(self.modules, before, strict=True):
                vars(module).update(attributes)
                module._buffers.update(buffers)


def growing_rope(model: nn.Module) -> Rope | None:
    """Asks the rotary modules, since configs also name what a family then does not do; None: tables
    never change."""
    found: list[nn.Module] = []
    limits: list[int] = []
    keeps_changing = False
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for name, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            found.append(module)
            keeps_changing |= kind != "longrope"
            limits.append(_limit(module, name, kind))
    return Rope(tuple(found), min(limits), keeps_changing) if found else None


def _limit(module: Any, name: str | None, kind: str) -> int:
    """The length up to which the tables stay the same."""
    if kind != "longrope":
        return int(module.original_max_seq_len)
    rope = module.config.rope_parameters
    limit = (rope if name is None else rope[name]).get("original_max_position_embeddings")
    if not isinstance(limit, int):
        raise Unfit("its rotary tables change at a length that its config does not name")
    return limit
