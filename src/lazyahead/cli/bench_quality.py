"""`lazyahead bench quality`: how pruning changes answers, category by category.

With `--turns 2` the question comes in the turn after the document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.bench_real_text import (
    bench_real_text,
    refuse_with_data,
    refuse_without_data,
)
from lazyahead.cli.output import print_json, record, seconds, tables
from lazyahead.cli.progress import progress
from lazyahead.errors import ConfigError
from lazyahead.strategies import parse_prefill

if TYPE_CHECKING:
    from lazyahead.bench.methods import Method
    from lazyahead.bench.quality import QualityRow
    from lazyahead.bench.second_turn import SecondTurnRow
    from lazyahead.config import LazyPrefill

PRESETS = ("balanced", "fast")
HEADERS: tuple[str, ...] = (
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
SECOND_TURN_HEADERS = (
    "method",
    "score",
    "relative",
    "same text",
    "revived",
    "1st turn",
    "2nd turn",
    "full prefill",
    "ratio",
)


def bench_quality(
    model: options.Model = None,
    data: Data = None,
    lines: Lines = "all",
    max_new_tokens: LongestAnswer = None,
    length: options.Length = 8192,
    categories: Annotated[
        str | None,
        typer.Option(
            help="Commas between. Left out: all six of LongBench; with --turns 2 those with one "
            "place that answers."
        ),
    ] = None,
    prefill: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset or a profile (.toml). May be given several times; left out: balanced "
            "and fast. With --data also random_drop and static_prune, which then take as long as "
            "balanced."
        ),
    ] = None,
    turns: Annotated[
        int, typer.Option(min=1, max=2, help="2: the question comes after the document's turn.")
    ] = 1,
    first: Annotated[
        str | None,
        typer.Option(
            help="With --turns 2, what the first turn asks: neutral (to read the document, the "
            "default) or question (for another fact of it)."
        ),
    ] = None,
    num_samples: options.NumSamples = 10,
    seed: options.SampleSeed = 0,
    heldout: Annotated[
        bool,
        typer.Option("--heldout", help="Sentence forms that the built-in reader never trained on."),
    ] = False,
    decode: Annotated[
        str, typer.Option(help="Decoding of the lazy methods: off or lookahead.")
    ] = "off",
    dtype: options.Dtype = None,
    device: options.Device = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Samples of each category for transformers too.")
    ] = 3,
    json: options.Json = False,
) -> None:
    """Scores and speed-ups of lazy prefill, random drop and static pruning at equal cost."""
    if first is not None and turns == 1:
        raise ConfigError(f"--first {first} is for two turns; add --turns 2")
    rules = parse_rules(prefill, may_be_baseline=data is not None)
    if data is not None:
        second_turn = {"--turns": turns if turns > 1 else None, "--first": first}
        refuse_with_data({"--heldout": heldout, "--decode": decode, **second_turn})
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
    drafting = options.parse_decode(decode)
    llm = options.Loading(model, dtype, device, prefill="off", decode="off").load()
    from lazyahead.bench.methods import Cost, quality_methods, second_turn_methods
    from lazyahead.bench.quality import draw, measure_quality
    from lazyahead.bench.second_turn import measure_second_turn

    names = parse_categories(categories, turns)
    work = draw(llm, names, length, num_samples, seed, heldout=heldout)
    cost = Cost.of(llm, length)
    settings: dict[str, Any] = {"length": length, "n": num_samples, "heldout": heldout}
    settings |= {"turns": turns, "categories": list(work)}
    rows: Sequence[QualityRow] | Sequence[SecondTurnRow]
    averages: Sequence[QualityRow] | Sequence[SecondTurnRow]
    with options.quiet_transformers(), progress("quality") as report:
        if turns == 1:
            methods = quality_methods(rules, cost, seed, drafting)
            rows, averages = measure_quality(llm, methods, work, runs, progress=report)
        else:
            settings["first"] = first or "neutral"
            methods = second_turn_methods(rules, cost, drafting)
            rows, averages = measure_second_turn(
                llm, methods, work, settings["first"], progress=report
            )
    if not json:
        show(llm.name, length, [*rows, *averages])
        return
    results = {
        "rows": [asdict(row) for row in rows],
        "averages": [asdict(row) for row in averages],
    }
    settings |= describe(methods, cost.ideal_speedup)
    print_json(record(llm, seed=seed, runs=runs if turns == 1 else 1, results=results, **settings))


def parse_categories(text: str | None, turns: int = 1) -> list[str]:
    """`few_shot,code` to names; without a text those that are measured by default."""
    if text is not None:
        return [name.strip() for name in text.split(",")]
    from lazyahead.bench import second_turn
    from lazyahead.reader import CATEGORIES

    return list(CATEGORIES if turns == 1 else second_turn.CATEGORIES)


def parse_rules(
    given: Sequence[str] | None, may_be_baseline: bool = False
) -> dict[str, LazyPrefill]:
    """Presets and profiles by name. Raises ConfigError for one that is measured anyway, as the
    baselines are unless they `may_be_baseline`."""
    rules = {}
    for name in given or PRESETS:
        rule = parse_prefill(name)
        if rule is None or (name in ("random_drop", "static_prune") and not may_be_baseline):
            raise ConfigError(
                f"--prefill {name} is measured anyway, beside each preset; name another"
            )
        rules[name] = rule
    return rules


def describe(
    methods: Sequence[Method], ideal_speedup: Callable[[LazyPrefill | None], float]
) -> dict[str, Any]:
    """The methods as `--json` records them, in the place of the one config of other commands."""
    prefill = [
        {
            "method": method.name,
            "prefill": method.prefill,
            "ideal_speedup": ideal_speedup(method.rule),
            "rule": method.rule.to_dict() if method.rule else None,
        }
        for method in methods
    ]
    decode = next((method.decode.to_dict() for method in methods if method.decode), None)
    return {"prefill": prefill, "decode": decode}


# --- tables ---------------------------------------------------------------------------------------


def show(name: str, length: int, rows: Sequence[QualityRow | SecondTurnRow]) -> None:
    """Categories as groups, methods as lines."""
    from lazyahead.bench.quality import QualityRow

    title = f"{name}, {length:,} tokens, {rows[0].num_samples} samples of each category; "
    if isinstance(rows[0], QualityRow):
        title += "speed-ups over the full prefill"
        headers = HEADERS
    else:
        title += "the question in the second turn"
        headers = SECOND_TURN_HEADERS
    lines = [line for row in rows for line in _lines(row)]
    tables().print(grouped(title, headers, lines))


def _lines(row: QualityRow | SecondTurnRow) -> Iterator[Sequence[str]]:
    """The row; below the full prefill of our engine also the time of plain transformers."""
    from lazyahead.bench.quality import QualityRow

    common = (
        row.category,
        label(row.method, row.prefill),
        f"{row.score:.3f}",
        percent(row.relative),
        percent(row.agree),
    )
    if not isinstance(row, QualityRow):
        yield (
            *common,
            f"{row.revived:.0f}",
            f"{row.first_ttft_speedup:.2f}x",
            seconds(row.ttft_s),
            seconds(row.reread_ttft_s),
            f"{row.ttft_ratio:.3f}x",
        )
        return
    yield (
        *common,
        seconds(row.ttft_s),
        f"{row.ttft_speedup:.2f}x",
        f"{row.generation_speedup:.2f}x",
        percent(row.prompt_tokens_computed),
        f"{row.revived:.0f}",
        f"{row.answer_tokens:.0f}",
    )
    if row.method == "full" and row.transformers_ttft_s and row.transformers_ttft_speedup:
        speedup = f"{1 / row.transformers_ttft_speedup:.2f}x"
        yield row.category, "transformers", "", "", "", seconds(row.transformers_ttft_s), speedup


def grouped(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table of lines that begin with their category, which is printed above them once."""
    table = Table(title=title, title_justify="left")
    for header in headers:
        is_name = header == "method"
        table.add_column(header, justify="left" if is_name else "right", no_wrap=is_name)
    for category, group in groupby(lines, key=lambda line: line[0]):
        table.add_row(category.replace("_", " "), style="bold")
        for _, method, *values in group:
            table.add_row(f"  {method}", *values)
        table.add_section()
    return table


def label(method: str, prefill: str) -> str:
    """`lazy_no_revival` under `fast` as `lazy no revival, fast`; a baseline without its preset."""
    words = method.replace("_", " ")
    return f"{words}, {prefill}" if method.startswith("lazy") else words


def percent(value: float | None) -> str:
    """A fraction in percent; a dash where there is none."""
    return "–" if value is None else f"{value:.0%}"
