"""`lazyahead bench prefix`: a second question over the same document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.output import print_json, record, seconds, tables
from lazyahead.cli.progress import load_torch, progress
from lazyahead.strategies import parse_prefill

COLUMNS = (
    *("tokens", "transformers", "fresh", "from cache", "over fresh", "over transformers"),
    *("cached tokens", "cache MB", "same answers"),
)


def bench_prefix(
    model: options.Model = None,
    lengths: Annotated[str, typer.Option(help="Document lengths in tokens.")] = "2048,8192",
    prefill: options.Prefill = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions over each document.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 16,
    runs: Annotated[int, typer.Option(min=0, help="Questions that transformers answers too.")] = 2,
    json: options.Json = False,
) -> None:
    """Time to the first token of questions over a document that is in the prefix cache."""
    from lazyahead.cli.bench import parse_lengths

    wanted = parse_lengths(lengths)
    load_torch()
    from lazyahead.bench.prefix import measure_prefix
    from lazyahead.config import LazyPrefill
    from lazyahead.llm import LLM

    rule = LazyPrefill() if prefill is None else parse_prefill(prefill)
    with options.quiet_transformers(), progress("loading the model") as report:
        llm = LLM(model, dtype=dtype or "auto", device=device or "auto", prefill=rule)
        rows = measure_prefix(llm, wanted, questions, runs, max_new_tokens, report)
    if json:
        results = {"rows": [asdict(row) for row in rows]}
        print_json(record(llm, seed=0, runs=runs, results=results))
        return
    title = f"{llm.name}: time to the first token of a question over a document"
    table = Table(title=title, title_justify="left")
    for header in COLUMNS:
        table.add_column(header, justify="right")
    for row in rows:
        plain, faster = row.baseline_ttft_s, row.baseline_speedup
        table.add_row(
            f"{row.length:,}",
            "–" if plain is None else seconds(plain),
            seconds(row.ttft_s),
            seconds(row.cached_ttft_s),
            f"{row.speedup:.1f}x",
            "–" if faster is None else f"{faster:.1f}x",
            f"{row.cached_tokens:,}",
            f"{row.cache_bytes / 2**20:,.0f}",
            f"{row.identical:.0%}",
        )
    tables().print(table)
