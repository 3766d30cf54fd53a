"""Models that keep a state of their own (recurrent, hybrid): their own forward and cache, one
request at a time."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazyahead.errors import LazyAheadError, OutOfMemoryError
from lazyahead.hf.segment import Segment

_CACHES = ("past_key_values", "cache_params", "state")
"""Names under which models hand back what they remember."""


class PlainRunner:
    """Runs rows through the model as it is. Nothing can be deferred or taken back."""

    single_request_only = True
    num_layers = 0
    attends_fully: Sequence[bool] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._caches: weakref.WeakKeyDictionary[Any, tuple[int, dict[str, Any]]] = (
            weakref.WeakKeyDictionary()
        )
        """Of each session, how many tokens were read, and what the model remembers of them."""
        self._accepts = set(inspect.signature(model.forward).parameters)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def may_draft(self, start: int, end: int) -> bool:
        """Never: what was written cannot be taken back."""
        return False

    def max_drafts(self, num_requests: int) -> int | None:
        """None may be drafted."""
        return 0

    @contextmanager
    def attached(self) -> Iterator[PlainRunner]:
        """Nothing to attach."""
        yield self

    @torch.no_grad()
    def run(
        self, segments: Sequence[Segment], on_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """Logits (R, V) of the rows of one segment that need them; `on_layer` is not called.

        Behind a cache tokens go one by one: several models of transformers use their recurrent
        state only then. Raises LazyAheadError when the state that this segment continues is lost.
        """
        (segment,) = segments
        token_ids = list(segment.token_ids)
        positions = segment.entering_positions
        start = int(positions[0])
        num_read, cache = self._caches.pop(segment.owner, (0, {}))
        if start not in (0, num_read):  # a pass that failed left nothing behind
            raise LazyAheadError(
                f"the state after {start} tokens of this conversation was lost; start a new one"
            )
        first = min(segment.logits_indices, default=len(token_ids))
        if start == 0:
            logits, cache = self._forward(token_ids, positions, {}, len(token_ids) - first)
        else:
            parts: list[Tensor] = []
            for row, token_id in enumerate(token_ids):
                row_logits, cache = self._forward(
                    [token_id], positions[row : row + 1], cache, int(row >= first)
                )
                parts.append(row_logits)
            logits = torch.cat(parts)
        self._caches[segment.owner] = (start + len(token_ids), cache)
        return logits[[row - first for row in segment.logits_indices]]

    def _forward(
        self, token_ids: list[int], positions: Tensor, cache: dict[str, Any], num_last: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits (num_last, V) of the last rows, and what the model remembers after them."""
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([token_ids], device=self.device),
            **cache,
        }
        if "position_ids" in self._accepts:
            inputs["position_ids"] = positions[None]
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = max(1, num_last)
        try:
            output = self.model(**inputs, use_cache=True, return_dict=True)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no memory left on {self.device}; shorten the prompt"
            ) from error
        kept = {
            name: output[name]
            for name in _CACHES
            if name in self._accepts and output.get(name) is not None
        }
        if not kept:
            raise LazyAheadError(
                f"{type(self.model).__name__} returns no cache, so it cannot go on from its prompt"
            )
        logits: Tensor = output.logits[0]
        return logits[logits.shape[0] - num_last :], kept
