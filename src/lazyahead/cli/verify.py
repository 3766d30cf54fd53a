"""`lazyahead verify`: with nothing deferred our tokens are those of transformers, and drafting
changes none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lazyahead.cli import INTERRUPTED, options
from lazyahead.cli.input import parse_path
from lazyahead.cli.output import Interrupt, print_json, record
from lazyahead.cli.progress import progress
from lazyahead.errors import RequestError
from lazyahead.strategies import parse_prefill
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.llm import LLM

NUM_PROMPTS = 6
LENGTH = 512
BATCH = 16
"""Prompts that are answered at once; bounds memory."""
WORDS = {
    "keep_all": "nothing deferred, against plain transformers",
    "drafting": "with drafts, against decoding token by token",
    "sampled": "the same, sampled with a seed at temperature 0.8",
}


def verify(
    model: options.Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            help="File with one prompt a line. Left out: questions of the reader's world.",
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help=f"How many of those. Left out: {NUM_PROMPTS}.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=256, help=f"Their length, in tokens of the reader. Left out: {LENGTH}."),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    prefill: options.Prefill = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    json: options.Json = False,
) -> None:
    """Compares answers, token by token: nothing deferred against plain transformers, drafts against
    none.

    Ctrl-C ends it after the current batch and prints what was found so far.
    """
    texts = _lines(prompts, n, length)
    rule = parse_prefill(prefill or "balanced")
    llm = options.Loading(model, dtype, device, prefill="off", decode="off").load()
    count = n or NUM_PROMPTS
    length = length or LENGTH
    with options.quiet_transformers():
        from lazyahead.bench.agreement import Agreement, own_prompts

        token_ids = (
            [_encode(llm, f"prompt {place}", text) for place, text in enumerate(texts, 1)]
            if texts
            else own_prompts(llm, count, length)
        )
        agreement = Agreement(llm, rule, max_new_tokens)
        with Interrupt() as interrupt, progress("answering") as report:
            for start in range(0, len(token_ids), BATCH):
                report("answering", start / len(token_ids))
                agreement.add(token_ids[start : start + BATCH])
                interrupt.can_wait = True
                if interrupt.came:
                    break
    fields = agreement.fields()
    if json:
        settings = {"max_new_tokens": max_new_tokens, "verified_prefill": rule and rule.to_dict()}
        print_json(record(llm, seed=0, runs=1, results=fields, **settings))
    else:
        _show(fields)
    if interrupt.came:
        raise typer.Exit(INTERRUPTED)
    if fields["diverged"] and fields["dtype"] == "float32":
        raise typer.Exit(1)


def _encode(llm: LLM, name: str, text: str) -> list[int]:
    """Raises ContextLengthError naming the prompt."""
    from lazyahead.inputs import naming

    with naming(name):
        return llm.encode(text).token_ids


def _lines(path: Path | None, n: int | None, length: int | None) -> list[str]:
    """The prompts of a file; empty without one."""
    if path is None:
        return []
    for name, value in (("--n", n), ("--length", length)):
        if value is not None:
            raise RequestError(
                f"{name} {value} is for built-in prompts and --prompts brings others; leave one out"
            )
    texts = list(filter(str.strip, read_text(path).splitlines()))
    if not texts:
        raise RequestError(f"{path} has no prompts; write one a line")
    return texts


def _show(fields: dict[str, Any]) -> None:
    console = Console(highlight=False)
    count = f"{fields['prompts']} prompts, {fields['tokens']} tokens, {fields['dtype']}"
    for check, num in fields["checks"].items():
        result = f"{num} answers differ" if num else "identical"
        console.print(f"{WORDS[check]}: {result} ({count})", style="yellow" if num else "green")
    if reason := fields["not_checked"]:
        console.print(f"Drafting was not checked: {reason}.", style="yellow")
    if first := fields["first_divergence"]:
        console.print(
            f"First at token {first['token']} of prompt {first['prompt'] + 1} "
            f"({WORDS[first['check']]})."
        )
        if first["logit_gap"] is not None:
            console.print(
                f"The logits of the two tokens there are {abs(first['logit_gap']):.2g} apart."
            )
        if fields["dtype"] != "float32":
            console.print("Identity is promised in float32 only: try --dtype float32.")
