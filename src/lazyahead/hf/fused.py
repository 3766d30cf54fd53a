"""RMSNorm and SiLU-gated MLPs in bfloat16 on the CPU in one loop each (`native.c`), where a model's
own modules prove to compute the same.

Nothing of the model's code changes: inside `attached()` such modules have an instance attribute
`forward`. What a module computes is measured, not read from its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lazyahead.hf.native import LANES, Native, native

_EPSILONS = ("variance_epsilon", "eps")
_WAYS = ((0.0, True), (0.0, False), (1.0, False))
"""What norms add to their weight, and whether they round before they multiply by it."""
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""Children of a gated MLP: all that it has."""

Forward = Callable[[Tensor], Tensor]


class Fused:
    """The modules of a model that have a loop of their own."""

    def __init__(self, model: nn.Module) -> None:
        loops = native()
        self._forwards: list[tuple[nn.Module, Forward]] = []
        known: dict[Any, Any] = {}  # what one module of a kind has shown
        for module in model.modules() if loops is not None else ():
            assert loops is not None
            forward = _norm(module, loops, known) or _mlp(module, loops, known)
            if forward is not None:
                self._forwards.append((module, forward))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, modules that nobody has wrapped use their loops, but where gradients are due."""
        changed: list[Any] = []
        try:
            for module, forward in self._forwards:
                if _is_plain(module):
                    module.forward = forward
                    changed.append(module)
            yield
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)


def _is_plain(module: nn.Module) -> bool:
    """Nobody has wrapped the module, or looks at what is computed inside."""
    act = getattr(module, "act_fn", None)
    looks = isinstance(act, nn.Module) and (act._forward_hooks or act._forward_pre_hooks)
    return "forward" not in module.__dict__ and not looks


def _norm(module: Any, loops: Native, known: dict[Any, Any]) -> Forward | None:
    """The loop for an RMSNorm."""
    names = [name for name in _EPSILONS if isinstance(getattr(module, name, None), float)]
    if [name for name, _ in module.named_parameters()] != ["weight"] or not names:
        return None
    weight, epsilon = module.weight, getattr(module, names[0])
    if weight.ndim != 1 or weight.numel() % LANES or not _is_ours(weight):
        return None
    kind = (type(module), epsilon)
    if kind not in known:
        known[kind] = _way(module, loops, epsilon)
    way = known[kind]
    if way is None:
        return None
    own: Forward = partial(type(module).forward, module)

    def forward(hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or hidden_states.dtype != torch.bfloat16:
            return own(hidden_states)
        return loops.rms_norm(hidden_states, module.weight, epsilon, *way)

    return forward


@torch.no_grad()
def _way(module: Any, loops: Native, epsilon: float) -> tuple[float, bool] | None:
    """Which of `_WAYS` a copy of the norm goes, with weights that tell them apart."""
    rows, trial = _drawn(module.weight.numel()), copy.deepcopy(module)
    trial.weight.copy_(_drawn(module.weight.numel())[0, 0])
    fits = (w for w in _WAYS if _same(loops.rms_norm(rows, trial.weight, epsilon, *w), trial, rows))
    return next(fits, None)


def _mlp(module: Any, loops: Native, known: dict[Any, Any]) -> Forward | None:
    """The loop between the linear layers of a gated MLP."""
    if sorted(name for name, _ in module.named_children()) != sorted(_MLP):
        return None
    linears = [getattr(module, name) for name in _MLP[:3]]
    weights = [getattr(linear, "weight", None) for linear in linears]
    if not all(map(_is_ours, weights)) or linears[0].weight.shape[0] % LANES:
        return None
    gate, up, down = linears
    own: Forward = partial(type(module).forward, module)

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or x.ndim != 3 or len(x) != 1:
            return own(x)
        out: Tensor = down(loops.silu_mul(gate(x), up(x)))
        return out

    kind = (type(module), type(module.act_fn))
    if kind not in known:
        with torch.no_grad():
            rows = _drawn(gate.in_features)
            known[kind] = _same(forward(rows), module, rows)
    return forward if known[kind] else None


def _is_ours(weight: Any) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
    )


def _drawn(width: int) -> Tensor:
    """Rows (1, T, width) to try a module on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 16, width, generator=generator).mul_(3).to(torch.bfloat16)


@torch.no_grad()
def _same(ours: Tensor, module: nn.Module, rows: Tensor) -> bool:
    """Whether rows have the module's bits, but for rounding in one number of a hundred."""
    theirs = module(rows)
    near = torch.isclose(ours, theirs, rtol=2**-6, atol=float(theirs.abs().amax()) * 2**-8)
    return bool(near.all()) and int((ours != theirs).sum()) * 100 <= ours.numel()
