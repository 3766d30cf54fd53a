"""Hooks on a model, shared by all engines that use it: counted, and gone when the last one leaves.

One lock per model lets passes alternate between engines and threads. Plain calls of the model from
other threads take the same lock, so that they never see the attention function of a pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lazyahead.hf.batch import Batch
from lazyahead.hf.fused import Fused
from lazyahead.hf.packed import Packed, packed_of

current: ContextVar[Batch | None] = ContextVar("lazyahead_batch", default=None)
"""The pass that runs in this context; None outside passes."""


class Attachment:
    """The hooks of one model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held during every pass, probe and plain call."""
        self.owner: Any = None
        """What the hooks were made for; another owner gets new ones."""
        self.packed: Packed | None = None
        """Packed weights that linear layers use while hooks are in place."""
        self._fused: Fused | None = None
        self._count = 0
        self._hooks = ExitStack()
        self._plain = threading.local()

    def pack(self, model: PreTrainedModel, wanted: bool | None) -> None:
        """Packs the weights, once for all engines, where `packed_of` says so."""
        with self.lock:
            if self.packed is None:
                self.packed = packed_of(model, wanted)

    def fuse(self, model: PreTrainedModel) -> None:
        """Finds the modules that have loops of their own, once for all engines."""
        with self.lock:
            if self._fused is None:
                self._fused = Fused(model)

    @contextmanager
    def attached(
        self, model: PreTrainedModel, owner: Any, hook_up: Callable[[ExitStack], None]
    ) -> Iterator[None]:
        """Inside, the hooks that `hook_up` registers are in place. Blocks may nest and overlap in
        any order, in any thread."""
        self._enter(model, owner, hook_up)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def guarded(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, plain calls of the model that other threads begin wait for the end."""
        with self.lock, ExitStack() as stack:
            self._guard(model, stack)
            yield

    def _enter(
        self, model: PreTrainedModel, owner: Any, hook_up: Callable[[ExitStack], None]
    ) -> None:
        with self.lock:
            if self._count and self.owner is not owner:  # the model was changed meanwhile
                self._hooks.close()
            if not self._count or self.owner is not owner:
                self._hook(model, hook_up)
                self.owner = owner
            self._count += 1

    def _leave(self) -> None:
        with self.lock:
            self._count -= 1
            if self._count == 0:
                self._hooks.close()
                self.owner = None

    def _hook(self, model: PreTrainedModel, hook_up: Callable[[ExitStack], None]) -> None:
        with ExitStack() as stack:
            self._guard(model, stack)
            hook_up(stack)
            if self._fused is not None:
                stack.enter_context(self._fused.attached())
            if self.packed is not None:
                stack.enter_context(self.packed.attached())
            self._hooks = stack.pop_all()

    def _guard(self, model: PreTrainedModel, stack: ExitStack) -> None:
        stack.callback(model.register_forward_pre_hook(self._begin_plain).remove)
        after = model.register_forward_hook(self._end_plain, always_call=True)
        stack.callback(after.remove)

    def _begin_plain(self, module: nn.Module, args: Any) -> None:
        if current.get() is not None:
            return
        self.lock.acquire()
        if not self._count:  # the hooks left while this call was on its way in
            self.lock.release()
            return
        self._plain.depth = getattr(self._plain, "depth", 0) + 1

    def _end_plain(self, module: nn.Module, args: Any, output: Any) -> None:
        depth: int = getattr(self._plain, "depth", 0)
        if current.get() is None and depth:
            self._plain.depth = depth - 1
            self.lock.release()


_attachments: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()


def attachment_of(model: PreTrainedModel) -> Attachment:
    """The one attachment of a model."""
    with _registry_lock:
        return _attachments.setdefault(model, Attachment())
