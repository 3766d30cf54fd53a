"""`lazyahead bench decode`: tokens per second with drafts and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.bench_decode_data import bench_decode_data
from lazyahead.cli.output import print_json, record, tables
from lazyahead.cli.progress import progress
from lazyahead.errors import ConfigError

if TYPE_CHECKING:
    from lazyahead.bench.decode import DecodeRow
    from lazyahead.bench.workloads import Workload
    from lazyahead.llm import LLM


HEADERS = (
    "workload",
    "transformers",
    "prompt lookup",
    "plain",
    "cold",
    "lookahead",
    "speed-up",
    "ideal",
    "tokens per step",
    "drafting per token",
    "same text",
)


def bench_decode(
    model: options.Model = None,
    workload: Annotated[
        str,
        typer.Option(help="rag, qa, code, chat, random, or several of them with commas between."),
    ] = "rag,qa,code,chat,random",
    text: Annotated[
        Path | None, typer.Option(help="Go on with parts of this text instead.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "--prompts",
            help="Real prompts instead: a JSONL file or a folder of them, in the format of "
            "Spec-Bench, LongBench, BABILong, or with `prompt`.",
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Prompt tokens, about.")] = 4096,
    answers: Annotated[
        int, typer.Option("--answers", "--n", min=1, help="Prompts of each workload or category.")
    ] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 1,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Second half of a stream of questions, the first half remembered."
        ),
    ] = False,
    prefill: Annotated[
        str, typer.Option(help="Of our sides: off, a preset, or a profile (.toml).")
    ] = "off",
    temperature: Annotated[
        float, typer.Option(min=0.0, help="With --data: 0 picks the likeliest token.")
    ] = 0.0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Which questions are drawn, or, with a temperature, tokens.")
    ] = 0,
    runs: options.Runs = 3,
    json: options.Json = False,
) -> None:
    """Tokens per second after the first token, beside transformers `generate`."""
    if text and data:
        raise ConfigError("give --text or --data (--prompts), not both")
    if memory and (text or data or batch > 1):
        raise ConfigError(
            "--memory brings its own questions, one at a time; leave out --text, --data and --batch"
        )
    loading = options.Loading(model, dtype, device, prefill, decode="lookahead")
    if data is not None:
        if batch > 1:
            raise ConfigError(f"--batch {batch} is for workloads; --data is answered one by one")
        bench_decode_data(
            loading,
            data,
            num_samples=answers,
            length=length,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            runs=runs,
            json=json,
        )
        return
    if temperature:
        raise ConfigError(f"--temperature {temperature} is for --data PATH; give both")
    llm = loading.load()
    from lazyahead.bench.decode import measure_decode, measure_memory
    from lazyahead.bench.workloads import stream_of_questions

    count = max(answers, batch)
    with ExitStack() as stack:
        stack.enter_context(options.quiet_transformers())
        report = stack.enter_context(progress("decode"))
        if memory:
            path = Path(stack.enter_context(TemporaryDirectory())) / "answers.db"
            stream = stream_of_questions(llm, length, max(2, answers), max_new_tokens, seed)
            rows = [measure_memory(llm, stream, runs, str(path), progress=report)]
        else:
            works = _workloads(llm, workload, text, (length, count, max_new_tokens, seed))
            rows = [measure_decode(llm, work, runs, batch=batch, progress=report) for work in works]
    if json:
        asked = {"length": length, "answers": answers, "max_new_tokens": max_new_tokens}
        results = {"rows": [asdict(row) for row in rows]}
        print_json(record(llm, seed=seed, runs=runs, results=results, **asked))
    else:
        _show(llm.name, rows, runs)


def _workloads(
    llm: LLM, names: str, text: Path | None, sizes: tuple[int, int, int, int]
) -> Iterator[Workload]:
    from lazyahead.bench.workloads import text_workload, workload

    length, count, max_new_tokens, seed = sizes
    if text is not None:
        yield text_workload(llm, text, length, count, max_new_tokens)
    else:
        for name in names.split(","):
            yield workload(llm, name.strip(), length, count, max_new_tokens, seed)


def _show(name: str, rows: Sequence[DecodeRow], runs: int) -> None:
    """The rows as a table."""
    table = Table(
        title=f"{name}: tokens per second after the first, median of {runs}", title_justify="left"
    )
    for header in HEADERS:
        table.add_column(header, justify="left" if header == "workload" else "right")
    for row in rows:
        speeds = (
            row.baseline_tok_s,
            row.prompt_lookup_tok_s,
            row.plain_tok_s,
            row.cold_tok_s,
            row.lookahead_tok_s,
        )
        what = row.workload if row.batch == 1 else f"{row.workload}, {row.batch} at once"
        table.add_row(
            what,
            *("–" if speed is None else f"{speed:,.0f}" for speed in speeds),
            f"{row.speedup:.2f}x" if row.speedup else "–",
            f"{row.ideal_speedup:.2f}x",
            f"{row.tokens_per_step:.2f}",
            f"{row.draft_us_per_token:.0f} µs",
            "yes" if row.identical else "no",
        )
    tables().print(table)
