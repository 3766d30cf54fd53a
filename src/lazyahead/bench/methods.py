"""Prefill strategies that the quality benchmark compares: lazy ones, and the paper's two baselines
at the same cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.errors import ConfigError, UnsupportedModelError
from lazyahead.hf.probe import examine
from lazyahead.llm import LLM
from lazyahead.prefill.cost import ModelCost, ideal_speedup, kept_counts, prefill_flops
from lazyahead.sampling import Sampling
from lazyahead.text import Prompt

REFERENCE = "balanced"
"""The preset whose cost the baselines share, where it is measured."""
BASELINES = ("random_drop", "static_prune")
_HALVINGS = 5
"""Keep ratios that are timed to find one that takes as long as another strategy."""


@dataclass(frozen=True)
class Method:
    """A prefill strategy, with the name of its kind and of the preset it comes from."""

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
    """FLOPs of a prefill of `num_tokens` tokens on one model, and other strategies that cost as
    much."""

    model: ModelCost
    num_tokens: int

    @classmethod
    def of(cls, llm: LLM, num_tokens: int) -> Cost:
        """Raises UnsupportedModelError for a model whose tokens cannot be deferred."""
        support, spec = examine(llm.model)
        if spec is None:
            reason = f"can only decode: {support.reason}; there is no prefill to compare"
            raise UnsupportedModelError(f"{llm.name} ({support.model_type}) {reason}")
        return cls(ModelCost.of(spec), num_tokens)

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def kept(self, rule: LazyPrefill | None) -> tuple[int, ...]:
        """Prompt tokens computed at each layer."""
        return kept_counts(rule, self.model, self.num_tokens)

    def flops(self, rule: LazyPrefill | None) -> float:
        """Of the prefill under `rule`."""
        return prefill_flops(rule, self.model, self.num_tokens)

    def ideal_speedup(self, rule: LazyPrefill | None, counts: Sequence[int] | None = None) -> float:
        """FLOPs of the full prefill over those under `rule`."""
        return ideal_speedup(rule, self.model, self.num_tokens, counts)

    def first_layer(self, rule: LazyPrefill) -> int:
        """The first layer that computes fewer tokens under `rule`; at least 1, since scores need
        the attention of a layer below."""
        pruned = (index for index, kept in enumerate(self.kept(rule)) if kept < self.num_tokens)
        return max(1, next(pruned, 1))

    def random_drop(self, rule: LazyPrefill, seed: int = 0) -> LazyPrefill:
        """Tokens dropped at random before the first layer, for good; as many FLOPs as `rule`."""
        same = LazyPrefill.random_drop(1.0, seed)
        return self._at_equal_cost(replace(same, min_tokens=rule.min_tokens), 0, self.flops(rule))

    def static_prune(self, rule: LazyPrefill) -> LazyPrefill:
        """Pruned once, for good, at the layer where `rule` first prunes, or at an earlier one where
        that layer alone costs more; as many FLOPs as `rule`."""
        flops = self.flops(rule)
        same = replace(LazyPrefill.static_prune(1.0), min_tokens=rule.min_tokens)
        layers = range(self.first_layer(rule), 0, -1)
        cheap = (
            layer for layer in layers if self.flops(self._pruned_once(same, layer, 1)) <= flops
        )
        return self._at_equal_cost(same, next(cheap, 1), flops)

    def _pruned_once(self, rule: LazyPrefill, layer: int, count: int) -> LazyPrefill:
        """`rule` with one boundary, at the entry to `layer`, that keeps `count` tokens."""
        return replace(rule, schedule=((layer / self.num_layers, count / self.num_tokens),))

    def _at_equal_cost(self, rule: LazyPrefill, layer: int, flops: float) -> LazyPrefill:
        """`rule` with one boundary, at the entry to `layer`, whose keep ratio costs `flops`, or the
        nearest there is."""

        def at(count: int) -> float:
            return self.flops(self._pruned_once(rule, layer, count))

        counts = range(1, self.num_tokens + 1)
        above = min(bisect_left(counts, flops, key=at), self.num_tokens - 1)
        near = counts[max(0, above - 1) : above + 1]
        return self._pruned_once(rule, layer, min(near, key=lambda count: abs(at(count) - flops)))


def reference(names: Sequence[str]) -> str:
    """The preset, of those measured, whose cost the baselines share."""
    return REFERENCE if REFERENCE in names else names[0]


def quality_methods(
    rules: dict[str, LazyPrefill], cost: Cost, seed: int = 0, decode: Lookahead | None = None
) -> list[Method]:
    """The lazy strategies by the names of their presets, and the baselines at equal cost."""
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
    """The lazy strategies with and without revival, and static pruning at equal cost."""
    methods = []
    for preset, rule in rules.items():
        methods.append(Method("lazy", preset, rule, decode))
        methods.append(Method("lazy_no_revival", preset, replace(rule, revive="never"), decode))
    return [*methods, _static(rules, cost)]


def _static(rules: dict[str, LazyPrefill], cost: Cost) -> Method:
    name = reference(list(rules))
    return Method("static_prune", name, cost.static_prune(rules[name]))


def methods_at_equal_seconds(
    llm: LLM, rules: Mapping[str, LazyPrefill], prompt: Prompt
) -> list[Method]:
    """The lazy strategies by the names of their presets; where a baseline is among them, it keeps
    what takes as long as the reference preset on this prompt.

    Raises ConfigError for baselines without a preset to compare them with.
    """
    lazy = [Method("lazy", name, rule) for name, rule in rules.items() if name not in BASELINES]
    baselines = {name: rule for name, rule in rules.items() if name in BASELINES}
    if baselines and not lazy:
        raise ConfigError(
            f"{next(iter(baselines))} is measured in the time of another preset; "
            "add --prefill balanced"
        )
    name = reference([method.prefill for method in lazy]) if baselines else ""
    return [
        *lazy,
        *(
            Method(kind, name, _at_equal_seconds(llm, rule, rules[name], prompt))
            for kind, rule in baselines.items()
        ),
    ]


def _at_equal_seconds(
    llm: LLM, rule: LazyPrefill, other: LazyPrefill, prompt: Prompt
) -> LazyPrefill:
    """`rule`, of one boundary, with the keep ratio whose first token takes as long as `other`'s;
    found by halving, each try timed beside `other`."""
    ((depth, _),), low, high = rule.schedule, 0.0, 1.0
    for _ in range(_HALVINGS):
        ratio = (low + high) / 2
        rule = replace(rule, schedule=((depth, ratio),), min_tokens=other.min_tokens)
        ours, theirs = (_ttft_s(llm, one, prompt) for one in (rule, other))
        low, high = (ratio, high) if ours < theirs else (low, ratio)
    return rule


def _ttft_s(llm: LLM, rule: LazyPrefill, prompt: Prompt) -> float:
    """Time to the first token, in seconds."""
    *_, last = Method("lazy", "", rule).on(llm).stream(prompt, sampling=Sampling(max_new_tokens=1))
    return last.stats.ttft_s
