"""Products of linear layers. On the CPU: over weights that oneDNN has packed once and, of few rows,
over the plain ones, with the bits of plain layers in bf16; or in 8-bit integers. On a GPU: of few
rows, over the plain weights.

Nothing of the model's code changes: while attached, each `nn.Linear` has an instance attribute
`forward`. Projections that read the same input (q, k, v; gate, up) share one product, and one
packed weight. Packed weights stand beside the plain ones: they double the memory of the layers,
those of 8 bits add half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from lazyahead.checks import environment_flag
from lazyahead.hf.few_rows import few_rows
from lazyahead.hf.int8 import Int8Weights
from lazyahead.hf.native import MOST_ROWS, Rows
from lazyahead.hf.ranks import num_ranks
from lazyahead.hf.triton_loops import fits, triton_loops

ENVIRONMENT = "LAZYAHEAD_PACKED"
"""1 packs whatever the memory, 0 never does."""
_SPARE = 2
"""Weights are packed where so many times their bytes are free."""
_LARGE = 2**19
"""Weights of an fp32 product from which on packing pays for the call around it; measured."""
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that are called with the same input, one after another."""


def is_plain(module: nn.Module) -> bool:
    """A linear layer that nobody has wrapped, with weights that are plain numbers."""
    is_linear = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return is_linear and "forward" not in module.__dict__


def is_on_cpu(module: nn.Module) -> bool:
    """A plain linear layer in bf16 or fp32 on the CPU."""
    return (
        is_plain(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.bfloat16, torch.float32)
    )


def can_pack(module: nn.Module) -> bool:
    """A plain linear layer whose weights oneDNN can pack here."""
    return (
        is_on_cpu(module)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (module.weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def has_kernels(module: nn.Module) -> bool:
    """A plain linear layer on a GPU that has products of its own for few rows."""
    weight: Any = module.weight if is_plain(module) else None
    return weight is not None and fits(weight) and triton_loops(weight) is not None


def packed_of(model: nn.Module, wanted: bool | None = None) -> Packed | None:
    """The products of a model's linear layers; None where torch's own are as good. Weights are not
    packed where that is not `wanted` (None: what the environment says, else where memory allows).
    Raises ConfigError."""
    if wanted is None:
        wanted = environment_flag(ENVIRONMENT)
    on_gpu = _groups(model, has_kernels) if num_ranks(model) == 1 else []
    if on_gpu:
        return _made(model, on_gpu, _gpu_product)
    groups = _groups(model, can_pack)
    if wanted is None:
        need = sum(member.weight.nbytes for group in groups for member in group)
        wanted = _SPARE * need <= psutil.virtual_memory().available
    if wanted:
        return _made(model, groups, _packed_product)
    members = [member for group in groups for member in group]
    few = {member: few_rows([member]) for member in members}
    return _made(
        model,
        [[member] for member in members if few[member] is not None],
        lambda group: Product(few[group[0]], partial(nn.Linear.forward, group[0]), True),
    )


def int8_of(model: nn.Module) -> Packed | None:
    """The products of a model's linear layers in 8-bit integers; None where none can be."""
    groups = [
        group for group in _groups(model, is_on_cpu) if group[0].weight.dtype == torch.bfloat16
    ]
    return _made(model, groups, _int8_product, is_int8=True)


def _made(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Linear]],
    product: Callable[[Sequence[nn.Linear]], Product],
    is_int8: bool = False,
) -> Packed | None:
    made = [_Group(members, product(members)) for members in groups]
    return Packed(made, _are_all(model, groups), is_int8) if made else None


class Product(NamedTuple):
    """What computes the outputs, side by side, of linear layers that share an input."""

    few: Rows | None
    """Of up to `MOST_ROWS` rows; None where they go with the many."""
    many: Rows | None
    """Of more; None where each layer multiplies by itself."""
    is_steady: bool
    """Whether a row has the same bits in any company."""
    nbytes: int = 0
    """What is held on top of the plain weights."""

    def forward(self, input: Tensor) -> Tensor:
        if self.few is not None and (self.many is None or _are_few(input)):
            return self.few(input)
        assert self.many is not None
        return self.many(input)


def _are_few(input: Tensor) -> bool:
    return input.numel() <= MOST_ROWS * input.shape[-1]


class Packed:
    """Products over the weights of a model, made once: about as long as reading them twice."""

    def __init__(self, groups: Sequence[_Group], are_all: bool, is_int8: bool) -> None:
        """`groups`: layers of a model, those that share an input together. `are_all`: whether the
        model multiplies with no other weights."""
        self._groups, self._are_all, self.is_int8 = groups, are_all, is_int8

    @property
    def nbytes(self) -> int:
        """What is held on top of the plain weights."""
        return sum(group.product.nbytes for group in self._groups)

    @property
    def is_steady(self) -> bool:
        """Whether all products of the model with its weights are attached here, and give a row the
        same bits in any company."""
        return self._are_all and all(
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
    kinds = {(m.in_features, m.weight.dtype, m.weight.device, m.bias is None) for m in members}
    return len(kinds) == 1


def _joined(members: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of layers that share an input, as of one layer."""
    weight = torch.cat([member.weight.detach() for member in members])
    has_bias = members[0].bias is not None
    return weight, torch.cat([m.bias.detach() for m in members]) if has_bias else None


def _packed_product(members: Sequence[nn.Linear]) -> Product:
    """With the bits of plain layers."""
    weight, bias = _joined(members)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    product = torch.ops.mkldnn._linear_pointwise.default

    def many(input: Tensor) -> Tensor:
        output: Tensor = product(input, packed, bias, "none", [], "")
        return output

    few = few_rows(members)
    return Product(few, many, few is not None, weight.nbytes)


def _gpu_product(members: Sequence[nn.Linear]) -> Product:
    """Rows have other bits where there are many of them."""
    loops = triton_loops(members[0].weight)
    assert loops is not None
    return Product(loops.linear([(m.weight, m.bias) for m in members]), None, False)


def _int8_product(members: Sequence[nn.Linear]) -> Product:
    weights = Int8Weights(*_joined(members))
    return Product(weights.few, weights.many, True, weights.nbytes)  # sums have no order


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
            is_alone = len(self.members) == 1 and self.product.many is not None
            member.forward = self.product.forward if is_alone else self._part(index)
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
        own = partial(nn.Linear.forward, self.members[index])
        is_of_few = self.product.many is None

        def forward(input: Tensor) -> Tensor:
            if is_of_few and (torch.is_grad_enabled() or not _are_few(input)):
                return own(input)
            if self._input is not input or index not in self._parts:
                parts = self.product.forward(input).split_with_sizes(self.sizes, -1)
                self._parts, self._input = dict(enumerate(parts)), input
            part = self._parts.pop(index)
            if not self._parts:
                self._input = None
            return part

        return forward
