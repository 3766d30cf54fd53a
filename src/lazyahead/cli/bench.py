"""`lazyahead bench`: measurements beside plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.bench_decode import bench_decode
from lazyahead.cli.bench_prefix import bench_prefix
from lazyahead.cli.bench_quality import bench_quality
from lazyahead.cli.bench_replay import bench_replay
from lazyahead.cli.bench_serve import bench_serve
from lazyahead.cli.output import print_json, record, seconds, tables
from lazyahead.cli.progress import load_torch, progress
from lazyahead.errors import ConfigError
from lazyahead.strategies import parse_prefill

if TYPE_CHECKING:
    from lazyahead.bench.prefill import PrefillRow

COLUMNS = (
    *("tokens", "transformers", "lazyahead", "speed-up", "ideal"),
    *("keep-all", "memory", "step", "2nd question", "reviving"),
)

app = typer.Typer(no_args_is_help=True)
app.command("decode")(bench_decode)
app.command("replay")(bench_replay)
app.command("quality")(bench_quality)
app.command("prefix")(bench_prefix)
app.command("serve")(bench_serve)


@app.callback()
def group() -> None:
    """Measure, beside plain transformers."""


def parse_lengths(text: str) -> tuple[int, ...]:
    """`4096,8192` to numbers."""
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--lengths takes numbers like 4096,8192, got {text!r}") from None
    if min(lengths) < 1:
        raise ConfigError(f"--lengths must be at least 1, got {min(lengths)}")
    return lengths


@app.command("prefill")
def bench_prefill(
    model: options.Model = None,
    shape: Annotated[
        str | None,
        typer.Option(help="A random model of a known size, e.g. qwen2.5-0.5b: speed only."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "4096,8192",
    prefill: options.Prefill = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    runs: options.Runs = 3,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too (loads the model twice more on a CPU).")
    ] = True,
    json: options.Json = False,
) -> None:
    """Time to the first token, beside transformers `generate`."""
    wanted = parse_lengths(lengths)
    if model and shape:
        raise ConfigError("give --model or --shape, not both")
    load_torch()
    from lazyahead.bench.prefill import Subject, measure_prefill
    from lazyahead.config import LazyPrefill

    rule = LazyPrefill() if prefill is None else parse_prefill(prefill)
    subject = Subject(model, shape, dtype, device, max_context=max(wanted) + 64)
    with options.quiet_transformers(), progress("loading the model") as report:
        llm, rows = measure_prefill(subject, rule, wanted, runs, memory=memory, progress=report)
    name = shape or llm.name
    if json:
        results = {"rows": [asdict(row) for row in rows]}
        print_json({**record(llm, seed=0, runs=runs, results=results), "model": name})
    else:
        show_prefill(name, rows, runs)


def show_prefill(name: str, rows: Sequence[PrefillRow], runs: int) -> None:
    """The rows as a table."""
    table = Table(title=f"{name}: time to the first token, median of {runs}", title_justify="left")
    for header in COLUMNS:
        table.add_column(header, justify="right")
    for row in rows:
        ratios = (
            row.speedup,
            row.ideal_speedup,
            row.keep_all_ratio,
            row.peak_memory_ratio,
            row.decode_step_ratio,
            row.second_question_ratio,
            row.reviving_step_ratio,
        )
        times = (seconds(row.baseline_ttft_s), seconds(row.ttft_s))
        table.add_row(f"{row.length:,}", *times, *map(_times, ratios))
    tables().print(table)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"
