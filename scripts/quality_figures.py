"""The paper's figures 5 and 6 for a model: scores over speed-ups and over the layer of a boundary.

Writes `quality-speedup.png` and `quality-layers.png` into a folder and prints the points as one
JSON line. Needs the extra `plot`.

    .venv/bin/python scripts/quality_figures.py out/figures --model MODEL --length 4096 --n 2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from lazyahead import LLM, LazyPrefill
from lazyahead.bench.methods import Cost, Method
from lazyahead.bench.quality import Work, draw, measure_quality
from lazyahead.errors import ConfigError, LazyAheadError
from lazyahead.reader import CATEGORIES
from lazyahead.strategies import parse_prefill

DEPTH_SCALES = (1.5, 1.0, 0.75, 0.5, 0.25)
"""Factors on the depths of the schedule: smaller ones prune earlier and save more."""
KEEP_RATIOS = (0.1, 0.3, 0.5)
DEPTHS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Depths of the single boundaries, unless layers are named."""
LINES = {
    "lazy": ("#0b5fa5", "o", "lazy, with revival"),
    "static_prune": ("#d1495b", "s", "static pruning"),
    "random_drop": ("#8d99ae", "^", "random drop"),
}
COLOURS = dict(zip(KEEP_RATIOS, ("#8ecae6", "#2a86c2", "#03396c"), strict=True))


@dataclass(frozen=True)
class SweepPoint:
    """One strategy over all samples. Scores and speed-ups are relative to the full prefill."""

    method: str
    """`lazy`, `random_drop`, `static_prune`; `one_boundary` for the preset with one boundary."""
    layer: int
    """The first layer that computes fewer tokens."""
    keep_ratio: float
    """After the last boundary."""
    relative: float | None
    agree: float
    ttft_speedup: float
    ideal_speedup: float


def measure_sweep(
    llm: LLM, rule: LazyPrefill, work: Work, layers: Sequence[int], seed: int = 0
) -> list[SweepPoint]:
    """`rule` with its depths scaled, each beside its baselines, and single boundaries at `layers`
    (empty: five of them). Raises ConfigError for a layer that cannot have one."""
    sample = next(iter(work.values()))[0]
    prompt = llm.encode(sample.document, sample.question).token_ids
    cost = Cost.of(llm, len(prompt))
    methods = [
        *schedules(rule, cost, seed),
        *single_boundaries(rule, cost, layers or default_layers(cost.num_layers)),
    ]
    _, averages = measure_quality(llm, methods, work, runs=0, progress=_report)
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
    """`rule` with its depths scaled, each with random drop and static pruning at equal cost; the
    weakest first."""
    methods: list[Method] = []
    seen: set[tuple[int, ...]] = set()
    for scale in DEPTH_SCALES:
        scaled = [(round(depth * scale, 4), ratio) for depth, ratio in rule.schedule]
        schedule = tuple((depth, ratio) for depth, ratio in scaled if depth < 1)
        if not schedule:
            continue
        lazy = replace(rule, schedule=schedule)
        if cost.kept(lazy) in seen:
            continue
        seen.add(cost.kept(lazy))
        name = f"depths x {scale:g}"
        methods.append(Method("lazy", name, lazy))
        methods.append(Method("random_drop", name, cost.random_drop(lazy, seed)))
        methods.append(Method("static_prune", name, cost.static_prune(lazy)))
    return methods


def single_boundaries(rule: LazyPrefill, cost: Cost, layers: Sequence[int]) -> list[Method]:
    """`rule` with one boundary: every layer with every ratio of `KEEP_RATIOS`. Raises ConfigError
    for a layer that is not there."""
    wrong = [layer for layer in layers if not 0 < layer < cost.num_layers]
    if wrong:
        raise ConfigError(f"--layers are 1 to {cost.num_layers - 1} of this model, got {wrong[0]}")
    return [
        Method("one_boundary", f"layer {layer}", replace(rule, schedule=((depth, ratio),)))
        for ratio in KEEP_RATIOS
        for layer in sorted(set(layers))
        for depth in [layer / cost.num_layers]
    ]


