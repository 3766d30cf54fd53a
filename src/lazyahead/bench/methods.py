"""Ways of reading that the quality benchmark compares: lazily, and the paper's two baselines at the
same cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.errors import UnsupportedModelError
from lazyahead.hf.probe import examine
from lazyahead.llm import LLM
from lazyahead.prefill.schedule import (
    Boundary,
    LayerShape,
    ahead_flops,
    boundaries,
    kept_by_layer,
    num_local_layers,
    prefill_flops,
)
from lazyahead.prefill.score import AheadRange

REFERENCE = "balanced"
"""The preset whose cost the baselines share, where it is measured."""


@dataclass(frozen=True)
class Method:
    """One way of reading, under the name of its kind and of the preset it comes from."""

    name: str
    """`full`, `lazy`, `lazy_no_revival`, `random_drop`, `static_prune`."""
    prefill: str
    """The preset or profile; of a baseline the one whose cost it shares."""
    rule: LazyPrefill | None
    decode: Lookahead | None = None

    def on(self, llm: LLM) -> LLM:
        """An engine of its own over the weights that `llm` holds."""
        return LLM(llm.model, tokenizer=llm.tokenizer, prefill=self.rule, decode=self.decode)


FULL = Method("full", "off", None)


@dataclass(frozen=True)
class Cost:
    """What reading a prompt of `num_tokens` costs one model, by arithmetic, and what else costs as
    much."""

    attends_fully: tuple[bool, ...]
    """Of each layer, whether it sees every earlier token."""
    shape: LayerShape
    num_tokens: int

    @classmethod
    def of(cls, llm: LLM, num_tokens: int) -> Cost:
        """Raises UnsupportedModelError for a model that cannot defer."""
        support, spec = examine(llm.model)
        if spec is None:
            reason = f"can only decode: {support.reason}; there is no way of reading to compare"
            raise UnsupportedModelError(f"{llm.name} ({support.model_type}) {reason}")
        return cls(spec.attends_fully, spec.layer_shape, num_tokens)

    @property
    def num_layers(self) -> int:
        return len(self.attends_fully)

    def placed(self, rule: LazyPrefill | None) -> tuple[Boundary, ...]:
        """Where a rule cuts."""
        if rule is None:
            return ()
        return boundaries(rule.schedule, self.attends_fully, rule.scorer.window_size > 0)

    def kept(self, rule: LazyPrefill | None) -> tuple[int, ...]:
        """Prompt tokens computed at each layer."""
        return kept_by_layer(self.placed(rule), self.num_layers, self.num_tokens)

    def flops(self, rule: LazyPrefill | None) -> float:
        """Of a prefill, attention and running ahead included."""
        kept, placed = self.kept(rule), self.placed(rule)
        if rule is None:
            return prefill_flops(kept, self.shape)
        num_near = num_local_layers(placed, self.num_layers, AheadRange.of(rule.scorer).start)
        reading = prefill_flops(kept, self.shape, rule.local_window, num_near)
        return reading + ahead_flops(
            placed,
            kept,
            self.shape,
            AheadRange.of(rule.scorer).stop,
            AheadRange.of(rule.scorer).start,
        )

    def ideal_speedup(self, rule: LazyPrefill | None) -> float:
        """FLOPs of reading everything over those of `rule`."""
        return self.flops(None) / self.flops(rule)

    def first_layer(self, rule: LazyPrefill) -> int:
        """Where `rule` lets fewer tokens go on for the first time; at least 1, where attention has
        been seen."""
        return max(
            1, next((i for i, kept in enumerate(self.kept(rule)) if kept < self.num_tokens), 1)
        )

    def random_drop(self, rule: LazyPrefill, seed: int = 0) -> LazyPrefill:
        """Tokens dropped at random before the first layer, for good; as many FLOPs as `rule`."""
        twin = LazyPrefill.random_drop(self.keep_ratio(self.flops(rule), 0), seed)
        return replace(twin, min_tokens=rule.min_tokens)

    def static_prune(self, rule: LazyPrefill) -> LazyPrefill:
        """Pruned once, for good, where `rule` first defers, or sooner where that alone costs more;
        as many FLOPs as `rule`."""
        flops = self.flops(rule)
        layers = range(self.first_layer(rule), 0, -1)
        layer = next((layer for layer in layers if self._pruned_once(1, layer) <= flops), 1)
        ratio = self.keep_ratio(flops, layer)
        return replace(
            LazyPrefill.static_prune(ratio, layer / self.num_layers), min_tokens=rule.min_tokens
        )

    def _pruned_once(self, count: int, layer: int) -> float:
        """FLOPs where `count` tokens enter `layer`."""
        return prefill_flops(
            [self.num_tokens] * layer + [count] * (self.num_layers - layer), self.shape
        )

    def keep_ratio(self, flops: float, layer: int) -> float:
        """The ratio at which pruning once, at the entry to `layer`, costs `flops`; the nearest
        there is."""

        def at(count: int) -> float:
            return self._pruned_once(count, layer)

        counts = range(1, self.num_tokens + 1)
        above = min(bisect_left(counts, flops, key=at), self.num_tokens - 1)
        nearest = min(
            counts[max(0, above - 1) : above + 1], key=lambda count: abs(at(count) - flops)
        )
        return nearest / self.num_tokens


def reference(names: Sequence[str]) -> str:
    """The preset, of those measured, whose cost the baselines share."""
    return REFERENCE if REFERENCE in names else names[0]


def quality_methods(
    rules: dict[str, LazyPrefill], cost: Cost, seed: int = 0, decode: Lookahead | None = None
) -> list[Method]:
    """The lazy ways by the names of their presets, and the baselines at equal cost."""
    name = reference(list(rules))
    lazy = [Method("lazy", preset, rule, decode) for preset, rule in rules.items()]
    return [
        *lazy,
        Method("random_drop", name, cost.random_drop(rules[name], seed)),
        _static(rules, cost),
    ]


def second_turn_methods(
    rules: dict[str, LazyPrefill], cost: Cost, decode: Lookahead | None = None
) -> list[Method]:
    """The lazy ways with revival and without, and pruning for good at equal cost."""
    methods = []
    for preset, rule in rules.items():
        methods.append(Method("lazy", preset, rule, decode))
        methods.append(Method("lazy_no_revival", preset, replace(rule, revive="never"), decode))
    return [*methods, _static(rules, cost)]


def _static(rules: dict[str, LazyPrefill], cost: Cost) -> Method:
    name = reference(list(rules))
    return Method("static_prune", name, cost.static_prune(rules[name]))
