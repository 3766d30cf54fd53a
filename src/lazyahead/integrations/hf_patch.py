"""`model.generate` replaced while blocks are open, and put back when the last one has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

T = TypeVar("T")
_changing = threading.Lock()
"""Held while blocks are opened or closed."""


class Patch(Generic[T]):
    """The replaced `generate` of one model. Blocks may end in any order: the one that was opened
    last, of those that are open, counts; with none open the model's own is called."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._before = model, model.__dict__.get("generate")
        self._plain: Callable[..., Any] = model.generate
        self._open: list[tuple[T, Callable[..., Any]]] = []
        self._calling = threading.RLock()

        def generate(*args: Any, **kwargs: Any) -> Any:
            with self._calling:  # one model, one call at a time
                if not self._open:
                    return self._plain(*args, **kwargs)
                block, call = self._open[-1]
                return call(block, self._plain, *args, **kwargs)

        generate._lazyahead_patch = self  # type: ignore[attr-defined]
        self._generate = generate
        model.generate = generate

    def close(self, block: T) -> None:
        """Ends a block; after the last one the model is as before."""
        with _changing:
            self._open = [entry for entry in self._open if entry[0] is not block]
            if self._open or self._model.__dict__.get("generate") is not self._generate:
                return
            if self._before is None:
                del self._model.generate
            else:
                self._model.generate = self._before


def open_block(model: PreTrainedModel, block: T, call: Callable[..., Any]) -> Patch[T]:
    """From now on `model.generate(...)` is `call(block, plain, ...)`, where `plain` is the model's
    own, until the patch is told to `close` the block."""
    with _changing:
        known = getattr(model.__dict__.get("generate"), "_lazyahead_patch", None)
        patch: Patch[T] = known if known is not None else Patch(model)
        patch._open.append((block, call))
        return patch
