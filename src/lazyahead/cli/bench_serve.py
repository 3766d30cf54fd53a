"""`lazyahead bench serve`: load on an OpenAI server, measured as `vllm bench serve` does."""

from __future__ import annotations

import asyncio
import json as json_
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyahead.cli import complain, options
from lazyahead.cli.bench_serve_output import ResultFile, describe, figures_of, show
from lazyahead.cli.input import parse_path
from lazyahead.cli.output import note, print_json
from lazyahead.cli.progress import progress
from lazyahead.errors import ConfigError

if TYPE_CHECKING:
    from lazyahead.bench.serve import Load, Run

KEY_VARIABLE = "OPENAI_API_KEY"
NUM_ERRORS = 3
"""Errors of requests that are shown."""


def bench_serve(
    url: Annotated[
        str, typer.Option("--url", "--base-url", help="The server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    backend: Annotated[
        str, typer.Option(help="openai (completions) or openai-chat (chat completions).")
    ] = "openai",
    endpoint: Annotated[
        str | None, typer.Option(help="Path, where it is not the backend's own.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As the server names it. Left out: its first."),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(help=f"KEY=VALUE; may be repeated. {KEY_VARIABLE} is sent as the key."),
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option(help="random, or custom with --data. Left out: what fits.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "--dataset-path",
            parser=parse_path,
            help="Real prompts: a JSONL file or a folder of them, in the format of Spec-Bench, "
            "LongBench, BABILong, or with `prompt`.",
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.")] = 100,
    input_len: Annotated[
        int | None,
        typer.Option(
            "--random-input-len", "--input-len", min=1, help="Tokens of a prompt. [default: 1024]"
        ),
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option(
            "--random-output-len",
            "--output-len",
            min=1,
            help="Tokens of an answer. Left out: 128, of --data what it says.",
        ),
    ] = None,
    range_ratio: Annotated[
        float | None,
        typer.Option("--random-range-ratio", help="Share by which lengths vary. [default: 0]"),
    ] = None,
    prefix_len: Annotated[
        int | None,
        typer.Option(
            "--random-prefix-len", min=0, help="More tokens that all prompts share. [default: 0]"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Counts random prompts' tokens. Left out: the server's /tokenize."),
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Requests a second.")] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="Of a finite rate: 1 is Poisson, above 1 more even.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests at a time.")
    ] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="More requests, not counted.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Full-length answers to --data too.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Left out: the server's own.")
    ] = None,
    extra_body: Annotated[
        str | None, typer.Option(help="More fields of each request, as a JSON object.")
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Of ttft, tpot, itl and e2el.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles, e.g. 50,99.")] = "99",
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="ttft:MS, tpot:MS, e2el:MS: what a good request keeps to."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Prompts, and when they are sent.")] = 0,
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write the JSON to a file too.")
    ] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="With each request's own values.")
    ] = False,
    result_dir: Annotated[Path | None, typer.Option(parser=parse_path)] = None,
    result_filename: Annotated[str | None, typer.Option()] = None,
    json: options.Json = False,
) -> None:
    """Load on any OpenAI server: arguments, fields and meanings of `vllm bench serve`."""
    load_class = _load_class()
    from lazyahead.bench import serve_metrics as names
    from lazyahead.bench.serve_prompts import RandomPrompts

    only_random = {
        "--random-input-len": input_len,
        "--random-range-ratio": range_ratio,
        "--random-prefix-len": prefix_len,
        "--tokenizer": tokenizer,
    }
    _check_data(data, dataset_name, only_random)
    wanted = {
        "metrics": names.parse_metrics(percentile_metrics),
        "percentiles": names.parse_percentiles(metric_percentiles),
        "goodput": names.parse_goodput(goodput or []),
    }
    given: dict[str, Any] = {
        "input_len": input_len,
        "range_ratio": range_ratio,
        "prefix_len": prefix_len,
    }
    if data is None:
        given["output_len"] = output_len
    load = load_class(
        url=url,
        backend=backend,
        endpoint=endpoint,
        model=model,
        tokenizer=tokenizer,
        headers=_headers(header or []),
        data=data,
        random=RandomPrompts(**{k: value for k, value in given.items() if value is not None}),
        output_len=output_len if data is not None else None,
        num_prompts=num_prompts,
        num_warmups=num_warmups,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        ignore_eos=ignore_eos,
        extra_body=_extra(extra_body, temperature),
        seed=seed,
    )
    file = ResultFile(save_result, result_dir, result_filename)
    if save_detailed and not (save_result or json):
        raise ConfigError("--save-detailed adds to --json or --save-result; give one of them")
    run = _measure(load)
    figures = figures_of(run, save_detailed, wanted)
    result = None
    if json or save_result:
        result = describe(load, run, figures, wanted)
        file.write(result)
    if json and result is not None:
        print_json(result)
    else:
        show(load, run, figures)
    if not figures["completed"]:
        complain("no request was answered")
        raise typer.Exit(1)


def _measure(load: Load) -> Run:
    from lazyahead.bench.serve import measure_serve

    with progress("bench serve") as report:
        run = asyncio.run(measure_serve(load, report))
    for line in run.left_out:
        note(f"left out {line}")
    if run.target.refused:
        note(f"sent without {', '.join(run.target.refused)}, which the server does not take")
    if len(run.outcomes) < load.num_prompts:
        note(f"{load.data} has {len(run.outcomes)} prompts, fewer than {load.num_prompts}")
    failed = [outcome for outcome in run.outcomes if not outcome.success]
    for outcome in failed[:NUM_ERRORS]:
        note(f"failed: {outcome.error}")
    if len(failed) > NUM_ERRORS:
        note(f"and {len(failed) - NUM_ERRORS} more failed")
    return run


def _load_class() -> type[Load]:
    """Raises ConfigError without the extra."""
    try:
        from lazyahead.bench.serve import Load
    except ImportError as error:
        raise ConfigError(
            f"bench serve needs {error.name}; install it with: pip install 'lazyahead[serve]'"
        ) from None
    return Load


def _check_data(data: Path | None, dataset: str | None, only_random: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that do not go together."""
    if dataset not in (None, "random", "custom"):
        raise ConfigError(f"--dataset-name is random or custom, got {dataset!r}; see --data")
    if data is None and dataset == "custom":
        raise ConfigError("--dataset-name custom needs --data PATH")
    if data is None:
        return
    if dataset == "random":
        raise ConfigError(f"--dataset-name random makes up prompts; leave it out or --data {data}")
    for name, value in only_random.items():
        if value is not None:
            raise ConfigError(f"{name} {value} is for random prompts; leave it out or --data")


def _headers(pairs: list[str]) -> dict[str, str]:
    headers = {}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name.strip() and equals and pair.isascii()):
            raise ConfigError(f"--header takes KEY=VALUE in ASCII, got {pair!r}")
        headers[name.strip()] = value.strip()
    return headers


def _extra(text: str | None, temperature: float | None) -> dict[str, Any]:
    """Fields that each request has besides."""
    fields: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if text is None:
        return fields
    try:
        more = json_.loads(text)
    except ValueError:
        more = None
    if not isinstance(more, dict):
        raise ConfigError(f"--extra-body takes a JSON object, got {text!r:.80}")
    return fields | more
