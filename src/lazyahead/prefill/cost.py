"""Floating-point operations of a prefill, and the speed-up that pruning could give at best.

The cost of a prompt of N tokens of which n_l are computed at layer l is the sum of three parts,
each of which is one function here. A multiplication with its addition counts as 2.

- **Layers.** Each row multiplies with every weight matrix of the layer (W_l numbers), and each
  pair of a query and a key that it attends to costs one dot product and one weighted sum over
  the width A_l (query heads times head size): sum over l of 2 W_l n_l + 4 A_l pairs(n_l). Causal
  attention has n (n + 1) / 2 pairs, fewer where the layer or `local_window` limits what a row
  attends to; in the last layer only the last row attends.
- **Scores.** At each boundary the attention weights of the scorer's last w rows are computed
  once more, in the layer below: 2 A w n.
- **Head.** One row of logits: 2 H.

Norms, rotary embeddings, softmax and the selection itself are left out: they grow with the rows
and are small beside the matrices. Grouped heads need no special case: their smaller key and value
projections are part of W_l, and each query head has its own pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.schedule import Boundary, boundaries, kept_by_layer, local_layers

if TYPE_CHECKING:
    from torch import nn

    from lazyahead.hf.model_spec import ModelSpec

NUM_SINKS = 4
"""First tokens of the prompt that rows with a local window attend to as well."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class LayerCost(NamedTuple):
    """What one decoder layer costs per row and per pair of query and key."""

    num_weights: int
    """Numbers in its matrices; of a mixture of experts only of those that a token visits."""
    attention_width: int
    """Query heads times their size."""
    window: int | None = None
    """A row attends to keys less than this many positions back; None: to all before it."""
    chunk: int | None = None
    """A row attends to keys of its own chunk of this many positions."""

    @property
    def attends_fully(self) -> bool:
        return self.window is None and self.chunk is None

    def flops(self, num_rows: float, num_pairs: float) -> float:
        """Of `num_rows` rows that attend to `num_pairs` keys in all."""
        return 2.0 * self.num_weights * num_rows + 4.0 * self.attention_width * num_pairs


class ModelCost(NamedTuple):
    """What the layers and the output head of one model cost."""

    layers: tuple[LayerCost, ...]
    num_head_weights: int = 0

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelCost:
        """Counted on the modules of an inspected model."""
        share = _active_experts(spec)
        layers = (
            LayerCost(_num_weights(layer, share), width, window, chunk)
            for layer, width, window, chunk in zip(
                spec.layers, spec.widths, spec.windows, spec.chunks, strict=True
            )
        )
        return cls(tuple(layers), _num_weights(spec.head))

    @property
    def attends_fully(self) -> tuple[bool, ...]:
        """Which layers attend to every earlier token."""
        return tuple(layer.attends_fully for layer in self.layers)


def ideal_speedup(
    config: LazyPrefill | None,
    model: ModelCost,
    num_tokens: int,
    counts: Sequence[int] | None = None,
) -> float:
    """FLOPs of the full prefill of `num_tokens` tokens over those under `config`."""
    full = prefill_flops(None, model, num_tokens)
    return full / prefill_flops(config, model, num_tokens, counts)


def prefill_flops(
    config: LazyPrefill | None,
    model: ModelCost,
    num_tokens: int,
    counts: Sequence[int] | None = None,
) -> float:
    """Of the prefill of `num_tokens` tokens under `config`; None prunes nothing.

    `counts` are the prompt tokens computed at each layer, where they were measured
    (`Stats.kept_by_layer`); left out, the schedule's keep ratios tell them.
    """
    if counts is None:
        counts = kept_counts(config, model, num_tokens)
    head = 2.0 * model.num_head_weights
    if config is None or num_tokens < config.min_tokens:
        return layer_flops(model, counts, num_tokens) + head
    placed = placed_boundaries(config, model)
    local = range(0)
    if config.local_window:
        local = local_layers(placed, len(counts), config.local_from)
    return (
        layer_flops(model, counts, num_tokens, config, local)
        + score_flops(config, model, placed, counts)
        + head
    )


