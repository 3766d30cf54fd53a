"""`lazyahead bench decode --data`: how fast answers to real prompts are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.output import note, print_json, record, tables

if TYPE_CHECKING:
    from lazyahead.bench.decode_data import DecodeDataRow

HEADERS = (
    *("category", "prompts", "transformers", "prompt lookup", "plain", "lookahead"),
    *("speed-up", "tokens per step", "drafting per token", "same text"),
)


def bench_decode_data(
    loading: options.Loading,
    path: Path,
    *,
    num_samples: int,
    length: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    runs: int,
    json: bool,
) -> None:
    """Reads the prompts, then loads the model, measures and prints."""
    from lazyahead.bench.data.read import read_samples, take
    from lazyahead.bench.data.sample import Sample
    from lazyahead.bench.decode_data import measure_decode_data
    from lazyahead.bench.real_text import fitting_length
    from lazyahead.cli.progress import progress
    from lazyahead.sampling import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens)
    if temperature:
        sampling = replace(sampling, temperature=temperature, seed=seed)
    found = read_samples(path)
    for line in found.left_out:
        note(f"left out {line}")
    work: dict[str, list[Sample]] = {}
    for sample in take(found.samples, num_samples, "category"):
        work.setdefault(sample.category, []).append(sample)
    llm = loading.load()
    length = fitting_length(llm, length, max_new_tokens)
    with options.quiet_transformers(), progress("decode") as report:
        rows = measure_decode_data(
            llm,
            work,
            length=length,
            sampling=sampling,
            runs=runs,
            progress=report,
        )
    if not json:
        _show(llm.name, rows, runs)
        return
    asked: dict[str, Any] = {"data": path.name, "n": num_samples, "length": length}
    results = {"rows": [asdict(row) for row in rows]}
    asked |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
    config = {**asked, "left_out": list(found.left_out)}
    print_json(record(llm, seed=sampling.seed, runs=runs, results=results, **config))


def _show(name: str, rows: Sequence[DecodeDataRow], runs: int) -> None:
    title = f"{name}: tokens per second after the first, {runs} rounds"
    table = Table(title=title, title_justify="left")
    for header in HEADERS:
        table.add_column(header, justify="left" if header == "category" else "right")
    for row in rows:
        speeds = (row.baseline_tok_s, row.prompt_lookup_tok_s, row.plain_tok_s, row.lookahead_tok_s)
        table.add_row(
            row.workload,
            str(row.num),
            *(f"{speed:,.1f}" for speed in speeds),
            f"{row.speedup:.2f}x" if row.speedup else "–",
            f"{row.tokens_per_step:.2f}",
            f"{row.draft_us_per_token:.0f} µs",
            f"{row.identical:.0%}",
        )
    tables().print(table)
