"""Where a model's parts are and what its layers see, found by watching it run, never by family
name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lazyahead.hf.load import max_context
from lazyahead.hf.ranks import num_ranks
from lazyahead.hf.rope import Rope, growing_rope
from lazyahead.hf.trace import AttentionCall, LayerCall, MaskRule, Trace, Unfit, all_configs, trace

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types whose whole memory is keys and values by position."""
_HONOURED = {
    "scaling",
    "sliding_window",
    "softcap",
    "s_aux",
    "is_causal",
    "dropout",
    "position_ids",
    "cache_position",
}
"""What attention may be called with: heeded, or without effect on which token sees what. Flags
(bool) aside."""
_FARTHEST = 1 << 20
"""Windows that are wider than this are none."""


@dataclass(frozen=True)
class TokenArg:
    """An argument of layers that holds one row per token in the pass: rotary tables, position ids
    and the like."""

    key: int
    """Layers that are handed one and the same object share a key."""
    dim: int
    """Along which the rows stand."""


ArgSpec = TokenArg | tuple["ArgSpec | None", ...] | None
"""Which parts of an argument are tables; a tuple mirrors an argument that is a tuple or list."""


@dataclass(frozen=True)
class ModelSpec:
    """The parts of one model that the seams need."""

    layer_list: nn.ModuleList
    """The module list that holds the layers."""
    members: tuple[nn.Module, ...]
    """All that stood in it, in order."""
    layers: tuple[nn.Module, ...]
    """Those that attend, in order; layers that run only beside pictures or sound are left out."""
    head: nn.Module
    configs: tuple[PretrainedConfig, ...]
    """Every config object that chooses an attention function."""
    windows: tuple[int | None, ...]
    """Per layer: a row sees keys less than this many positions back."""
    chunks: tuple[int | None, ...]
    """Per layer: a row sees keys of its own chunk of this many positions."""
    widths: tuple[int, ...]
    """Per layer: query heads times their size."""
    arg_specs: tuple[dict[int | str, ArgSpec], ...]
    """Per layer: the tables among its arguments, by place or name."""
    num_token_args: int
    ranks: int
    """Processes that each hold a share of the heads."""
    rope: Rope | None
    """Rotary tables that change with the longest position in a pass: requests then travel alone and
    unsplit."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the model still has the head and the layers that were inspected, in order."""
        same = [*map(id, self.layer_list)] == [*map(id, self.members)]
        has_list = any(module is self.layer_list for module in model.modules())
        return same and has_list and model.get_output_embeddings() is self.head

    @property
    def layer_types(self) -> tuple[str, ...]:
        """What each layer's mask does, in the words of transformers."""
        return tuple(
            "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
            for window, chunk in zip(self.windows, self.chunks, strict=True)
        )

    @property
    def attends_fully(self) -> tuple[bool, ...]:
        """Which layers see every earlier token."""
        return tuple(kind == "full_attention" for kind in self.layer_types)

    @property
    def device(self) -> torch.device:
        """Where the first layer lives: input goes there."""
        return next(self.layers[0].parameters()).device


def inspect_model(model: PreTrainedModel) -> ModelSpec:
    """The parts of a model. Raises Unfit with the reason why its tokens cannot be deferred."""
    foreign = sorted(set(declared_types(model)) - ATTENTION_TYPES)
    if foreign:
        raise Unfit(
            f"layers of type {', '.join(foreign)} keep a state that no token can join later"
        )
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1:
        raise Unfit(f"its weights lie on several devices ({', '.join(devices)})")
    head = model.get_output_embeddings()
    if head is None:
        raise Unfit("the model has no output head")
    short, long = _traces(model)
    layer_list, layers = _layers(model, short)
    calls = _calls_by_layer(layers, short)
    reaches = _reaches(calls, max_context(model))
    token_args: dict[tuple[int, int, int], TokenArg] = {}
    arg_specs = tuple(
        _arg_specs(short.entries[layer], long.entries[layer], token_args) for layer in layers
    )
    return ModelSpec(
        layer_list=layer_list,
        members=tuple(layer_list),
        layers=layers,
        head=head,
        configs=all_configs(model),
        windows=tuple(window for window, _ in reaches),
        chunks=tuple(chunk for _, chunk in reaches),
        widths=tuple(call.query.shape[1] * call.query.shape[3] for call in calls),
        arg_specs=arg_specs,
        num_token_args=len(token_args),
        ranks=num_ranks(model),
        rope=growing_rope(model),
    )


def declared_types(model: PreTrainedModel) -> tuple[str, ...]:
    """Layer types as the config names them; empty where it does not."""
    config = model.config.get_text_config()
    names = ("layer_types", "layers_block_type")
    return tuple(next((kinds for name in names if (kinds := getattr(config, name, None))), ()))


def _traces(model: PreTrainedModel) -> tuple[Trace, Trace]:
    """Two traces with different numbers of tokens: what differs in shape has a row per token."""
    try:
        traces = trace(model, 5), trace(model, 7)
    except Exception:
        if getattr(model, "_supports_attention_backend", True):
            raise
        traces = Trace(5, [], {}), Trace(7, [], {})
    if not traces[0].calls:
        raise Unfit("its attention is not called through transformers' attention interface")
    return traces


