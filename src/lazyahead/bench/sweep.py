"""Many ways of reading on a few samples: how strongly and where, before answers suffer (the paper's
figures 5, 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lazyahead.bench.methods import Cost, Method
from lazyahead.bench.quality import Progress, Work, measure_quality
from lazyahead.config import LazyPrefill
from lazyahead.errors import ConfigError
from lazyahead.llm import LLM

DEPTH_SCALES = (1.5, 1.0, 0.75, 0.5, 0.25)
"""A schedule cuts sooner, and so saves more, as its depths shrink."""
KEEP_RATIOS = (0.1, 0.3, 0.5)
"""Of the cuts at one layer."""
DEPTHS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Of the cuts at one layer, unless layers are named."""


@dataclass(frozen=True)
class SweepPoint:
    """One way of reading, over all samples of the sweep. Speed-ups and scores are over the full
    prefill."""

    method: str
    """`lazy`, `random_drop` or `static_prune`; `one_cut` for a single boundary with the preset's
    scorer and revival."""
    layer: int
    """Where fewer tokens go on for the first time."""
    keep_ratio: float
    """What goes on after the last boundary."""
    relative: float | None
    agree: float
    ttft_speedup: float
    ideal_speedup: float
    """By arithmetic, attention included."""


def measure_sweep(
    llm: LLM,
    rule: LazyPrefill,
    work: Work,
    layers: Sequence[int] = (),
    seed: int = 0,
    *,
    progress: Progress = lambda what, done: None,
) -> list[SweepPoint]:
    """Schedules as strong as `rule` and weaker and stronger ones, each beside its baselines; and
    single cuts at `layers` (left out: five of them). Raises ConfigError for a layer that cannot
    cut."""
    cost = Cost.of(llm, len(_any_prompt(llm, work)))
    methods = [
        *schedules(rule, cost, seed),
        *cuts(rule, cost, layers or default_layers(cost.num_layers)),
    ]
    _, averages = measure_quality(llm, methods, work, runs=0, progress=progress)
    return [
        SweepPoint(
            method=row.method,
            layer=cost.first_layer(method.rule),
            keep_ratio=method.rule.schedule[-1][1],
            relative=row.relative,
            agree=row.agree,
            ttft_speedup=row.ttft_speedup,
            ideal_speedup=cost.ideal_speedup(method.rule),
        )
        for method, row in zip(methods, averages[1:], strict=True)
        if method.rule is not None
    ]


def schedules(rule: LazyPrefill, cost: Cost, seed: int = 0) -> list[Method]:
    """`rule` with its depths scaled, each with a random drop and a static pruning at equal cost;
    weakest first."""
    methods: list[Method] = []
    seen: set[tuple[int, ...]] = set()
    for scale in DEPTH_SCALES:
        scaled = tuple(
            (round(depth * scale, 4), ratio) for depth, ratio in rule.schedule if depth * scale < 1
        )
        if not scaled:
            continue
        lazy = replace(rule, schedule=scaled)
        if cost.kept(lazy) in seen:
            continue
        seen.add(cost.kept(lazy))
        name = f"depths x {scale:g}"
        methods.append(Method("lazy", name, lazy))
        methods.append(Method("random_drop", name, cost.random_drop(lazy, seed)))
        methods.append(Method("static_prune", name, cost.static_prune(lazy)))
    return methods


def cuts(rule: LazyPrefill, cost: Cost, layers: Sequence[int]) -> list[Method]:
    """`rule` with a single boundary: every layer with every ratio. Raises ConfigError for a layer
    that cannot cut."""
    wrong = [layer for layer in layers if not 0 < layer < cost.num_layers]
    if wrong:
        raise ConfigError(
            f"--sweep takes layers from 1 to {cost.num_layers - 1} of this model, got {wrong[0]}"
        )
    return [
        Method(
            "one_cut", f"layer {layer}", replace(rule, schedule=((layer / cost.num_layers, ratio),))
        )
        for ratio in KEEP_RATIOS
        for layer in sorted(set(layers))
    ]


def default_layers(num_layers: int) -> list[int]:
    """Some from early to late."""
    return sorted({max(1, min(num_layers - 1, round(depth * num_layers))) for depth in DEPTHS})


def _any_prompt(llm: LLM, work: Work) -> list[int]:
    sample = next(iter(work.values()))[0]
    return llm.encode(sample.document, sample.question).token_ids
