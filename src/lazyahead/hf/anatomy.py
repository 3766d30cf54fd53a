"""Where a model's parts are, found by looking, never by family name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lazyahead.prefill.schedule import LayerShape

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types whose whole memory is keys and values by position."""
_GROWING_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that the seams need."""

    layers: tuple[nn.Module, ...]
    head: nn.Module
    configs: tuple[PretrainedConfig, ...]
    """Every config object that chooses an attention function."""
    layer_types: tuple[str, ...]
    chunks: tuple[int | None, ...]
    """Chunk length of each layer with chunked attention."""
    tables_depend_on_length: bool
    """Rotary tables change with the longest position in a pass: requests then travel alone and unsplit."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attends_fully(self) -> tuple[bool, ...]:
        """Which layers see every earlier token."""
        return tuple(kind == "full_attention" for kind in self.layer_types)

    @property
    def device(self) -> torch.device:
        """Where the first layer lives: input goes there."""
        return next(self.layers[0].parameters()).device

    @property
    def layer_shape(self) -> LayerShape:
        """Mean cost of a layer, for ideal speed-ups; of a mixture of experts only those that a token visits."""
        config = self.configs[0].get_text_config()
        total = sum(parameter.numel() for layer in self.layers for parameter in layer.parameters())
        experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 0)
        active = getattr(config, "num_experts_per_tok", None) or 0
        if experts and active:
            routed = sum(
                p.numel() for layer in self.layers for name, p in layer.named_parameters() if "experts" in name
            )
            total -= round(routed * (1 - active / experts))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return LayerShape(total // self.num_layers, config.num_attention_heads * head_dim)


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def dissect(model: PreTrainedModel) -> Anatomy | str:
    """The parts, or one sentence that says what is missing."""
    config = model.config.get_text_config()
    num_layers = getattr(config, "num_hidden_layers", None)
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and len(list(module.parameters()))
    ]
    if not stacks:
        return "no stack of decoder layers was found"
    head = model.get_output_embeddings()
    if head is None:
        return "the model has no output head"
    seen = {id(model.config): model.config}
    for module in model.modules():
        own = getattr(module, "config", None)
        if isinstance(own, PretrainedConfig):
            seen.setdefault(id(own), own)
    types = _layer_types(config, len(stacks[0]))
    chunk = getattr(config, "attention_chunk_size", None)
    return Anatomy(
        layers=tuple(stacks[0]),
        head=head,
        configs=tuple(seen.values()),
        layer_types=types,
        chunks=tuple(chunk if kind == "chunked_attention" else None for kind in types),
        tables_depend_on_length=_rope_grows(config),
    )


def _layer_types(config: PretrainedConfig, num_layers: int) -> tuple[str, ...]:
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types:
        return tuple(types)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return ("sliding_attention" if window else "full_attention",) * num_layers


def _rope_grows(config: PretrainedConfig) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return any(group.get("rope_type") in _GROWING_ROPE for group in (parameters, *nested))