def _layers(model: nn.Module, seen: Trace) -> tuple[nn.ModuleList, tuple[nn.Module, ...]]:
    """The one module list that holds every attention that was called, and its members that do."""
    callers = {call.module for call in seen.calls}
    best: list[nn.Module] = []
    ran: list[nn.Module] = []
    found: nn.ModuleList | None = None
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        inside = [member for member in stack if not callers.isdisjoint(member.modules())]
        if len(inside) > len(best) and callers.issubset(
            part for member in inside for part in member.modules()
        ):
            best = inside
            ran = [member for member in stack if member in seen.entries]
            found = stack
    if found is None:
        raise Unfit("its attention calls do not come from one stack of layers")
    if len(ran) > len(best):
        raise Unfit(f"{len(ran) - len(best)} of its {len(ran)} layers run without attention")
    return found, tuple(best)


def _calls_by_layer(layers: Sequence[nn.Module], seen: Trace) -> list[AttentionCall]:
    """The one attention call of each layer, each checked by itself."""
    owner = {part: index for index, layer in enumerate(layers) for part in layer.modules()}
    order = [owner[call.module] for call in seen.calls]
    for index in range(len(layers)):
        if order.count(index) != 1:
            raise Unfit(f"layer {index} calls its attention {order.count(index)} times per pass")
    if order != sorted(order):
        raise Unfit("its layers do not run in order")
    storages: set[int] = set()
    for index, call in enumerate(seen.calls):
        _check_call(index, call, seen.num_tokens)
        if call.keys.data_ptr() in storages:
            raise Unfit("its layers share keys and values")
        storages.add(call.keys.data_ptr())
    return seen.calls


def _check_call(index: int, call: AttentionCall, num_tokens: int) -> None:
    unknown = sorted(
        name
        for name, value in call.extras.items()
        if name not in _HONOURED and value is not None and not isinstance(value, bool)
    )
    if unknown:
        raise Unfit(f"layer {index} passes {', '.join(unknown)} to its attention")
    if call.query.shape[2] != num_tokens or call.keys.shape[2] != num_tokens:
        raise Unfit(
            f"layer {index} attends with {call.query.shape[2]} rows to {call.keys.shape[2]} keys "
            "of its own"
        )
    if call.extras.get("is_causal") is False or not isinstance(call.mask, MaskRule):
        raise Unfit(f"layer {index} does not take its mask from transformers' mask interface")


# --- masks ----------------------------------------------------------------------------------------


def _reaches(calls: Sequence[AttentionCall], context: int) -> list[tuple[int | None, int | None]]:
    """Window and chunk of each layer, read off its mask rule; each rule is read once."""
    known: dict[int, tuple[int | None, int | None]] = {}
    for index, call in enumerate(calls):
        rule, device = call.mask.rule, call.query.device
        if id(rule) not in known:
            known[id(rule)] = _reach(rule, min(max(context, 1 << 12), _FARTHEST), device, index)
    return [known[id(call.mask.rule)] for call in calls]


def _reach(rule: Any, far: int, device: torch.device, layer: int) -> tuple[int | None, int | None]:
    """(window, chunk) of a mask rule, proved on a grid of positions up to `far`."""

    def first_seen(query: int) -> int:
        seen = rule(
            0, 0, torch.tensor(query, device=device), torch.arange(query + 1, device=device)
        )
        return int(seen.int().argmax())

    window = chunk = None
    first = first_seen(far)
    if first > 0 and first_seen(first) == first:
        chunk = first - first_seen(first - 1)
    elif first > 0:
        window = far - first + 1
    edges = {
        edge * unit + step
        for unit in (1, window or 1, chunk or 1)
        for edge in range(4)
        for step in range(-2, 3)
    }
    edges |= set(range(0, far, max(1, far // 200))) | {far - 1, far}
    places = torch.tensor(sorted(place for place in edges if 0 <= place <= far), device=device)
    queries, keys = places[:, None], places[None]
    expected = keys <= queries
    if window is not None:
        expected = expected & (keys > queries - window)
    if chunk is not None:
        expected = expected & (keys // chunk == queries // chunk)
    if not torch.equal(rule(0, 0, queries, keys).expand_as(expected), expected):
        raise Unfit(
            f"the mask of layer {layer} is neither causal, nor a sliding window, nor chunks"
        )
    return window, chunk


# --- arguments of layers --------------------------------------------------------------------------


def _arg_specs(
    short: LayerCall, long: LayerCall, token_args: dict[tuple[int, int, int], TokenArg]
) -> dict[int | str, ArgSpec]:
    """Which arguments of a layer hold a row per token, hidden states aside."""
    hidden = short.args[0] if short.args else short.kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[0] != 1:
        raise Unfit("its layers do not take hidden states of shape (1, tokens, size)")
    both: dict[int | str, tuple[Any, Any]] = {
        place: (short.args[place], long.args[place]) for place in range(1, len(short.args))
    }
    both |= {
        name: (value, long.kwargs[name])
        for name, value in short.kwargs.items()
        if name != "hidden_states"
    }
    arg_specs = {name: _arg_spec(name, *values, token_args) for name, values in both.items()}
    return {name: plan for name, plan in arg_specs.items() if plan is not None}


def _arg_spec(
    name: int | str, short: Any, long: Any, token_args: dict[tuple[int, int, int], TokenArg]
) -> ArgSpec:
    if isinstance(short, tuple | list):
        parts = tuple(
            _arg_spec(name, one, other, token_args) for one, other in zip(short, long, strict=True)
        )
        return parts if any(part is not None for part in parts) else None
    if not isinstance(short, Tensor) or short.shape == long.shape:
        return None
    dims = [
        dim
        for dim, sizes in enumerate(zip(short.shape, long.shape, strict=True))
        if sizes[0] != sizes[1]
    ]
    if len(dims) > 1:
        raise Unfit(f"argument {name} of its layers belongs to pairs of tokens")
    key = (id(short), id(long), dims[0])
    return token_args.setdefault(key, TokenArg(len(token_args), dims[0]))
