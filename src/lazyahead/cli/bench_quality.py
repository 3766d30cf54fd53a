"""`lazyahead bench quality`: what reading lazily does to answers, category by category."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.bench_real_text import (
    bench_real_text,
    refuse_with_data,
    refuse_without_data,
)
from lazyahead.cli.output import print_json, record, seconds, tables
from lazyahead.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from lazyahead.bench.methods import Method
    from lazyahead.bench.quality import QualityRow
    from lazyahead.bench.sweep import SweepPoint
    from lazyahead.config import LazyPrefill

PRESETS = ("balanced", "fast")
HEADERS = (
    "method",
    "score",
    "relative",
    "same text",
    "first token",
    "speed-up",
    "whole answer",
    "computed",
    "revived",
    "answer",
)
Categories = Annotated[
    str | None, typer.Option(help="Commas between. Left out: all six of LongBench.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Real text instead: a JSONL file or a folder of them, in the format of LongBench, "
        "BABILong, or with `prompt` and `answers`."
    ),
]
Lines = Annotated[str, typer.Option(help="With --data: all lines of each file, even or odd.")]
LongestAnswer = Annotated[
    int | None,
    typer.Option(min=1, help="With --data: longest answer. Left out: as the benchmark has it."),
]
Prefills = Annotated[
    list[str] | None,
    typer.Option(help="A preset or a profile (.toml). Several times; left out: balanced and fast."),
]
Samples = Annotated[int, typer.Option("--n", min=1, help="Samples of each category, or file.")]
Length = Annotated[int, typer.Option(min=256, help="Prompt tokens, about.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Which samples are drawn, and what is dropped at random.")
]
HeldOut = Annotated[
    bool, typer.Option("--heldout", help="Sentence forms that the built-in reader was never shown.")
]
DecodeOff = Annotated[
    str, typer.Option(help="How the lazy ways write: off or lookahead. All others: off.")
]


def bench_quality(
    model: options.Model = None,
    data: Data = None,
    lines: Lines = "all",
    max_new_tokens: LongestAnswer = None,
    length: Length = 8192,
    categories: Categories = None,
    prefill: Prefills = None,
    num_samples: Samples = 10,
    seed: Seed = 0,
    heldout: HeldOut = False,
    decode: DecodeOff = "off",
    dtype: options.Dtype = None,
    device: options.Device = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Samples of each category that transformers reads too.")
    ] = 3,
    figures: Annotated[
        Path | None, typer.Option(help="Sweep too, and write two pictures into this folder.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Layers to cut at in the sweep, e.g. 2,4,6. Left out: five.")
    ] = None,
    sweep_samples: Annotated[
        int | None,
        typer.Option(
            "--sweep-n", min=1, help="Samples of each category in the sweep. Left out: 2."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Scores and speed-ups of lazy reading, random drop and static pruning, the last two at equal
    cost."""
    rules = parse_rules(prefill)
    if data is not None:
        built_in = {"--heldout": heldout, "--decode": decode, "--figures": figures}
        refuse_with_data({**built_in, "--sweep": sweep, "--sweep-n": sweep_samples})
        bench_real_text(
            options.Loading(model, dtype, device, prefill="off", decode="off"),
            data,
            rules,
            lines=lines,
            categories=categories,
            num_samples=num_samples,
            length=length,
            max_new_tokens=max_new_tokens,
            runs=runs,
            seed=seed,
            json=json,
        )
        return
    refuse_without_data(lines, max_new_tokens)
    layers = parse_layers(sweep, sweep_samples, figures)
    ahead = options.parse_decode(decode)
    check_figures(figures)
    llm = options.Loading(model, dtype, device, prefill="off", decode="off").load()
    from lazyahead.bench.methods import Cost, quality_methods, reference
    from lazyahead.bench.quality import draw, measure_quality
    from lazyahead.bench.sweep import cuts, measure_sweep

    work = draw(llm, parse_categories(categories), length, num_samples, seed, heldout=heldout)
    cost, rule = Cost.of(llm, length), rules[reference(list(rules))]
    methods = quality_methods(rules, cost, seed, ahead)
    cuts(rule, cost, layers)  # refuses layers that cannot cut, before any work
    with options.quiet_transformers(), bar("quality") as progress:
        rows, averages = measure_quality(llm, methods, work, runs, progress=progress)
    results: dict[str, Any] = {
        "rows": [asdict(row) for row in rows],
        "averages": [asdict(row) for row in averages],
    }
    if figures is not None:
        few = {name: drawn[: sweep_samples or 2] for name, drawn in work.items()}
        with options.quiet_transformers(), bar("sweep") as progress:
            points = measure_sweep(llm, rule, few, layers, seed, progress=progress)
        write_figures(figures, f"{llm.name}, {length:,} tokens", points, averages)
        results["sweep"] = [asdict(point) for point in points]
    if json:
        asked = {"length": length, "n": num_samples, "heldout": heldout, "categories": list(work)}
        asked |= describe(methods, cost.ideal_speedup)
        print_json(record(llm, seed=seed, runs=runs, results=results, **asked))
    else:
        show(llm.name, length, [*rows, *averages])


