"""Models that keep a state of their own (recurrent, hybrid): their own forward and cache, one request at a time."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazyahead.errors import LazyAheadError, OutOfMemoryError

_CACHES = ("past_key_values", "cache_params", "state")
"""Names under which models hand back what they remember."""


class _Flight(Protocol):
    token_ids: Sequence[int]
    entering_positions: Tensor

    @property
    def session(self) -> Any: ...

    @property
    def speaks(self) -> Sequence[int]: ...


class PlainRunner:
    """Runs rows through the model as it is. Nothing can be deferred or taken back."""

    travels_alone = True
    num_layers = 0
    attends_fully: Sequence[bool] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.on_layer: Callable[[int], None] | None = None
        self._caches: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self._accepts = set(inspect.signature(model.forward).parameters)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def attached(self) -> Iterator[PlainRunner]:
        """Nothing to attach."""
        yield self

    @torch.no_grad()
    def run(self, flights: Sequence[_Flight]) -> Tensor:
        """Logits (R, V) of the rows that speak of one flight."""
        (flight,) = flights
        cache = self._caches.get(flight.session, {})
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(flight.token_ids)], device=self.device), **cache}
        if "position_ids" in self._accepts:
            inputs["position_ids"] = flight.entering_positions[None]
        try:
            output = self.model(**inputs, use_cache=True, return_dict=True)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"no memory left on {self.device}; shorten the prompt") from error
        kept = {name: output[name] for name in _CACHES if name in self._accepts and output.get(name) is not None}
        if not kept:
            raise LazyAheadError(f"{type(self.model).__name__} hands back no cache, so it cannot go on from its prompt")
        self._caches[flight.session] = kept
        logits: Tensor = output.logits[0]
        return logits[logits.shape[0] - len(flight.token_ids) :][list(flight.speaks)]
