"""The rows of one pass: which are in segment, and the tables (one row per token) that layers are
handed for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lazyahead.cache.kv import GrowableTensor
from lazyahead.hf.attention import Heads
from lazyahead.hf.model_spec import ModelSpec, Plan, Table

if TYPE_CHECKING:
    from lazyahead.hf.ahead import ScratchKV


class Segment(Protocol):
    """The rows of one request during one pass. They change at boundaries."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Tokens that enter at layer 0 in this pass."""

    @property
    def last(self) -> int:
        """Highest position of a row in this pass."""

    @property
    def logits_indices(self) -> Sequence[int]:
        """Which of them give logits, as offsets into `token_ids`."""

    @property
    def tables(self) -> list[GrowableTensor] | None:
        """The model's tables by position, kept for rows that may come back; None: never needed."""

    @property
    def scores_ahead(self) -> bool:
        """Whether rows of it may run ahead in this pass."""

    @property
    def num_rows(self) -> int:
        """Rows in segment now."""

    @property
    def positions(self) -> Tensor:
        """(T,) of the rows in segment now."""

    @property
    def entered(self) -> Tensor:
        """(T,) each row's offset into `token_ids`; -1 for a revived row."""

    @property
    def entering_positions(self) -> Tensor:
        """(T0,) of `token_ids`."""

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, heads: Heads
    ) -> Tensor:
        """Caches the rows' keys and values, answers (1, H, T, D_v)."""

    def at_boundary(self, layer: int, hidden: Tensor, pass_: Pass) -> Tensor | None:
        """At the entry to `layer`: the rows (T, d) that go on, or None when nothing changes."""


