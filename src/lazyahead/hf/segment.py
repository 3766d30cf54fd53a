"""The rows of one request in a batch, and what a policy may ask of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lazyahead.cache.kv import GrowableTensor, LayerKV
from lazyahead.cache.stash import Stash
from lazyahead.hf.attention import attend
from lazyahead.hf.rows import AttentionParams, LocalWindow, QueryRows, Shared
from lazyahead.hf.scores import attention_weights, reduce_heads


class Watch(NamedTuple):
    """What a policy acts on at a boundary: attention above `threshold` to a stashed token."""

    stash: Stash
    threshold: float

    @property
    def slots(self) -> Tensor:
        """(S,) where the keys of stashed tokens stand."""
        return self.stash.slots[self.stash.live]


class Policy:
    """Decides at layer boundaries which rows of a segment continue. This one keeps all of them.

    A policy declares what it needs; the segment computes that and nothing else. Attention reaches
    it through `observe`, hidden states through `at_boundary`.
    """

    score_queries: Mapping[int, int] = {}
    """Layer -> number of last rows whose attention weights `observe` receives there."""
    head_reduction: str = "mean"
    """How the weights of all heads become one: `mean` or `max`."""
    boundary_layers: Collection[int] = ()
    """Layers before which `at_boundary` is called."""
    local: LocalWindow | None = None
    """Which rows attend to a window only, in the layers `local_layers`."""
    local_layers: range = range(0)
    needs_token_args: bool = False
    """Whether rows may be revived, so that their per-token layer arguments are kept."""
    is_placeholder: bool = False
    """Whether the one row in flight only stands for rows stashed at a deeper layer: it has no keys
    and attends to nothing."""

    def watches(self) -> Mapping[int, Watch] | None:
        """By layer whose attention is observed, what makes this policy change rows at the boundary
        above: where nothing exceeds a threshold, all rows go on. None: more decides."""
        return None if self.boundary_layers else {}

    def observe(self, layer: int, weights: Tensor) -> None:
        """Weights (Q, N) of the last Q rows over the N keys of `layer`, heads reduced, fp32."""

    def at_boundary(self, layer: int, hidden: Tensor, segment: Segment) -> Tensor | None:
        """Rows (T, d) about to enter `layer` -> rows that enter it; None where nothing changes.

        Updates `segment.positions` and `segment.entered` to match.
        """


KEEP_ALL = Policy()
"""Every row goes through every layer."""


class Segment:
    """The rows of one request during one pass. Boundaries change which rows these are."""

    def __init__(
        self,
        kv: Sequence[LayerKV],
        token_ids: Sequence[int],
        positions: Sequence[int],
        logits_indices: Sequence[int],
        device: torch.device,
        *,
        ancestors: Tensor | None = None,
        owner: object = None,
        boundaries: Collection[int] = (),
        policy: Policy = KEEP_ALL,
        token_args: list[GrowableTensor] | None = None,
    ) -> None:
        """`positions` belong to `token_ids`; the last of them are drafts where `ancestors` (M, M)
        says which draft descends from which. `owner` identifies the conversation, for models that
        keep a cache of their own. `boundaries` are the layers from which on the cache
        holds other tokens than below. `token_args` holds the model's per-token layer arguments by
        position, for rows that may be revived."""
        # Set here, constant during the pass.
        self.kv = kv
        self.token_ids = token_ids
        self.logits_indices = logits_indices
        self.ancestors = ancestors
        self.owner = owner
        self.boundaries = boundaries
        self.policy = policy
        self.token_args = token_args
        self.entering_places = positions
        self.last = max(positions)
        is_text = ancestors is None and self.last - positions[0] == len(positions) - 1
        self._first = positions[0] if is_text else None
        self.entering_positions = torch.tensor(positions, device=device)
        # Set by the policy at boundaries.
        self.positions = self.entering_positions
        self.entered = torch.arange(len(positions), device=device)
        self.shared = Shared()
        """Valid up to the next boundary."""

    @property
    def num_rows(self) -> int:
        """Rows in flight now."""
        return self.positions.numel()

    @property
    def num_drafts(self) -> int:
        return 0 if self.ancestors is None else self.ancestors.shape[0]

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams
    ) -> Tensor:
        """Appends keys and values (1, H_kv, T, D), returns the output (1, T, H, D_v)."""
        policy = self.policy
        num_heads, num_rows = query.shape[1:3]
        if policy.is_placeholder:
            return query.new_zeros(1, num_rows, num_heads, values.shape[-1])
        kv = self.kv[layer]
        kv.append(keys, values, self.positions)
        local = policy.local if layer in policy.local_layers else None
        first = self._first if self.positions is self.entering_positions else None
        rows = QueryRows(self.positions, self.last, self.ancestors, self.shared, first, local)
        num_queries = policy.score_queries.get(layer, 0)
        if num_queries:
            last = query[:, :, -num_queries:]
            weights = attention_weights(last, kv, rows, params)
            policy.observe(layer, reduce_heads(weights, policy.head_reduction, params.ranks))
        num_read = num_rows if layer < len(self.kv) - 1 else self._num_read()
        if num_read == num_rows:
            return attend(query, keys, kv, rows, params)
        output = query.new_zeros(1, num_rows, num_heads, values.shape[-1])
        if num_read:
            rows = QueryRows(self.positions[-1:], self.last, None)
            output[:, -1:] = attend(query[:, :, -1:], keys[:, :, -1:], kv, rows, params)
        return output

    def _num_read(self) -> int:
        """How many last rows of the last layer's output are read: of a prompt's, none or one."""
        if self.ancestors is not None or self.num_rows == 1:
            return self.num_rows
        if not self.logits_indices:
            return 0
        is_last = list(self.logits_indices) == self.entered[-1:].tolist()
        return 1 if is_last else self.num_rows

    def at_boundary(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Asks the policy which rows (T, d) enter `layer`; None where nothing changes."""
        if layer in self.boundaries:
            self.shared = Shared()
        if layer not in self.policy.boundary_layers:
            return None
        return self.policy.at_boundary(layer, hidden, self)

    def keep(self, stays: Tensor) -> None:
        """Only the rows (T,) bool stay in flight."""
        self.positions = self.positions[stays]
        self.entered = self.entered[stays]

    def replace(self, positions: Tensor, entered: Tensor) -> None:
        """Other rows (T,) are in flight now. `entered` is -1 for revived rows."""
        self.positions = positions
        self.entered = entered
