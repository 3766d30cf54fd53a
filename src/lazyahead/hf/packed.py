"""Linear layers over weights that oneDNN has packed once, with the bits of plain ones in bf16.

Nothing of the model's code changes: while packed, each `nn.Linear` has an instance attribute
`forward`. Projections that read the same input (q, k, v; gate, up) share one packed weight and one
product. The packed weights stand beside the plain ones: they double the memory of the layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lazyahead.errors import ConfigError

ENVIRONMENT = "LAZYAHEAD_PACKED"
"""1 packs whatever the memory, 0 never does."""
_SPARE = 2
"""Weights are packed where so many times their bytes are free."""
_LARGE = 2**19
"""Weights of an fp32 product from which on packing pays for the call around it; measured."""
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that are called with the same input, one after another."""


def can_pack(module: nn.Module) -> bool:
    """A plain linear layer in bf16 or fp32 on the CPU that nobody has wrapped."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.bfloat16, torch.float32)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (module.weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def packed_of(model: nn.Module, wanted: bool | None = None) -> Packed | None:
    """The packed weights of a model; None where there is nothing to pack, or where it is not
    `wanted` (None: what the environment says, else where memory allows). Raises ConfigError."""
    if wanted is None:
        wanted = _environment()
    groups = _groups(model) if wanted is not False else []
    need = sum(member.weight.nbytes for group in groups for member in group)
    if not groups or (wanted is None and _SPARE * need > psutil.virtual_memory().available):
        return None
    return Packed(groups)


def _environment() -> bool | None:
    value = os.environ.get(ENVIRONMENT, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{ENVIRONMENT} is 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


class Packed:
    """Packed weights of a model, made once: about as long as reading the weights twice."""

    def __init__(self, groups: Sequence[Sequence[nn.Linear]]) -> None:
        self._groups = [_Group(members) for members in groups]

    @property
    def nbytes(self) -> int:
        """What the packed weights take on top of the plain ones."""
        return sum(group.nbytes for group in self._groups)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, linear layers use the packed weights, but for those whose weights have changed
        since."""
        try:
            for group in self._groups:
                group.attach()
            yield
        finally:
            for group in self._groups:
                group.detach()


def _groups(model: nn.Module) -> list[list[nn.Linear]]:
    groups: list[list[nn.Linear]] = []
    taken: set[int] = set()
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _SIBLINGS:
            members = [children[name] for name in names if name in children]
            linears = [member for member in members if isinstance(member, nn.Linear)]
            if len(linears) == len(names) and all(map(can_pack, linears)) and _fit(linears):
                groups.append(linears)
                taken.update(map(id, linears))
    for module in model.modules():
        if id(module) not in taken and isinstance(module, nn.Linear) and can_pack(module):
            groups.append([module])
    return [group for group in groups if _pays(group)]


def _pays(members: Sequence[nn.Linear]) -> bool:
    size = sum(member.weight.numel() for member in members)
    return members[0].weight.dtype != torch.float32 or size >= _LARGE


def _fit(members: Sequence[nn.Linear]) -> bool:
    return len({(m.in_features, m.weight.dtype, m.bias is None) for m in members}) == 1


class _Group:
    """Linear layers that share an input."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = members
        self._made_of = self._state()
        weight = torch.cat([member.weight.detach() for member in members])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        has_bias = members[0].bias is not None
        self.bias = torch.cat([m.bias.detach() for m in members]) if has_bias else None
        self.sizes = [member.out_features for member in members]
        self.nbytes = weight.nbytes
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def attach(self) -> None:
        """Where the weights are still those that were packed and nobody has wrapped the layers."""
        if not all(map(can_pack, self.members)) or self._state() != self._made_of:
            return
        for index, member in enumerate(self.members):
            member.forward = self._whole if len(self.members) == 1 else self._part(index)

    def detach(self) -> None:
        self._input, self._parts = None, {}
        for member in self.members:
            if getattr(member.__dict__.get("forward"), "__module__", None) == __name__:
                del member.forward

    def _state(self) -> list[tuple[int, int]]:
        """Changes with the weights, in place or replaced."""
        tensors = [part for m in self.members for part in (m.weight, m.bias) if part is not None]
        return [(part.data_ptr(), part._version) for part in tensors]

    def _whole(self, input: Tensor) -> Tensor:
        output: Tensor = self._product(input, self.weight, self.bias, "none", [], "")
        return output

    def _part(self, index: int) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            if self._input is not input or index not in self._parts:
                parts = self._whole(input).split_with_sizes(self.sizes, -1)
                self._parts, self._input = dict(enumerate(parts)), input
            part = self._parts.pop(index)
            if not self._parts:
                self._input = None
            return part

        return forward
