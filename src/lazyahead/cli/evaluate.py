"""`lazyahead eval`: the command of lm-eval with this engine as `--model lazyahead`."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from lazyahead.cli import options
from lazyahead.cli.output import envelope, print_json
from lazyahead.cli.progress import progress
from lazyahead.errors import RequestError

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
NAME = "lazyahead"


def evaluate(context: typer.Context, json: options.Json = False) -> None:
    """Runs lm-eval with this engine: what follows is passed on to it.

    lazyahead eval --tasks longbench_qasper --model_args
    pretrained=MODEL,prefill=balanced,decode=lookahead
    """
    from lazyahead.integrations import register

    arguments = with_model(context.args)
    with progress("loading lm-eval"):
        register()
    with TemporaryDirectory() as folder:
        out = value_of(arguments, "--output_path", "-o")
        if json and out is None:
            arguments += ["--output_path", folder]
        before = set(_results(out or folder))
        _run(arguments)
        if json:
            found = sorted(set(_results(out or folder)) - before)
            if not found:
                raise RequestError(
                    f"lm-eval wrote no results for {' '.join(arguments)}; "
                    "--json needs a run with tasks"
                )
            print_json(summary(json_.loads(found[-1].read_text(encoding="utf-8"))))


def with_model(arguments: Sequence[str]) -> list[str]:
    """lm-eval's arguments, with the model's name where they run something. Raises RequestError for
    another model."""
    if not arguments:
        raise RequestError(
            "say what to evaluate, e.g. lazyahead eval --tasks TASK --model_args prefill=balanced"
        )
    name = value_of(arguments, "--model", "-M")
    if name not in (None, NAME):
        raise RequestError(
            f"--model {name} is not this engine; call lm_eval itself, or leave --model out"
        )
    is_run = arguments[0].startswith("-") or arguments[0] == "run"
    return [*arguments, "--model", NAME] if is_run and name is None else list(arguments)


def value_of(arguments: Sequence[str], *names: str) -> str | None:
    """The value of an option given as `--name value` or `--name=value`; None where it is not."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in names:
            return value if "=" in argument else next(iter(arguments[place + 1 :]), "")
    return None


def summary(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results in the envelope of every command."""
    import torch

    info = values["config"][NAME]
    where = torch.device(info["device"]), getattr(torch, info["dtype"])
    config = {name: info[name] for name in ("prefill", "decode")}
    config |= {
        name: values["config"].get(name)
        for name in ("model_args", "gen_kwargs", "limit", "batch_size")
    }
    measured = {
        name: info.get(name)
        for name in ("prompt_tokens", "prompt_tokens_computed", "tokens_per_step")
    }
    results = {"results": values["results"], "n_samples": values.get("n-samples"), **measured}
    return envelope(info["model"], where, config, info["seed"], 1, results)


def _run(arguments: Sequence[str]) -> None:
    """lm-eval's command line; it reads its arguments from the process."""
    from lm_eval.__main__ import cli_evaluate

    with _argv(["lm_eval", *arguments]), options.quiet_transformers():
        cli_evaluate()


@contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = before


def _results(folder: str) -> list[Path]:
    return list(Path(folder).rglob("results_*.json"))