def parse_categories(text: str | None) -> list[str]:
    """`few_shot,code` to names; all of them where nothing is said."""
    from lazyahead.reader import CATEGORIES

    return list(CATEGORIES) if text is None else [name.strip() for name in text.split(",")]


def parse_rules(given: Sequence[str] | None) -> dict[str, LazyPrefill]:
    """Presets and profiles by name. Raises ConfigError for one that is measured anyway."""
    rules = {}
    for name in given or PRESETS:
        rule = options.parse_prefill(name)
        if rule is None or name in ("random_drop", "static_prune"):
            raise ConfigError(
                f"--prefill {name} is measured anyway, beside each preset; name another"
            )
        rules[name] = rule
    return rules


def parse_layers(text: str | None, num_samples: int | None, figures: Path | None) -> list[int]:
    """`2,4,6` to layers. Raises ConfigError for options of a sweep that is not asked for."""
    for option, value in (("--sweep", text), ("--sweep-n", num_samples)):
        if value is not None and figures is None:
            raise ConfigError(
                f"{option} {value} is for pictures; say where they go with --figures DIR"
            )
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep takes layers like 2,4,6, got {text!r}") from None


def check_figures(folder: Path | None) -> None:
    """Refuses a folder that is none, and a missing matplotlib, before any work is done for them."""
    if folder is None:
        return
    from lazyahead.bench.figures import need_matplotlib

    need_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--figures {folder} cannot be written: {error.strerror}") from None


def write_figures(
    folder: Path, title: str, points: Sequence[SweepPoint], averages: Sequence[QualityRow]
) -> None:
    """The pictures, and where they are, on stderr."""
    from lazyahead.bench.figures import draw_figures

    for path in draw_figures(folder, title, points, averages):
        print(f"lazyahead: wrote {path}", file=sys.stderr)


def describe(
    methods: Sequence[Method], ideal_speedup: Callable[[LazyPrefill | None], float]
) -> dict[str, Any]:
    """What `--json` records of the ways of reading, in the place of the one config of other
    commands."""
    ways = [
        {
            "method": way.name,
            "prefill": way.prefill,
            "ideal_speedup": ideal_speedup(way.rule),
            "rule": way.rule.to_dict() if way.rule else None,
        }
        for way in methods
    ]
    ahead = next((way.decode.to_dict() for way in methods if way.decode), None)
    return {"prefill": ways, "decode": ahead}


@contextmanager
def bar(what: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar with the time that is left; on stderr, on a terminal only."""
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    shown = Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
    with shown:
        task = shown.add_task("loading", total=1.0)
        yield lambda now, done: shown.update(task, description=now, completed=done)


def show(name: str, length: int, rows: Sequence[QualityRow]) -> None:
    """Categories as groups, methods as lines."""
    title = f"{name}, {length:,} tokens, {rows[0].num_samples} samples of each category; speed-ups over the full prefill"
    tables().print(grouped(title, HEADERS, [line for row in rows for line in _lines(row)]))


def _lines(row: QualityRow) -> Iterator[Sequence[str]]:
    """The row; behind the full prefill of our engine also the time of plain transformers."""
    yield (
        row.category, label(row.method, row.prefill), f"{row.score:.3f}", percent(row.relative), percent(row.agree),
        seconds(row.ttft_s), f"{row.ttft_speedup:.2f}x", f"{row.generation_speedup:.2f}x",
        percent(row.prompt_tokens_computed), f"{row.revived:.0f}", f"{row.answer_tokens:.0f}",
    )  # fmt: skip
    if row.method == "full" and row.transformers_ttft_s and row.transformers_ttft_speedup:
        speedup = f"{1 / row.transformers_ttft_speedup:.2f}x"
        yield row.category, "transformers", "", "", "", seconds(row.transformers_ttft_s), speedup


def grouped(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table of lines that begin with their category, which stands above them once."""
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(
            header, justify="left" if header == "method" else "right", no_wrap=header == "method"
        )
    for category, group in groupby(lines, key=lambda line: line[0]):
        table.add_row(category.replace("_", " "), style="bold")
        for _, method, *values in group:
            table.add_row(f"  {method}", *values)
        table.add_section()
    return table


def label(method: str, prefill: str) -> str:
    """`lazy_no_revival` of `fast` as a person reads it; a baseline's preset goes without saying."""
    words = method.replace("_", " ")
    return f"{words}, {prefill}" if method.startswith("lazy") else words


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
