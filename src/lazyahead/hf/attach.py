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
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from lazyahead.errors import ConfigError, UnsupportedModelError
from lazyahead.hf.fused import Fused
from lazyahead.hf.int8 import why_not
from lazyahead.hf.packed import Packed, int8_of, packed_of
from lazyahead.hf.steady import fewest_rows

if TYPE_CHECKING:
    from lazyahead.hf.batch import Batch

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
        """Products that linear layers use while hooks are in place."""
        self.fewest_rows = 1
        """How many rows a pass must have, so that a row's bits do not depend on the others."""
        self._fused: Fused | None = None
        self._count = 0
        self._hooks = ExitStack()
        self._plain = threading.local()

    def pack(self, model: PreTrainedModel, wanted: bool | None) -> None:
        """Packs the weights, once for all engines, where `packed_of` says so. Raises ConfigError
        where packing is asked for and weights are in 8 bits."""
        with self.lock:
            if wanted and self.packed is not None and self.packed.is_int8:
                raise ConfigError(
                    "packed=True packs float weights, not those of int8; leave it out"
                )
            if self.packed is None:
                self.packed = packed_of(model, wanted)

    def quantize(self, model: PreTrainedModel) -> None:
        """Lets linear layers compute in 8-bit integers, for all engines. Raises ConfigError where
        the device or the processor cannot, UnsupportedModelError for a model without any."""
        reason = why_not() if model.device.type == "cpu" else f"the model is on {model.device}"
        if reason is not None:
            raise ConfigError(f"dtype int8 runs on a CPU: {reason}; use bfloat16")
        with self.lock:
            packed = int8_of(model)
            if packed is None:
                raise UnsupportedModelError(
                    f"{model.config.model_type} has no linear layer that dtype int8 could be for; "
                    "use bfloat16"
                )
            self.packed = packed

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

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Inside, hooks that are put in place leave linear layers as they are."""
        with self.lock:
            packed, self.packed = self.packed, None
            try:
                yield
            finally:
                self.packed = packed

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
            is_steady = self.packed is not None and self.packed.is_steady
            self.fewest_rows = 1 if is_steady else fewest_rows(model.device, model.dtype)
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


def dtype_name(model: PreTrainedModel) -> str:
    """What the model computes in: `float32`, `bfloat16`, `float16`, or `int8` where its linear
    layers do and the rest is in bfloat16."""
    packed = attachment_of(model).packed
    is_int8 = packed is not None and packed.is_int8
    return "int8" if is_int8 else str(model.dtype).removeprefix("torch.")
