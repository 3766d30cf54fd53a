"""The paper's figures 5 and 6 from a sweep of our own, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from lazyahead.bench.quality import QualityRow
from lazyahead.bench.sweep import KEEP_RATIOS, SweepPoint
from lazyahead.errors import ConfigError

LOOKS = {
    "lazy": ("#0b5fa5", "o", "lazy, with revival"),
    "static_prune": ("#d1495b", "s", "static pruning"),
    "random_drop": ("#8d99ae", "^", "random drop"),
}
SHADES = dict(zip(KEEP_RATIOS, ("#8ecae6", "#2a86c2", "#03396c"), strict=True))
SIZE = (6.4, 4.2)
DPI = 110
NUM_COLOURS = 64


def need_matplotlib() -> None:
    """Raises ConfigError where matplotlib is missing: to be asked before hours of measuring."""
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError(
            "--figures needs matplotlib; install it with: pip install 'lazyahead[plot]'"
        ) from None


def draw_figures(
    folder: Path, title: str, points: Sequence[SweepPoint], presets: Sequence[QualityRow] = ()
) -> list[Path]:
    """Writes both pictures into `folder` and returns their names; `presets` are rows to mark in the
    first."""
    speed, layers = folder / "quality-speedup.png", folder / "quality-layers.png"
    _save(_speed_figure(title, points, presets), speed)
    _save(_layers_figure(title, points), layers)
    return [speed, layers]


def _speed_figure(title: str, points: Sequence[SweepPoint], presets: Sequence[QualityRow]) -> Any:
    """Relative score over speed-up, a line for each method."""
    marked = [row for row in presets if row.method == "lazy"]
    top = _top([*points, *marked])
    figure, axes = _axes(
        f"Answers against time to the first token\n{title}", "speed-up of the first token", top
    )
    for method, (colour, marker, label) in LOOKS.items():
        line = sorted((p for p in points if p.method == method), key=lambda p: p.ideal_speedup)
        style = {"color": colour, "marker": marker, "label": label, "linewidth": 2, "markersize": 6}
        _plot(axes, [(p.ttft_speedup, p.relative) for p in line], **style)
    for row in (row for row in marked if row.relative is not None):
        axes.plot(
            row.ttft_speedup, row.relative, marker="*", markersize=15, color="#f4a300", markeredgecolor="#444",
            linestyle="none", zorder=5,
        )  # fmt: skip
        axes.annotate(
            row.prefill,
            (row.ttft_speedup, row.relative),
            xytext=(0, 11),
            textcoords="offset points",
            ha="center",
        )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlim(left=0.9)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(LOOKS))
    return figure


def _layers_figure(title: str, points: Sequence[SweepPoint]) -> Any:
    """Relative score over the layer of a single cut, a line for each keep ratio."""
    x_label = "layer at whose entry the cut is made"
    figure, axes = _axes(
        f"One cut: where, and how many tokens go on\n{title}", x_label, _top(points)
    )
    for width, (ratio, colour) in zip(
        (4.5, 3, 1.5), SHADES.items(), strict=True
    ):  # equal lines show one in another
        line = sorted(
            (p for p in points if p.method == "one_cut" and p.keep_ratio == ratio),
            key=lambda p: p.layer,
        )
        style = {"color": colour, "marker": "o", "label": f"{ratio:.0%} kept", "linewidth": width}
        _plot(axes, [(p.layer, p.relative) for p in line], markersize=2.5 * width, **style)
    axes.set_xticks(sorted({p.layer for p in points if p.method == "one_cut"}))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(SHADES))
    return figure


def _plot(axes: Any, line: Sequence[tuple[float, float | None]], **style: Any) -> None:
    """The points that have a score."""
    known = [(x, y) for x, y in line if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], **style)


def _top(marks: Sequence[SweepPoint | QualityRow]) -> float:
    """Some room above the highest mark."""
    return max([1.0, *(mark.relative for mark in marks if mark.relative is not None)]) + 0.16


def _axes(title: str, x_label: str, top: float) -> tuple[Any, Any]:
    """A figure of its own, no global state, with the full prefill as a dashed line."""
    figure = import_module("matplotlib.figure").Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel("score, relative to the full prefill")
    axes.axhline(1.0, color="#444", linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    axes.set_ylim(-0.04, top)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """As a picture of few colours, a third as large."""
    drawn = BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    import_module("PIL.Image").open(drawn).convert("RGB").quantize(NUM_COLOURS).save(
        path, optimize=True
    )
