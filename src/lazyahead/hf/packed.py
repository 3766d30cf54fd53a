"""Products of linear layers on the CPU: over weights that oneDNN has packed once and, of few rows,
over the plain ones, with the bits of plain layers in bf16; or in 8-bit integers.

Nothing of the model's code changes: while attached, each `nn.Linear` has an instance attribute
`forward`. Projections that read the same input (q, k, v; gate, up) share one packed weight and one
product. Packed weights stand beside the plain ones: they double the memory of the layers, those of
8 bits add half of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lazyahead.errors import ConfigError
from lazyahead.hf.few_rows import few_rows
from lazyahead.hf.int8 import Int8Product
from lazyahead.hf.native import MOST_ROWS

ENVIRONMENT = "LAZYAHEAD_PACKED"
"""1 packs whatever the memory, 0 never does."""
_SPARE = 2
"""Weights are packed where so many times their bytes are free."""
_LARGE = 2**19
"""Weights of an fp32 product from which on packing pays for the call around it; measured."""
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that are called with the same input, one after another."""


def is_plain(module: nn.Module) -> bool:
    """A linear layer in bf16 or fp32 on the CPU that nobody has wrapped."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.bfloat16, torch.float32)
    )


def can_pack(module: nn.Module) -> bool:
    """A plain linear layer whose weights oneDNN can pack here."""
    return (
        is_plain(module)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (module.weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def packed_of(model: nn.Module, wanted: bool | None = None) -> Packed | None:
    """The products of a model's linear layers; None where torch's own are as good. Weights are not
    packed where that is not `wanted` (None: what the environment says, else where memory allows).
    Raises ConfigError."""
    if wanted is None:
        wanted = _environment()
    groups = _groups(model, can_pack)
    if wanted is None:
        need = sum(member.weight.nbytes for group in groups for member in group)
        wanted = _SPARE * need <= psutil.virtual_memory().available
    if wanted:
        return Packed(model, groups, _PackedProduct) if groups else None
    singles = [[member] for group in groups for member in group]
    few = [group for group in singles if few_rows(group) is not None]
    return Packed(model, few, _PlainProduct) if few else None


def int8_of(model: nn.Module) -> Packed | None:
    """The products of a model's linear layers in 8-bit integers; None where none can be."""
    groups = [
        group for group in _groups(model, is_plain) if group[0].weight.dtype == torch.bfloat16
    ]
    return Packed(model, groups, _int8_product) if groups else None


