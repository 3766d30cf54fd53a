"""What lazyahead can do for a model: seen by watching it run, then proved by sending a dozen tokens
another way."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazyahead.cache.kv import GrowableTensor, LayerKV
from lazyahead.errors import ConfigError
from lazyahead.hf.attach import attachment_of
from lazyahead.hf.model_spec import ModelSpec, declared_types, inspect_model
from lazyahead.hf.plain_runner import PlainRunner
from lazyahead.hf.runner import Runner, uncompiled
from lazyahead.hf.segment import Policy, Segment
from lazyahead.hf.trace import Unfit, switched

Level = Literal["full", "decode-only", "none"]

_NUM_TOKENS = 12
_NUM_FIRST = 7
"""Tokens of the first pass."""


@dataclass(frozen=True)
class Support:
    """What works for a model, and why not more."""

    level: Level
    """`full`: reading lazily and writing ahead. `decode-only`: the model's own cache, no deferring.
    `none`."""
    reason: str
    model_type: str
    num_layers: int
    layer_types: tuple[str, ...] = ()


_known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Support, ModelSpec | None]] = (
    weakref.WeakKeyDictionary()
)


def probe(model: PreTrainedModel) -> Support:
    """Decides `full`, `decode-only` or `none` for a loaded model, with the reason. Runs it on 12
    tokens, once."""
    return examine(model)[0]


def examine(model: PreTrainedModel) -> tuple[Support, ModelSpec | None]:
    """`probe`, with the model's parts where the level is `full`.

    The result is kept while the model has the same layers and head. An unexpected error in the
    model's forward is not kept: the next call tries again.
    """
    attachment = attachment_of(model)
    with attachment.lock:
        known = _known.get(model)
        if known is not None and (known[1] is None or known[1].is_current(model)):
            return known
        with attachment.guarded(model), attachment.unpacked(), uncompiled():
            support, spec, is_final = _examine(model)
        if is_final:
            _known[model] = support, spec
        return support, spec


def _examine(model: PreTrainedModel) -> tuple[Support, ModelSpec | None, bool]:
    """Support, the parts where it is `full`, and whether another try would find the same."""
    config = model.config
    kind = str(config.model_type)
    num_layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)
    if getattr(config, "is_encoder_decoder", False):
        reason = "encoder-decoder models are not supported, decoder-only ones are"
        return Support("none", reason, kind, num_layers), None, True
    if not model.can_generate():
        reason = f"{type(model).__name__} has no language-model head to generate with"
        return Support("none", reason, kind, 0), None, True
    is_final = True
    try:
        spec = inspect_model(model)
        _check_deferring(model, spec)
    except Unfit as unfit:
        reason = str(unfit)
    except ConfigError:  # a setting of the environment
        raise
    except Exception as error:
        reason = f"its forward does not fit the seams ({_in_short(error)})"
        is_final = False
    else:
        types = spec.layer_types
        reason = "every layer keeps keys and values by position"
        return Support("full", reason, kind, len(types), types), spec, True
    level: Level = "decode-only"
    try:
        _check_continuing(model)
        reason = f"{reason}; prompts are read whole"
    except Unfit as unfit:
        level = "none"
        reason = f"{unfit}; and {reason}"
    except Exception as error:
        level = "none"
        reason = f"it cannot go on from its cache ({_in_short(error)}); and {reason}"
        is_final = False
    return Support(level, reason, kind, num_layers, declared_types(model)), None, is_final


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _token_ids(model: PreTrainedModel) -> list[int]:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return [(7919 * i + 13) % vocabulary for i in range(_NUM_TOKENS)]


@torch.no_grad()
def _plain_logits(model: PreTrainedModel) -> Tensor:
    """Logits (5, V) of the last tokens, as the model gives them by itself."""
    inputs = {"input_ids": torch.tensor([_token_ids(model)], device=model.device)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(_NUM_TOKENS, device=model.device)[None]
    logits: Tensor = model(**inputs, use_cache=False).logits[0, _NUM_FIRST - _NUM_TOKENS :]
    return logits


def _compare(ours: Tensor, plain: Tensor, way: str) -> None:
    if ours.shape != plain.shape:
        raise Unfit(
            f"its logits have shape {tuple(ours.shape)} {way}, {tuple(plain.shape)} without"
        )
    tolerance = 1e-3 if plain.dtype == torch.float32 else 0.1
    gap = (
        (ours.float() - plain.float()).abs().max() / plain.float().abs().max().clamp(min=1e-6)
    ).item()
    if not gap <= tolerance:
        raise Unfit(f"its logits differ by {gap:.1e} (relative) {way}")


# --- deferring ------------------------------------------------------------------------------------


def _check_deferring(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Three passes, compared with plain ones: 7 tokens deferred at the middle layer, 4 tokens that
    revive them, 1 alone. Raises Unfit."""
    token_ids = _token_ids(model)
    store = [LayerKV() for _ in spec.layers]
    token_args: list[GrowableTensor] = []

    def segment(start: int, end: int, policy: Policy) -> Segment:
        return Segment(
            store,
            token_ids[start:end],
            range(start, end),
            range(end - start),
            spec.device,
            boundaries=policy.boundary_layers,
            policy=policy,
            token_args=token_args,
        )

    defer = _DeferAll(spec.num_layers // 2)
    with Runner(model, spec).attached() as runner:
        runner.run([segment(0, _NUM_FIRST, defer)])
        revive = _ReviveAll(defer)
        ours = [runner.run([segment(_NUM_FIRST, _NUM_TOKENS - 1, revive)])]
        ours.append(runner.run([segment(_NUM_TOKENS - 1, _NUM_TOKENS, Policy())]))
    try:
        _compare(torch.cat(ours), _plain_logits(model), "through the seams")
    except Unfit:
        with switched(spec.configs, "eager"):  # sdpa of older transformers ignores soft caps
            _compare(torch.cat(ours), _plain_logits(model), "through the seams")


class _DeferAll(Policy):
    """Defers every row at one layer."""

    needs_token_args = True

    def __init__(self, layer: int) -> None:
        self.boundary_layers = (layer,)
        self.deferred: tuple[Tensor, Tensor] | None = None
        """Hidden states (T, d) and positions (T,)."""

    def at_boundary(self, layer: int, hidden: Tensor, segment: Segment) -> Tensor | None:
        self.deferred = (hidden.clone(), segment.positions)
        segment.replace(segment.positions[:0], segment.entered[:0])
        return hidden[:0]


class _ReviveAll(Policy):
    """Revives what `defer` deferred."""

    needs_token_args = True

    def __init__(self, defer: _DeferAll) -> None:
        self.boundary_layers = defer.boundary_layers
        self._defer = defer

    def at_boundary(self, layer: int, hidden: Tensor, segment: Segment) -> Tensor | None:
        assert self._defer.deferred is not None
        rows, positions = self._defer.deferred
        segment.replace(
            torch.cat([positions, segment.positions]),
            torch.cat([torch.full_like(positions, -1), segment.entered]),
        )
        return torch.cat([rows, hidden])


# --- the model's own cache ------------------------------------------------------------------------


def _check_continuing(model: PreTrainedModel) -> None:
    """Two turns from the model's own cache, compared with one pass without. Raises Unfit."""
    token_ids = _token_ids(model)
    runner = PlainRunner(model)
    owner = _Conversation()

    def run(start: int, end: int) -> Tensor:
        places = range(start, end)
        rows = range(end - start)
        turn = Segment([], token_ids[start:end], places, rows, model.device, owner=owner)
        return runner.run([turn])

    run(0, _NUM_FIRST)
    ours = run(_NUM_FIRST, _NUM_TOKENS)
    _compare(ours, _plain_logits(model), "from its own cache")


class _Conversation:
    """Identifies what the model's own cache belongs to."""
