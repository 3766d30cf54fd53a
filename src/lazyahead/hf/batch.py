"""All segments of one pass, and the per-token arguments that layers receive for their rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lazyahead.cache.kv import GrowableTensor
from lazyahead.hf.model_spec import ArgSpec, ModelSpec, TokenArg
from lazyahead.hf.segment import Segment


class Batch:
    """What the hooks share during one forward pass."""

    def __init__(
        self,
        segments: Sequence[Segment],
        spec: ModelSpec,
        on_layer: Callable[[int], None] | None = None,
        fewest_rows: int = 1,
    ) -> None:
        """A pass of less than `fewest_rows` rows is filled up with copies of its last row."""
        self.segments = segments
        self.spec = spec
        self.on_layer = on_layer
        self.fewest_rows = fewest_rows
        token_ids = [token for segment in segments for token in segment.token_ids]
        self.token_ids = token_ids + token_ids[-1:] * (fewest_rows - len(token_ids))
        """Of the rows that enter, copies included."""
        self.num_logits = sum(len(segment.logits_indices) for segment in segments)
        self.logits_indices = self._logits_indices()
        """(R,) rows whose logits are computed: the first `num_logits` are needed."""
        self.boundary_layers = {layer for segment in segments for layer in segment.boundaries}
        self.keeps_token_args = any(segment.token_args is not None for segment in segments)
        self.tuned: Collection[object] = ()
        """Attention modules whose queries are scaled by position; set by the runner."""
        # Set by the hooks.
        self.layer = -1
        self._num_changes = 0  # boundaries that changed rows
        self._token_args: dict[int, Tensor] = {}  # key -> one row per entered token
        self._gathered: dict[int, tuple[int, Tensor]] = {}  # key -> (change, rows in flight)

    @property
    def has_changed(self) -> bool:
        """The rows in flight are no longer those that entered."""
        return self._num_changes > 0

    @property
    def num_rows(self) -> int:
        """Rows in flight now."""
        return sum(segment.num_rows for segment in self.segments)

    @property
    def positions(self) -> Tensor:
        """(1, T) places in the text of the rows that enter."""
        parts = [segment.entering_positions for segment in self.segments]
        return self.filled(parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def filled(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Rows along `dim` with copies of the last behind them, at least `fewest_rows`."""
        num = rows.shape[dim]
        if not 0 < num < self.fewest_rows:
            return rows
        last = rows.narrow(dim, num - 1, 1)
        return torch.cat([rows, *[last] * (self.fewest_rows - num)], dim)

    @property
    def is_empty(self) -> bool:
        """Every row was deferred. One row is then carried on, unused, until each per-token
        argument has been seen once."""
        return self.has_changed and not self.num_rows

    @property
    def is_over(self) -> bool:
        """The remaining layers have nothing to do."""
        return self.is_empty and len(self._token_args) == self.spec.num_token_args

    def at_boundary(self, layer: int, hidden: Tensor) -> Tensor | None:
        """All segments at one boundary: (1, T, d) -> (1, T', d); None where nothing changes."""
        if layer not in self.boundary_layers or self.is_empty:
            return None
        parts = []
        changed = False
        start = 0
        for segment in self.segments:
            before = hidden[0, start : start + segment.num_rows]
            start += segment.num_rows
            after = segment.at_boundary(layer, before)
            changed |= after is not None
            parts.append(before if after is None else after)
        if not changed:
            return None
        self._num_changes += 1
        if not self.num_rows:
            return hidden[:, :1]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.filled(rows)[None]

    def restore(self, hidden: Tensor) -> Tensor:
        """Rows in flight at the end (1, T, d) -> rows that entered (1, T0, d), zeros where a row
        was deferred."""
        restored = hidden.new_zeros(1, len(self.token_ids), hidden.shape[-1])
        offset = 0
        start = 0
        for segment in self.segments:
            stayed = (segment.entered >= 0).nonzero()[:, 0]
            restored[0, segment.entered[stayed] + offset] = hidden[0, stayed + start]
            offset += len(segment.token_ids)
            start += segment.num_rows
        return restored

    def args_for_rows(self, spec: ArgSpec, value: Any) -> Any:
        """A layer's argument, with one row per row in flight."""
        if spec is None or value is None:
            return value
        if isinstance(spec, tuple):
            parts = zip(spec, value, strict=True)
            return type(value)(self.args_for_rows(part, inner) for part, inner in parts)
        if spec.key not in self._token_args:
            self._token_args[spec.key] = value.movedim(spec.dim, 0)
            self._keep_token_args(spec.key)
        if not self.has_changed:
            return value
        if self.is_empty:
            return value.narrow(spec.dim, 0, 1)
        return self._gather(spec)

    # --- per-token arguments ----------------------------------------------------------------

    def _logits_indices(self) -> Tensor:
        rows: list[int] = []
        offset = 0
        for segment in self.segments:
            rows += [offset + row for row in segment.logits_indices]
            offset += len(segment.token_ids)
        rows += rows[-1:] * (self.fewest_rows - len(rows))
        return torch.tensor(rows, dtype=torch.long, device=self.spec.device)

    def _keep_token_args(self, key: int) -> None:
        """Copies the argument's rows, by position, for segments whose rows may be revived. Drafts
        at one position overwrite each other: only prompt tokens are ever revived."""
        values = self._token_args[key]
        offset = 0
        for segment in self.segments:
            num = len(segment.token_ids)
            kept = segment.token_args
            if kept is not None and num:
                while len(kept) <= key:
                    kept.append(GrowableTensor())
                rows = values[offset : offset + num]
                kept[key].scatter(segment.entering_positions, rows, segment.last + 1)
            offset += num

    def _gather(self, spec: TokenArg) -> Tensor:
        """The argument's rows for all rows in flight, computed once per change of rows."""
        version, gathered = self._gathered.get(spec.key, (0, None))
        if gathered is not None and version == self._num_changes:
            return gathered
        parts = [
            self._rows_of(spec.key, segment, segment.positions, segment.entered)
            for segment in self.segments
        ]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        gathered = self.filled(rows).movedim(0, spec.dim)
        self._gathered[spec.key] = (self._num_changes, gathered)
        return gathered

    def _rows_of(self, key: int, segment: Segment, positions: Tensor, entered: Tensor) -> Tensor:
        """An argument's rows (T, ...) for rows of a segment: of this pass by offset, of an earlier
        one by position."""
        before = self.segments[: self.segments.index(segment)]
        offset = sum(len(other.token_ids) for other in before)
        rows = self._token_args[key][entered.clamp(min=0) + offset]
        if segment.token_args is None:
            return rows
        kept = segment.token_args[key].rows
        revived = (entered < 0).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(revived, kept[positions.clamp(max=len(kept) - 1)], rows)
