"""`lazyahead bench second-turn`: the question comes after the document was read for nothing in
particular."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lazyahead.cli import options
from lazyahead.cli.bench_quality import (
    Categories,
    DecodeOff,
    HeldOut,
    Length,
    Prefills,
    Samples,
    Seed,
    bar,
    describe,
    grouped,
    label,
    parse_categories,
    parse_rules,
    percent,
)
from lazyahead.cli.output import print_json, record, seconds, tables

if TYPE_CHECKING:
    from lazyahead.bench.second_turn import SecondTurnRow

HEADERS = (
    "method",
    "score",
    "relative",
    "same text",
    "revived",
    "1st turn",
    "2nd turn",
    "reading again",
    "ratio",
)


def bench_second_turn(
    model: options.Model = None,
    length: Length = 8192,
    categories: Categories = "single_doc_qa,multi_doc_qa,synthetic",
    prefill: Prefills = None,
    first: Annotated[
        str,
        typer.Option(
            help="What the first turn asks: neutral (to read), or question (for another fact)."
        ),
    ] = "neutral",
    num_samples: Samples = 10,
    seed: Seed = 0,
    heldout: HeldOut = False,
    decode: DecodeOff = "off",
    dtype: options.Dtype = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """A document first, the question in the next turn: with revival, without it, and pruned for
    good."""
    rules = parse_rules(prefill)
    ahead = options.parse_decode(decode)
    llm = options.Loading(model, dtype, device, prefill="off", decode="off").load()
    from lazyahead.bench.methods import Cost, second_turn_methods
    from lazyahead.bench.quality import draw
    from lazyahead.bench.second_turn import measure_second_turn

    work = draw(llm, parse_categories(categories), length, num_samples, seed, heldout=heldout)
    cost = Cost.of(llm, length)
    methods = second_turn_methods(rules, cost, ahead)
    with options.quiet_transformers(), bar("second turn") as progress:
        rows, averages = measure_second_turn(llm, methods, work, first, progress=progress)
    if json:
        results = {
            "rows": [asdict(row) for row in rows],
            "averages": [asdict(row) for row in averages],
        }
        asked = {
            "length": length,
            "n": num_samples,
            "heldout": heldout,
            "first": first,
            "categories": list(work),
        }
        print_json(
            record(
                llm,
                seed=seed,
                runs=1,
                results=results,
                **asked,
                **describe(methods, cost.ideal_speedup),
            )
        )
    else:
        show(llm.name, length, [*rows, *averages])


def show(name: str, length: int, rows: Sequence[SecondTurnRow]) -> None:
    """Categories as groups, methods as lines."""
    title = f"{name}, {length:,} tokens, {rows[0].num_samples} samples of each category; the question in the second turn"
    lines = [
        (
            row.category, label(row.method, row.prefill), f"{row.score:.3f}", percent(row.relative), percent(row.agree),
            f"{row.revived:.0f}", f"{row.first_ttft_speedup:.2f}x", seconds(row.ttft_s), seconds(row.reread_ttft_s),
            f"{row.ttft_ratio:.3f}x",
        )
        for row in rows
    ]  # fmt: skip
    tables().print(grouped(title, HEADERS, lines))