def _environment() -> bool | None:
    value = os.environ.get(ENVIRONMENT, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{ENVIRONMENT} is 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


class Product(Protocol):
    """What computes the outputs, side by side, of linear layers that share an input."""

    @property
    def nbytes(self) -> int:
        """What it holds on top of the plain weights."""

    @property
    def is_steady(self) -> bool:
        """Whether a row has the same bits in any company."""

    def __call__(self, input: Tensor) -> Tensor: ...


class Packed:
    """Products over the weights of a model, made once: about as long as reading them twice."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[nn.Linear]],
        make: Callable[[Sequence[nn.Linear]], Product],
    ) -> None:
        """`groups`: layers of the model, those that share an input together."""
        self._groups = [_Group(members, make(members)) for members in groups]
        self._is_all = _are_all(model, groups)
        self.is_int8 = make is _int8_product

    @property
    def nbytes(self) -> int:
        """What is held on top of the plain weights."""
        return sum(group.product.nbytes for group in self._groups)

    @property
    def is_steady(self) -> bool:
        """Whether all products of the model with its weights are attached here, and give a row the
        same bits in any company."""
        return self._is_all and all(
            group.is_attached and group.product.is_steady for group in self._groups
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, linear layers use these products, but for those whose weights have changed
        since."""
        try:
            for group in self._groups:
                group.attach()
            yield
        finally:
            for group in self._groups:
                group.detach()


def _groups(model: nn.Module, fits: Callable[[nn.Module], bool]) -> list[list[nn.Linear]]:
    """The layers of a model that fit, those together that share an input."""
    groups: list[list[nn.Linear]] = []
    taken: set[int] = set()
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _SIBLINGS:
            members = [children[name] for name in names if name in children]
            linears = [member for member in members if isinstance(member, nn.Linear)]
            if len(linears) == len(names) and all(map(fits, linears)) and _share(linears):
                groups.append(linears)
                taken.update(map(id, linears))
    for module in model.modules():
        if id(module) not in taken and isinstance(module, nn.Linear) and fits(module):
            groups.append([module])
    return [group for group in groups if _pays(group)]


def _are_all(model: nn.Module, groups: Sequence[Sequence[nn.Linear]]) -> bool:
    """Whether the model multiplies with no other weights than those of these layers."""
    members = {id(member) for members in groups for member in members}
    layers = [one for one in model.modules() if isinstance(one, nn.Linear | nn.Embedding)]
    weights = {id(layer.weight) for layer in layers}
    return all(id(layer) in members for layer in layers if isinstance(layer, nn.Linear)) and all(
        id(weight) in weights for weight in model.parameters() if weight.ndim > 1
    )


def _pays(members: Sequence[nn.Linear]) -> bool:
    size = sum(member.weight.numel() for member in members)
    return members[0].weight.dtype != torch.float32 or size >= _LARGE


def _share(members: Sequence[nn.Linear]) -> bool:
    return len({(m.in_features, m.weight.dtype, m.bias is None) for m in members}) == 1


def _joined(members: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of layers that share an input, as of one layer."""
    weight = torch.cat([member.weight.detach() for member in members])
    has_bias = members[0].bias is not None
    return weight, torch.cat([m.bias.detach() for m in members]) if has_bias else None


class _PackedProduct:
    """With the bits of plain layers."""

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        weight, self._bias = _joined(members)
        self.nbytes = weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._few = few_rows(members)
        self.is_steady = self._few is not None

    def __call__(self, input: Tensor) -> Tensor:
        if self._few is not None and input.numel() <= MOST_ROWS * input.shape[-1]:
            return self._few(input)
        output: Tensor = self._product(input, self._weight, self._bias, "none", [], "")
        return output


class _PlainProduct:
    """One layer over its plain weights."""

    nbytes = 0

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        (self._layer,), self._few = members, few_rows(members)
        self.is_steady = self._few is not None

    def __call__(self, input: Tensor) -> Tensor:
        if self._few is not None and input.numel() <= MOST_ROWS * input.shape[-1]:
            return self._few(input)
        return linear(input, self._layer.weight, self._layer.bias)


def _int8_product(members: Sequence[nn.Linear]) -> Product:
    return Int8Product(*_joined(members))


class _Group:
    """Linear layers that share an input."""

    def __init__(self, members: Sequence[Any], product: Product) -> None:
        self.members, self.product = members, product
        self._made_of = self._state()
        self._held = [part.detach() for part in self._tensors()]  # stay where they are
        self.sizes = [member.out_features for member in members]
        self.is_attached = False
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def attach(self) -> None:
        """Where the weights are still those that were packed and nobody has wrapped the layers."""
        if not all(map(is_plain, self.members)) or self._state() != self._made_of:
            return
        for index, member in enumerate(self.members):
            is_alone = len(self.members) == 1
            member.forward = _forward_of(self.product) if is_alone else self._part(index)
        self.is_attached = True

    def detach(self) -> None:
        self._input, self._parts, self.is_attached = None, {}, False
        for member in self.members:
            if getattr(member.__dict__.get("forward"), "__module__", None) == __name__:
                del member.forward

    def _state(self) -> list[tuple[int, int]]:
        """Changes with the weights, in place or replaced."""
        return [(part.data_ptr(), part._version) for part in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [part for m in self.members for part in (m.weight, m.bias) if part is not None]

    def _part(self, index: int) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            if self._input is not input or index not in self._parts:
                parts = self.product(input).split_with_sizes(self.sizes, -1)
                self._parts, self._input = dict(enumerate(parts)), input
            part = self._parts.pop(index)
            if not self._parts:
                self._input = None
            return part

        return forward


def _forward_of(product: Product) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        return product(input)

    return forward