class Pass:
    """What the hooks share during one forward."""

    def __init__(self, segments: Sequence[Segment], spec: ModelSpec) -> None:
        self.segments, self.spec = segments, spec
        self.num_entered = sum(len(segment.token_ids) for segment in segments)
        self.keeps_tables = any(segment.tables is not None for segment in segments)
        self.scores_ahead = any(segment.scores_ahead for segment in segments)
        self.scratch: ScratchKV | None = None
        """Set while rows run ahead: attention is its."""
        self.is_positional = False
        """Whether layers are handed their hidden states by place."""
        self._calls: dict[
            tuple[Any, ...], tuple[tuple[Any, ...], dict[str, Any]]
        ] = {}  # by kind of layer
        self._scratch_args: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        """Of tokens that stand or run ahead, by the identity of their positions: rows of tables, by
        key."""
        self.layer = -1
        self._num_changes = 0  # boundaries that changed rows
        self._tables: dict[int, Tensor] = {}  # by key, one row per token that entered
        self._gathered: dict[
            int, tuple[int, Tensor]
        ] = {}  # by key: as of which change, rows in segment

    @property
    def has_changed(self) -> bool:
        """The rows in segment are no longer those that entered."""
        return self._num_changes > 0

    @property
    def num_rows(self) -> int:
        """Rows in segment now."""
        return sum(segment.num_rows for segment in self.segments)

    @property
    def is_empty(self) -> bool:
        """Every row was deferred. One row then flies on unheeded until all tables have been seen."""
        return self.has_changed and not self.num_rows

    @property
    def is_over(self) -> bool:
        """Nothing is left to do for the layers that follow."""
        return self.is_empty and len(self._tables) == self.spec.num_tables

    def at_boundary(self, layer: int, hidden: Tensor) -> Tensor | None:
        """All segments at one boundary: (1, T, d) -> (1, T', d), or None when nothing changes."""
        if self.is_empty:
            return None
        parts, changed, start = [], False, 0
        for segment in self.segments:
            before = hidden[0, start : start + segment.num_rows]
            start += segment.num_rows
            after = segment.at_boundary(layer, before, self)
            changed |= after is not None
            parts.append(before if after is None else after)
        if not changed:
            return None
        self._num_changes += 1
        if not self.num_rows:
            return hidden[:, :1]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows[None]

    def restore(self, hidden: Tensor) -> Tensor:
        """Rows (1, T, d) in segment at the end -> (1, T0, d) rows that entered, zeros where one was
        deferred."""
        restored = hidden.new_zeros(1, self.num_entered, hidden.shape[-1])
        offset = start = 0
        for segment in self.segments:
            entered = segment.entered
            stayed = (entered >= 0).nonzero()[:, 0]
            restored[0, entered[stayed] + offset] = hidden[0, stayed + start]
            offset += len(segment.token_ids)
            start += segment.num_rows
        return restored

    def note_call(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remembers what the model calls layers of this kind with, hidden states aside, for rows
        that run ahead."""
        self.is_positional = bool(args)
        names = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self._calls.setdefault(self.spec.kinds[layer], (args[1:], names))

    def knows_call(self, layer: int) -> bool:
        """Whether a layer of this kind was called in this pass."""
        return self.spec.kinds[layer] in self._calls

    def call_for(
        self, layer: int, segment: Segment, positions: Tensor, entered: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer, hidden states aside, for tokens (T,) of a segment, in segment
        or not."""
        plans, (places, names) = self.spec.plans[layer], self._calls[self.spec.kinds[layer]]
        rows: dict[int, Tensor] = self._scratch_args.setdefault(id(positions), (positions, {}))[1]

        def for_tokens(plan: Plan, value: Any) -> Any:
            if plan is None or value is None:
                return value
            if isinstance(plan, tuple):
                return type(value)(
                    for_tokens(part, inner) for part, inner in zip(plan, value, strict=True)
                )
            if plan.key not in rows:
                rows[plan.key] = self._rows_of(plan.key, segment, positions, entered)
            return rows[plan.key].movedim(0, plan.dim)

        return (
            tuple(for_tokens(plans.get(place), value) for place, value in enumerate(places, 1)),
            {name: for_tokens(plans.get(name), value) for name, value in names.items()},
        )

    def for_rows(self, plan: Plan, value: Any) -> Any:
        """A layer's argument, made for the rows in segment."""
        if plan is None or value is None:
            return value
        if isinstance(plan, tuple):
            return type(value)(
                self.for_rows(part, inner) for part, inner in zip(plan, value, strict=True)
            )
        if plan.key not in self._tables:
            self._tables[plan.key] = value.movedim(plan.dim, 0)
            self._remember(plan.key)
        if not self.has_changed:
            return value
        if self.is_empty:
            return value.narrow(plan.dim, 0, 1)
        return self._gather(plan)

    def _remember(self, key: int) -> None:
        """Keeps the rows of segments that may bring tokens back. Drafts at one position overwrite
        each other, and are overwritten by what comes to stand there: only tokens of a prompt
        ever come back."""
        table, offset = self._tables[key], 0
        for segment in self.segments:
            num = len(segment.token_ids)
            if segment.tables is not None and num:
                while len(segment.tables) <= key:
                    segment.tables.append(GrowableTensor())
                segment.tables[key].scatter(
                    segment.entering_positions, table[offset : offset + num], segment.last + 1
                )
            offset += num

    def _gather(self, plan: Table) -> Tensor:
        """Rows that entered have theirs in this pass's table, revived ones by position in the
        segment's own."""
        version, gathered = self._gathered.get(plan.key, (0, None))
        if gathered is not None and version == self._num_changes:
            return gathered
        parts = [
            self._rows_of(plan.key, segment, segment.positions, segment.entered)
            for segment in self.segments
        ]
        gathered = (parts[0] if len(parts) == 1 else torch.cat(parts)).movedim(0, plan.dim)
        self._gathered[plan.key] = (self._num_changes, gathered)
        return gathered

    def _rows_of(self, key: int, segment: Segment, positions: Tensor, entered: Tensor) -> Tensor:
        """A table's rows (T, …) for tokens (T,) of a segment."""
        before = self.segments[: self.segments.index(segment)]
        offset = sum(len(other.token_ids) for other in before)
        rows = self._tables[key][entered.clamp(min=0) + offset]
        if segment.tables is None:
            return rows
        kept = segment.tables[key].rows
        revived = (entered < 0).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(revived, kept[positions.clamp(max=len(kept) - 1)], rows)
