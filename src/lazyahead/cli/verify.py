"""`lazyahead verify`: with nothing deferred our tokens are those of transformers, and drafting
changes none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lazyahead.cli import INTERRUPTED, options
from lazyahead.cli.input import parse_path
from lazyahead.cli.output import Interrupt, note, print_json, record
from lazyahead.cli.progress import progress
from lazyahead.errors import RequestError
from lazyahead.strategies import parse_prefill
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.bench.data.sample import Sample
    from lazyahead.llm import LLM

NUM_PROMPTS = 6
LENGTH = 512
DATA_LENGTH = 2048
BATCH = 16
"""Prompts that are answered at once; bounds memory."""
WORDS = {
    "keep_all": "nothing deferred, against plain transformers",
    "drafting": "with drafts in a batch, against decoding token by token and alone",
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
    data: Annotated[
        Path | None,
        typer.Option(
            help="Real prompts instead: a JSONL file or a folder of them, in the format of "
            "Spec-Bench, LongBench, BABILong, or with `prompt`.",
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            min=1,
            help=f"How many of the reader's questions (left out: {NUM_PROMPTS}), or of each "
            "category of --data (left out: all).",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=256,
            help=f"Their length, in tokens of the reader (left out: {LENGTH}); of --data, the "
            f"longest, in tokens of the model (left out: {DATA_LENGTH}).",
        ),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    prefill: options.Prefill = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    check: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(WORDS)}; may be repeated. Left out: all."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compares answers, token by token: nothing deferred against plain transformers, drafts against
    none.

    Ctrl-C ends it after the current batch and prints what was found so far.
    """
    if prompts is not None and data is not None:
        raise RequestError(f"give --prompts {prompts} or --data {data}, not both")
    unknown = [name for name in check or () if name not in WORDS]
    if unknown:
        raise RequestError(f"--check must be one of {', '.join(WORDS)}, got {unknown[0]!r}")
    texts = _lines(prompts, n, length)
    samples = _samples(data, n) if data is not None else []
    rule = parse_prefill(prefill or "balanced")
    llm = options.Loading(model, dtype, device, prefill="off", decode="off").load()
    with options.quiet_transformers():
        from lazyahead.bench.agreement import Agreement, own_prompts

        if texts:
            token_ids = [
                _encode(llm, f"prompt {place}", text) for place, text in enumerate(texts, 1)
            ]
        elif samples:
            token_ids = _encoded(llm, samples, length or DATA_LENGTH, max_new_tokens)
        else:
            token_ids = own_prompts(llm, n or NUM_PROMPTS, length or LENGTH)
        agreement = Agreement(llm, rule, max_new_tokens, check or tuple(WORDS))
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
    if any(fields["checks"].get(name) for name in _promised(llm)):
        raise typer.Exit(1)


def _promised(llm: LLM) -> list[str]:
    """The checks that may not find a difference on this model's device and dtype."""
    from lazyahead.hf.steady import fewest_rows

    if str(llm.model.dtype) == "torch.float32":
        return [check for check in WORDS if llm.support.level == "full" or check == "keep_all"]
    is_steady = fewest_rows(llm.model.device, llm.model.dtype) > 1
    return ["drafting", "sampled"] if is_steady and llm.support.level == "full" else []


def _samples(path: Path, n: int | None) -> list[Sample]:
    """The first `n` prompts of each category of a file or folder; all without `n`."""
    from lazyahead.bench.data.read import read_samples, take

    found = read_samples(path)
    for line in found.left_out:
        note(f"left out {line}")
    return list(found.samples) if n is None else take(found.samples, n, "category")


def _encoded(llm: LLM, samples: list[Sample], length: int, max_new_tokens: int) -> list[list[int]]:
    from lazyahead.bench.data.encode import encode_sample
    from lazyahead.bench.real_text import fitting_length

    length = fitting_length(llm, length, max_new_tokens)
    return [encode_sample(llm.tokenizer, sample, length).token_ids for sample in samples]


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
        if fields["dtype"] != "float32" and first["check"] == "keep_all":
            console.print("Identity with transformers is promised in float32 only.")
