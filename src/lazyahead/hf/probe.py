"""What lazyahead can do for a model: read from its parts, then proved by running a dozen tokens through the seams."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazyahead.hf.anatomy import ATTENTION_TYPES, Anatomy, dissect
from lazyahead.hf.attention import Heads, Rows, attend
from lazyahead.hf.cache import Growing, LayerKV
from lazyahead.hf.forward import Runner

Level = Literal["full", "decode-only", "none"]


@dataclass(frozen=True)
class Support:
    """What works for a model, and why not more."""

    level: Level
    """`full`: reading lazily and writing ahead. `decode-only`: the model's own cache, no deferring. `none`."""
    reason: str
    model_type: str
    num_layers: int
    layer_types: tuple[str, ...] = ()


_known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Support, Anatomy | None]] = weakref.WeakKeyDictionary()


def probe(model: PreTrainedModel) -> Support:
    """Decides `full`, `decode-only` or `none` for a loaded model, with the reason. Runs it on 12 tokens, once."""
    return examine(model)[0]


def examine(model: PreTrainedModel) -> tuple[Support, Anatomy | None]:
    """`probe`, with the parts where the level is `full`."""
    if model not in _known:
        _known[model] = _examine(model)
    return _known[model]


def _examine(model: PreTrainedModel) -> tuple[Support, Anatomy | None]:
    config = model.config
    kind = str(config.model_type)
    num_layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)
    if getattr(config, "is_encoder_decoder", False):
        return Support(
            "none", "encoder-decoder models are not supported, decoder-only ones are", kind, num_layers
        ), None
    if not model.can_generate():
        return Support("none", f"{type(model).__name__} has no language-model head to generate with", kind, 0), None
    anatomy = dissect(model)
    reason = anatomy if isinstance(anatomy, str) else _obstacle(model, anatomy)
    types = () if isinstance(anatomy, str) else anatomy.layer_types
    if reason is not None or isinstance(anatomy, str):
        return Support("decode-only", f"{reason}; prompts are read whole", kind, num_layers, types), None
    return Support("full", "every layer keeps keys and values by position", kind, num_layers, types), anatomy


def _obstacle(model: PreTrainedModel, anatomy: Anatomy) -> str | None:
    """Why tokens of this model cannot be deferred; None when they can."""
    foreign = sorted(set(anatomy.layer_types) - ATTENTION_TYPES)
    if foreign:
        return f"layers of type {', '.join(foreign)} keep a state that no token can join later"
    if len(anatomy.layer_types) != anatomy.num_layers:
        return f"{len(anatomy.layer_types)} layer types for {anatomy.num_layers} layers"
    try:
        return _self_test(model, anatomy)
    except Exception as error:
        return f"its forward does not fit the seams ({type(error).__name__}: {str(error).splitlines()[0][:200]})"


@torch.no_grad()
def _self_test(model: PreTrainedModel, anatomy: Anatomy) -> str | None:
    """Reads 12 tokens in three passes and compares with plain: 7 held back half-way, 4 that revive them, 1 alone."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    token_ids = [(7919 * i + 13) % vocabulary for i in range(12)]
    plain = model(input_ids=torch.tensor([token_ids], device=anatomy.device), use_cache=False).logits[0, 7:].float()
    store = [LayerKV() for _ in anatomy.layers]
    tables: list[Growing] = []
    first = _Held(token_ids[:7], 0, store, tables, anatomy, held=None)
    with Runner(model, anatomy).attached() as runner:
        runner.run([first])
        second = _Held(token_ids[7:11], 7, store, tables, anatomy, held=first.held)
        last = _Held(token_ids[11:], 11, store, tables, anatomy, held=(first.held[0][:0], first.positions))
        ours = torch.cat([runner.run([second]), runner.run([last])]).float()
    if set(last.windows) != set(range(anatomy.num_layers)):
        return "its attention cannot be replaced through transformers' attention interface"
    for layer, kind in enumerate(anatomy.layer_types):
        if (kind == "sliding_attention") != last.windows[layer]:
            return f"layer {layer} is said to be {kind}, but its attention is not called so"
    if ours.shape != plain.shape:
        return f"its logits have shape {tuple(ours.shape)} through the seams, {tuple(plain.shape)} without"
    tolerance = 1e-3 if plain.dtype == model.dtype else 0.1
    gap = ((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-6)).item()
    return None if gap <= tolerance else f"its logits differ by {gap:.1e} (relative) through the seams"


class _Held:
    """A flight that is held back whole at the middle layer, or that brings back one that was."""

    def __init__(
        self,
        token_ids: Sequence[int],
        start: int,
        store: list[LayerKV],
        tables: list[Growing],
        anatomy: Anatomy,
        held: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.token_ids, self.last = token_ids, start + len(token_ids) - 1
        self.speaks: Sequence[int] = range(len(token_ids))
        self.tables: list[Growing] | None = tables
        self.entering_positions = torch.arange(start, start + len(token_ids), device=anatomy.device)
        self.positions, self.entered = self.entering_positions, torch.arange(len(token_ids), device=anatomy.device)
        self.held, self.windows = held, dict[int, bool]()
        self._store, self._middle, self._brings = store, anatomy.num_layers // 2, held is not None

    @property
    def num_rows(self) -> int:
        return self.positions.numel()

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, heads: Heads) -> Tensor:
        kv = self._store[layer]
        kv.append(keys, values, self.positions)
        self.windows[layer] = heads.window is not None
        return attend(query, kv, Rows(self.positions, self.last), heads)

    def cross(self, layer: int, hidden: Tensor) -> Tensor | None:
        if layer != self._middle:
            return None
        if self.held is None or not self._brings:
            self.held = (hidden.clone(), self.positions)
            self.positions, self.entered = self.positions[:0], self.entered[:0]
            return hidden[:0]
        rows, positions = self.held
        self.entered = torch.cat([torch.full_like(positions, -1), self.entered])
        self.positions = torch.cat([positions, self.positions])
        return torch.cat([rows, hidden])
