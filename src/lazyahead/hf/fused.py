"""RMSNorm and SiLU-gated MLPs in one loop each, in bfloat16 on the CPU (`native.c`) and in half
precision on a GPU (`triton_loops.py`), where a model's own modules prove to compute the same.

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
from lazyahead.hf.triton_loops import TritonLoops, triton_loops

_EPSILONS = ("variance_epsilon", "eps")
_WAYS = ((0.0, True), (0.0, False), (1.0, False))
"""What norms add to their weight, and whether they round before they multiply by it."""
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""Children of a gated MLP: all that it has."""

Forward = Callable[[Tensor], Tensor]
Loops = Native | TritonLoops


class Fused:
    """The modules of a model that have a loop of their own."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Forward]] = []
        known: dict[Any, Any] = {}  # what one module of a kind has shown
        for module in model.modules():
            forward = _norm(module, known) or _mlp(module, known)
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


def _norm(module: Any, known: dict[Any, Any]) -> Forward | None:
    """The loop for an RMSNorm."""
    names = [name for name in _EPSILONS if isinstance(getattr(module, name, None), float)]
    if [name for name, _ in module.named_parameters()] != ["weight"] or not names:
        return None
    weight, epsilon = module.weight, getattr(module, names[0])
    loops = _loops_for(weight)
    if loops is None or weight.ndim != 1 or weight.numel() % LANES:
        return None
    kind = (type(module), epsilon, *_kind(weight))
    if kind not in known:
        known[kind] = _way(module, loops, epsilon)
    way = known[kind]
    if way is None:
        return None
    own: Forward = partial(type(module).forward, module)

    def forward(hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or hidden_states.dtype != weight.dtype:
            return own(hidden_states)
        return loops.rms_norm(hidden_states, module.weight, epsilon, *way)

    return forward


@torch.no_grad()
def _way(module: Any, loops: Loops, epsilon: float) -> tuple[float, bool] | None:
    """Which of `_WAYS` a copy of the norm goes, with weights that tell them apart."""
    rows, trial = _drawn(module.weight), copy.deepcopy(module)
    trial.weight.copy_(rows[0, 0])
    fits = (w for w in _WAYS if _same(loops.rms_norm(rows, trial.weight, epsilon, *w), trial, rows))
    return next(fits, None)


def _mlp(module: Any, known: dict[Any, Any]) -> Forward | None:
    """The loop between the linear layers of a gated MLP."""
    if sorted(name for name, _ in module.named_children()) != sorted(_MLP):
        return None
    linears = [getattr(module, name) for name in _MLP[:3]]
    weights: list[Any] = [getattr(linear, "weight", None) for linear in linears]
    if not all(type(weight) is nn.Parameter for weight in weights):
        return None
    loops, kinds = _loops_for(weights[0]), {(weight.device, weight.dtype) for weight in weights}
    if loops is None or len(kinds) > 1 or weights[0].shape[0] % LANES:
        return None
    gate, up, down = linears
    dtype = weights[0].dtype
    own: Forward = partial(type(module).forward, module)

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != dtype or x.ndim != 3 or len(x) != 1:
            return own(x)
        out: Tensor = down(loops.silu_mul(gate(x), up(x)))
        return out

    kind = (type(module), type(module.act_fn), *_kind(gate.weight))
    if kind not in known:
        with torch.no_grad():
            rows = _drawn(gate.weight)
            known[kind] = _same(forward(rows), module, rows)
    return forward if known[kind] else None


def _loops_for(weight: Any) -> Loops | None:
    if type(weight) is not nn.Parameter:
        return None
    return native(weight.dtype) if weight.device.type == "cpu" else triton_loops(weight)


def _kind(weight: Tensor) -> tuple[Any, ...]:
    """What a loop may be compiled for."""
    return weight.device, weight.dtype, weight.shape


def _drawn(weight: Tensor) -> Tensor:
    """Rows (1, T, d) to try a module with this weight (..., d) on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 16, weight.shape[-1], generator=generator).mul_(3).to(weight)


@torch.no_grad()
def _same(ours: Tensor, module: nn.Module, rows: Tensor) -> bool:
    """Whether rows have the module's bits, but for rounding in one number of a hundred."""
    theirs = module(rows)
    near = torch.isclose(ours, theirs, rtol=2**-6, atol=float(theirs.abs().amax()) * 2**-8)
    return bool(near.all()) and int((ours != theirs).sum()) * 100 <= ours.numel()