def placed_boundaries(config: LazyPrefill, model: ModelCost) -> tuple[Boundary, ...]:
    """The layers at which `config` prunes this model."""
    return boundaries(config.schedule, model.attends_fully, config.scorer.window_size > 0)


def kept_counts(config: LazyPrefill | None, model: ModelCost, num_tokens: int) -> tuple[int, ...]:
    """Prompt tokens computed at each layer, protected ones included (but for the question, whose
    length is not known here)."""
    if config is None or num_tokens < config.min_tokens:
        return (num_tokens,) * len(model.layers)
    counts = kept_by_layer(placed_boundaries(config, model), len(model.layers), num_tokens)
    num_protected = min(num_tokens, config.protect_first + config.protect_last)
    return tuple(max(count, num_protected) for count in counts)


def layer_flops(
    model: ModelCost,
    counts: Sequence[int],
    num_tokens: int,
    config: LazyPrefill | None = None,
    local: range = range(0),
) -> float:
    """Of all layers, where `counts[l]` of `num_tokens` tokens are computed at layer l.

    In the layers `local` rows attend within the local window of `config`; in the last layer only
    the last row attends.
    """
    total = 0.0
    for index, (layer, count) in enumerate(zip(model.layers, counts, strict=True)):
        if index == len(counts) - 1:
            pairs: float = last_row_pairs(layer, count, num_tokens)
        elif config is not None and index in local and layer.attends_fully:
            num_last = config.num_last_rows
            pairs = local_pairs(count, config.local_window, num_last)
        else:
            pairs = causal_pairs(layer, count, num_tokens)
        total += layer.flops(count, pairs)
    return total


def causal_pairs(layer: LayerCost, count: int, num_tokens: int) -> float:
    """Pairs of query and key among `count` of `num_tokens` tokens, evenly spread over them."""
    if layer.chunk is not None:
        size = _span(layer.chunk, count, num_tokens)
        whole, rest = divmod(count, size)
        return whole * _triangle(size) + _triangle(rest)
    span = _span(layer.window, count, num_tokens)
    return _triangle(span) + (count - span) * span


def last_row_pairs(layer: LayerCost, count: int, num_tokens: int) -> int:
    """Those of the last row."""
    if layer.chunk is not None:
        size = _span(layer.chunk, count, num_tokens)
        return count % size or size
    return _span(layer.window, count, num_tokens)


def _span(limit: int | None, count: int, num_tokens: int) -> int:
    """How many of `count` tokens, of `num_tokens`, lie within `limit` tokens."""
    return count if limit is None else min(count, max(1, round(limit * count / num_tokens)))


def local_pairs(num_tokens: int, window: int, num_last: int) -> float:
    """Pairs where rows attend to `window` tokens up to their own and to the first few; the last
    `num_last` rows attend to all."""
    num_local = max(0, num_tokens - num_last)
    near = min(num_local, window)
    pairs = _triangle(near) + (num_local - near) * near
    for num_sinks in range(1, NUM_SINKS + 1):  # each first token is seen from window + its place on
        pairs += max(0, num_local - window - num_sinks + 1)
    return pairs + _triangle(num_tokens) - _triangle(num_local)


def score_flops(
    config: LazyPrefill, model: ModelCost, placed: Sequence[Boundary], counts: Sequence[int]
) -> float:
    """Of the attention weights that the scorer reads at each boundary."""
    return sum(
        2.0
        * model.layers[at.layer - 1].attention_width
        * min(config.scorer.window_size, counts[at.layer - 1])
        * counts[at.layer - 1]
        for at in placed
        if at.layer > 0
    )


def _triangle(count: float) -> float:
    """Pairs of `count` tokens with themselves and all before them."""
    return count * (count + 1) / 2


def _num_weights(module: nn.Module, active_experts: float = 1.0) -> int:
    """Numbers in the matrices of a module; those of experts count by the share that is active."""
    total = 0.0
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            total += parameter.numel() * (active_experts if "experts" in name else 1.0)
    return round(total)


def _active_experts(spec: ModelSpec) -> float:
    """The share of its experts that a token visits; 1 where there are none."""
    config = spec.configs[0].get_text_config()
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 0)
    active = getattr(config, "num_experts_per_tok", None) or 0
    return active / experts if experts and active else 1.0
