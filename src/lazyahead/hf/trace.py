"""A look at a model: it runs a few tokens with an attention function that only takes notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from lazyahead.errors import LazyAheadError

_NAME = "lazyahead_look"
"""The name under which the notes are taken."""


class Unfit(Exception):  # noqa: N818 (a verdict)
    """Why tokens of a model cannot be deferred, as half a sentence. Stays inside `hf`."""


class MaskRule:
    """Stands for an attention mask on its way through the model: the rule behind it, never its
    values."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        """(batch, head, query positions, key positions) -> which keys are seen."""

    def __getitem__(self, index: Any) -> MaskRule:
        return self


class AttentionCall(NamedTuple):
    """One call of the attention function."""

    module: nn.Module
    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Any
    extras: dict[str, Any]


class LayerCall(NamedTuple):
    """One call of a member of a module list."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Trace(NamedTuple):
    """What happened while `num_tokens` tokens ran through."""

    num_tokens: int
    calls: list[AttentionCall]
    entries: dict[nn.Module, LayerCall]
    """Of the members of all module lists, those that ran."""


_notes: ContextVar[list[AttentionCall] | None] = ContextVar("lazyahead_notes", default=None)


@torch.no_grad()
def trace(model: PreTrainedModel, num_tokens: int) -> Trace:
    """Runs the model on `num_tokens` tokens. Attention and hooks are as before afterwards."""
    AttentionInterface.register(_NAME, _note)
    AttentionMaskInterface.register(_NAME, _mask)
    seen = Trace(num_tokens, [], {})
    device = model.get_input_embeddings().weight.device
    token = _notes.set(seen.calls)
    with ExitStack() as stack:
        stack.callback(_notes.reset, token)
        stack.enter_context(switched(all_configs(model), _NAME))
        for members in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
            for member in members:
                stack.callback(
                    member.register_forward_pre_hook(_taker(seen), with_kwargs=True).remove
                )
        model(
            input_ids=torch.arange(2, 2 + num_tokens, device=device)[None],
            position_ids=torch.arange(num_tokens, device=device)[None],
            attention_mask=torch.ones(1, num_tokens, dtype=torch.long, device=device),
            use_cache=False,
        )
    return seen


def all_configs(model: PreTrainedModel) -> tuple[PretrainedConfig, ...]:
    """Every config object that may choose an attention function."""
    found: dict[int, PretrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    add(model.config)
    for module in model.modules():
        add(getattr(module, "config", None))
    return tuple(found.values())


@contextmanager
def switched(configs: Sequence[PretrainedConfig], name: str) -> Iterator[None]:
    """Inside, the models of these configs call the attention function registered as `name`."""
    before = [
        config._attn_implementation_internal for config in configs
    ]  # the public setter also sets sub-configs
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


def _taker(seen: Trace) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.entries.setdefault(module, LayerCall(args, dict(kwargs)))

    return hook


def _mask(mask_function: Any = None, **kwargs: Any) -> MaskRule:
    return MaskRule(mask_function)


def _note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    calls = _notes.get()
    if calls is None:
        raise LazyAheadError("lazyahead's notes are taken by its own probe only")
    calls.append(AttentionCall(module, query, key, value, attention_mask, kwargs))
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
