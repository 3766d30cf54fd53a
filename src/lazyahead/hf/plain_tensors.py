"""Tensors that live on after the block they were made in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Inside, no gradients are kept, and what is made can be written to later, also where the
    caller works in `torch.inference_mode`: tensors of that mode cannot leave it."""
    with torch.inference_mode(False), torch.no_grad():
        yield
