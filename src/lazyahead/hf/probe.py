"""What lazyahead can do for a model: seen by watching it run, then proved by sending a dozen tokens
another way."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazyahead.cache.kv import GrowableTensor, LayerKV
from lazyahead.hf.ahead import FrozenRows, run_ahead
from lazyahead.hf.attention import Heads, Rows, attend
from lazyahead.hf.model_spec import ModelSpec, declared_types, inspect_model
from lazyahead.hf.plain_runner import PlainRunner
from lazyahead.hf.runner import Runner
from lazyahead.hf.segment import Pass
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
    """`probe`, with the parts where the level is `full`."""
    if model not in _known:
        _known[model] = _examine(model)
    return _known[model]


def _examine(model: PreTrainedModel) -> tuple[Support, ModelSpec | None]:
    config = model.config
    kind = str(config.model_type)
    num_layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)
    if getattr(config, "is_encoder_decoder", False):
        reason = "encoder-decoder models are not supported, decoder-only ones are"
        return Support("none", reason, kind, num_layers), None
    if not model.can_generate():
        return Support(
            "none", f"{type(model).__name__} has no language-model head to generate with", kind, 0
        ), None
    try:
        spec = inspect_model(model)
        _defers_rightly(model, spec)
    except Unfit as unfit:
        reason = str(unfit)
    except Exception as error:
        reason = f"its forward does not fit the seams ({_in_short(error)})"
    else:
        types = spec.layer_types
        return Support(
            "full", "every layer keeps keys and values by position", kind, len(types), types
        ), spec
    level: Level = "decode-only"
    try:
        _continues_rightly(model)
        reason = f"{reason}; prompts are read whole"
    except Unfit as unfit:
        level, reason = "none", f"{unfit}; and {reason}"
    except Exception as error:
        level, reason = "none", f"it cannot go on from its cache ({_in_short(error)}); and {reason}"
    return Support(level, reason, kind, num_layers, declared_types(model)), None


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


def _defers_rightly(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Three passes, compared with plain: 7 tokens held back half-way, 4 that revive them, 1 alone.
    Raises Unfit."""
    token_ids = _token_ids(model)
    store = [LayerKV() for _ in spec.layers]
    tables: list[GrowableTensor] = []
    first = _Held(token_ids[:_NUM_FIRST], 0, store, tables, spec)
    with Runner(model, spec).attached() as runner:
        runner.run([first])
        second = _Held(
            token_ids[_NUM_FIRST:-1], _NUM_FIRST, store, tables, spec, to_revive_now=first.held
        )
        last = _Held(
            token_ids[-1:], _NUM_TOKENS - 1, store, tables, spec, to_revive_now=second.held
        )
        ours = torch.cat([runner.run([second]), runner.run([last])])
    try:
        _compare(ours, _plain_logits(model), "through the seams")
    except Unfit:
        with switched(spec.configs, "eager"):  # sdpa of older transformers ignores soft caps
            _compare(ours, _plain_logits(model), "through the seams")


class _Held:
    """A segment that is held back whole at the middle layer, or that brings back one that was."""

    def __init__(
        self,
        token_ids: Sequence[int],
        start: int,
        store: list[LayerKV],
        tables: list[GrowableTensor],
        spec: ModelSpec,
        to_revive_now: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.token_ids, self.last = token_ids, start + len(token_ids) - 1
        self.logits_indices: Sequence[int] = range(len(token_ids))
        self.tables: list[GrowableTensor] | None = tables
        self.entering_positions = torch.arange(start, start + len(token_ids), device=spec.device)
        self.positions, self.entered = (
            self.entering_positions,
            torch.arange(len(token_ids), device=spec.device),
        )
        self.held: tuple[Tensor, Tensor] | None = None
        """Hidden states and positions of rows that were held back."""
        self._store, self._middle, self._to_revive_now, self._is_first = (
            store,
            spec.num_layers // 2,
            to_revive_now,
            start == 0,
        )

    @property
    def scores_ahead(self) -> bool:
        return self._to_revive_now is not None

    @property
    def num_rows(self) -> int:
        return self.positions.numel()

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, heads: Heads
    ) -> Tensor:
        kv = self._store[layer]
        kv.append(keys, values, self.positions)
        return attend(query, kv, Rows(self.positions, self.last), heads)

    def at_boundary(self, layer: int, hidden: Tensor, pass_: Pass) -> Tensor | None:
        if layer != self._middle:
            return None
        if self._is_first:
            self.held = (hidden.clone(), self.positions)
            self.positions, self.entered = self.positions[:0], self.entered[:0]
            return hidden[:0]
        if self._to_revive_now is None:
            return None
        rows, positions = self._to_revive_now
        running = FrozenRows(hidden, self.positions, self.entered)
        waiting = FrozenRows(rows, positions, torch.full_like(positions, -1))
        layers = range(layer, pass_.spec.num_layers - 1)
        foreseen = run_ahead(pass_, self, [waiting] * len(layers), running, self._store, layers)
        if not all(bool(attention.isfinite().all()) for _, attention, _ in foreseen):
            raise Unfit("rows that run ahead attend to nothing")
        self.entered = torch.cat([torch.full_like(positions, -1), self.entered])
        self.positions = torch.cat([positions, self.positions])
        return torch.cat([rows, hidden])


# --- the model's own cache ------------------------------------------------------------------------


def _continues_rightly(model: PreTrainedModel) -> None:
    """Two turns from the model's own cache, compared with one pass without. Raises Unfit."""
    token_ids, talk, runner = _token_ids(model), _Talk(), PlainRunner(model)
    runner.run([_Turn(talk, token_ids[:_NUM_FIRST], 0, model.device)])
    ours = runner.run([_Turn(talk, token_ids[_NUM_FIRST:], _NUM_FIRST, model.device)])
    _compare(ours, _plain_logits(model), "from its own cache")


class _Talk:
    """Stands for a session."""


class _Turn:
    """Tokens of one turn, all of which speak."""

    def __init__(
        self, session: _Talk, token_ids: Sequence[int], start: int, device: torch.device
    ) -> None:
        self.session, self.token_ids, self.logits_indices = (
            session,
            token_ids,
            range(len(token_ids)),
        )
        self.entering_positions = torch.arange(start, start + len(token_ids), device=device)