def default_layers(num_layers: int) -> list[int]:
    """Five layers from early to late."""
    return sorted({max(1, min(num_layers - 1, round(depth * num_layers))) for depth in DEPTHS})


# --- drawing --------------------------------------------------------------------------------------


def draw_figures(folder: Path, title: str, points: Sequence[SweepPoint]) -> list[Path]:
    """Writes both figures into `folder` and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    speed = folder / "quality-speedup.png"
    layers = folder / "quality-layers.png"
    _save(_speed_figure(title, points), speed)
    _save(_layers_figure(title, points), layers)
    return [speed, layers]


def _speed_figure(title: str, points: Sequence[SweepPoint]) -> Figure:
    """Relative score over speed-up, one line a method."""
    title = f"Answers against time to the first token\n{title}"
    figure, axes = _axes(title, "speed-up of the first token", points)
    for method, (colour, marker, label) in LINES.items():
        line = [point for point in points if point.method == method]
        line.sort(key=lambda point: point.ideal_speedup)
        places = [(point.ttft_speedup, point.relative) for point in line]
        _plot(axes, places, color=colour, marker=marker, label=label, linewidth=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlim(left=0.9)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(LINES))
    return figure


def _layers_figure(title: str, points: Sequence[SweepPoint]) -> Figure:
    """Relative score over the layer of the one boundary, one line a keep ratio."""
    points = [point for point in points if point.method == "one_boundary"]
    title = f"One boundary: its layer and keep ratio\n{title}"
    figure, axes = _axes(title, "layer of the boundary", points)
    for width, (ratio, colour) in zip((4.5, 3, 1.5), COLOURS.items(), strict=True):
        line = [point for point in points if point.keep_ratio == ratio]
        places = [(point.layer, point.relative) for point in line]
        _plot(axes, places, color=colour, marker="o", label=f"{ratio:.0%} kept", linewidth=width)
    axes.set_xticks(sorted({point.layer for point in points}))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(COLOURS))
    return figure


def _plot(axes: Any, line: Sequence[tuple[float, float | None]], **style: Any) -> None:
    """The points that have a score."""
    known = [(x, y) for x, y in line if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], **style)


def _axes(title: str, x_label: str, points: Sequence[SweepPoint]) -> tuple[Figure, Any]:
    """A figure with the full prefill as a dashed line."""
    top = max([1.0, *(point.relative for point in points if point.relative is not None)])
    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel("score, relative to the full prefill")
    axes.axhline(1.0, color="#444", linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    axes.set_ylim(-0.04, top + 0.16)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    """As a picture of 64 colours, a third as large."""
    drawn = BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def _report(what: str, done: float | None = None) -> None:
    print(f"\r{done or 0:4.0%} {what:40}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="folder or hub name; left out: the built-in reader")
    parser.add_argument("--prefill", default="balanced", help="preset or profile (.toml) to vary")
    parser.add_argument("--layers", default="", help="of the single boundaries, e.g. 2,4,6")
    parser.add_argument("--length", type=int, default=8192, help="prompt tokens, about")
    parser.add_argument("--n", type=int, default=2, help="samples of each category")
    parser.add_argument("--categories", default=",".join(CATEGORIES))
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, draws, prints one JSON line. Exit code 2 for what cannot be measured."""
    options = _parser().parse_args(arguments)
    try:
        rule = parse_prefill(options.prefill)
        if rule is None:
            raise ConfigError("--prefill off prunes nothing; name a preset or a profile")
        layers = [int(layer) for layer in options.layers.split(",") if layer]
        llm = LLM(options.model, prefill=None, decode=None)
        categories = options.categories.split(",")
        work = draw(llm, categories, options.length, options.n, options.seed)
        points = measure_sweep(llm, rule, work, layers, options.seed)
    except (LazyAheadError, ValueError) as error:
        print(f"quality_figures: {error}", file=sys.stderr)
        return 2
    paths = draw_figures(options.folder, f"{llm.name}, {options.length:,} tokens", points)
    print(
        json.dumps({"sweep": [asdict(point) for point in points], "files": list(map(str, paths))})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
