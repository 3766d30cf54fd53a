"""`lazyahead verify`: with nothing deferred, our tokens are those of plain transformers."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from lazyahead.cli import options
from lazyahead.cli.output import print_json, record
from lazyahead.errors import RequestError
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.llm import LLM

_TEXT = "The tower keeps a lamp, the lamp keeps a flame, and the keeper keeps a list of ships. "
PROMPTS = tuple(_TEXT * length + "What does the keeper keep?" for length in (1, 4, 16))


class Divergence(NamedTuple):
    """Where two ways of answering part."""

    prompt: int
    token: int


def verify(
    model: options.Model = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line. Left out: three of its own.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_new_tokens: options.MaxNewTokens = 64,
    json: options.Json = False,
) -> None:
    """Compares greedy answers, token by token: nothing deferred, against plain transformers."""
    texts = PROMPTS if prompts is None else tuple(filter(str.strip, read_text(prompts).splitlines()))
    if not texts:
        raise RequestError(f"{prompts} has no prompts; write one a line")
    llm = options.Loading(model, dtype, device, prefill="off", decode="off").load()
    with options.quiet_transformers():
        fields = compare_greedy(llm, texts, max_new_tokens or 64)
    if json:
        print_json(record(llm, seed=0, runs=1, results=fields, max_new_tokens=max_new_tokens))
    else:
        _show(fields)
    if fields["diverged"] and fields["dtype"] == "float32":
        raise typer.Exit(1)


def compare_greedy(llm: LLM, texts: tuple[str, ...], max_new_tokens: int) -> dict[str, Any]:
    """The contract's fields: how many prompts part from plain transformers, and where the first does."""
    from lazyahead.bench.baseline import run_baseline  # noqa: PLC0415
    from lazyahead.sampling import Sampling  # noqa: PLC0415

    sampling, partings = Sampling(max_new_tokens=max_new_tokens), list[Divergence]()
    prompts = [llm.encode(text).token_ids for text in texts]
    expected = [run_baseline(llm.model, token_ids, sampling).token_ids for token_ids in prompts]
    given = [completion.token_ids for completion in llm.generate(prompts, sampling=sampling)]  # all at once
    for index, tokens in enumerate(zip(expected, given, strict=True)):
        pairs = enumerate(zip_longest(*tokens))
        partings += [Divergence(index, place) for place, (a, b) in pairs if a != b][:1]
    return {
        "prompts": len(texts),
        "tokens": sum(map(len, expected)),
        "diverged": len(partings),
        "first_divergence": partings[0]._asdict() if partings else None,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
    }


def _show(fields: dict[str, Any]) -> None:
    console = Console(highlight=False)
    count = f"{fields['prompts']} prompts, {fields['tokens']} tokens, {fields['dtype']}"
    if not fields["diverged"]:
        console.print(f"Identical to plain transformers: {count}.", style="green")
        return
    first = fields["first_divergence"]
    where = f"first at token {first['token']} of prompt {first['prompt'] + 1}"
    console.print(f"{fields['diverged']} answers part from plain transformers, {where} ({count}).", style="yellow")
    if fields["dtype"] != "float32":
        console.print("Identity is promised in float32 only: try --dtype float32.")
