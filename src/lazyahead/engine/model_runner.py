"""What runs passes: `hf.forward.Runner`, or `hf.plain.PlainRunner` for models that only decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from lazyahead.prefill.policy import Segment


class Runner(Protocol):
    """What runs passes: `hf.forward.Runner`, or `hf.plain.PlainRunner` for models that only decode."""

    on_layer: Callable[[int], None] | None

    def attached(self) -> AbstractContextManager[Any]: ...

    def run(self, segments: Sequence[Segment]) -> Tensor: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def attends_fully(self) -> Sequence[bool]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def single_request_only(self) -> bool:
        """Requests must not share passes and prompts must not be split."""

    def may_draft(self, start: int, end: int) -> bool:
        """Whether drafts up to position `end` leave the root at `start` as it is without them."""
