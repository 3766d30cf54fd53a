"""`lazyahead verify`: with nothing deferred our tokens are plain transformers', and drafting changes none of ours."""

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
PROMPTS = tuple(_TEXT * length + "What does the keeper keep?" for length in (1, 2, 8))
WORDS = {
    "keep_all": "nothing deferred, against plain transformers",
    "drafting": "drafting ahead, against writing token by token",
    "sampled": "the same, drawn with a seed at temperature 0.8",
}
Tokens = tuple[int, ...]


class Parting(NamedTuple):
    """Where two ways of answering part."""

    check: str
    prompt: int
    token: int
    left: int | None
    right: int | None
    """The two tokens there; None where one answer had ended."""


def verify(
    model: options.Model = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line. Left out: three of its own.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    prefill: options.Prefill = None,
    max_new_tokens: options.MaxNewTokens = 64,
    json: options.Json = False,
) -> None:
    """Compares answers, token by token: nothing deferred against plain transformers, drafts against none."""
    texts = PROMPTS if prompts is None else tuple(filter(str.strip, read_text(prompts).splitlines()))
    if not texts:
        raise RequestError(f"{prompts} has no prompts; write one a line")
    llm = options.Loading(model, dtype, device, prefill="off", decode="off").load()
    with options.quiet_transformers(), options.waiting("answering"):
        fields = compare_answers(llm, texts, max_new_tokens or 64, prefill)
    if json:
        print_json(record(llm, seed=0, runs=1, results=fields, max_new_tokens=max_new_tokens))
    else:
        _show(fields)
    if fields["diverged"] and fields["dtype"] == "float32":
        raise typer.Exit(1)


def compare_answers(llm: LLM, texts: tuple[str, ...], max_new_tokens: int, prefill: str | None) -> dict[str, Any]:
    """The contract's fields: how many answers part, over all checks, and where the first does."""
    from lazyahead.bench.baseline import run_baseline  # noqa: PLC0415
    from lazyahead.config import LazyPrefill, Lookahead  # noqa: PLC0415
    from lazyahead.llm import LLM  # noqa: PLC0415
    from lazyahead.sampling import Sampling  # noqa: PLC0415

    greedy = Sampling(max_new_tokens=max_new_tokens)
    seeded = Sampling(max_new_tokens=max_new_tokens, temperature=0.8, seed=0)
    prompts = [llm.encode(text).token_ids for text in texts]

    def ours(engine: LLM, sampling: Sampling) -> list[Tokens]:
        return [completion.token_ids for completion in engine.generate(prompts, sampling=sampling)]  # all at once

    expected = [run_baseline(llm.model, token_ids, greedy).token_ids for token_ids in prompts]
    checks = {"keep_all": partings("keep_all", expected, ours(llm, greedy))}
    if llm.support.level == "full":
        rule = LazyPrefill() if prefill is None else options.parse_prefill(prefill)
        plain, drafting = (
            LLM(llm.model, tokenizer=llm.tokenizer, prefill=rule, decode=decode) for decode in (None, Lookahead())
        )
        for check, sampling in (("drafting", greedy), ("sampled", seeded)):
            checks[check] = partings(check, ours(plain, sampling), ours(drafting, sampling))
    found = [parting for check in checks.values() for parting in check]
    first = {**found[0]._asdict(), "logit_gap": _logit_gap(llm, prompts, expected, found[0])} if found else None
    return {
        "prompts": len(texts),
        "tokens": sum(map(len, expected)),
        "diverged": len(found),
        "first_divergence": first,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "checks": {name: len(check) for name, check in checks.items()},
    }


def _logit_gap(llm: LLM, prompts: list[list[int]], expected: list[Tokens], first: Parting) -> float | None:
    """How far apart the plain model's logits of the two tokens are: small means that rounding tipped a near tie.

    Only where the greedy answers part: a prefix that was drawn, or read lazily, is not the plain model's.
    """
    import torch  # noqa: PLC0415

    if first.check != "keep_all" or first.left is None or first.right is None:
        return None
    text = [*prompts[first.prompt], *expected[first.prompt][: first.token]]
    with torch.no_grad():
        logits = llm.model(torch.tensor([text], device=llm.model.device)).logits[0, -1].float()
    return float(logits[first.left] - logits[first.right])


def partings(check: str, left: list[Tokens], right: list[Tokens]) -> list[Parting]:
    """The first place of each prompt where two answers differ."""
    places = []
    for index, tokens in enumerate(zip(left, right, strict=True)):
        pairs = enumerate(zip_longest(*tokens))
        places += [Parting(check, index, place, a, b) for place, (a, b) in pairs if a != b][:1]
    return places


def _show(fields: dict[str, Any]) -> None:
    console = Console(highlight=False)
    count = f"{fields['prompts']} prompts, {fields['tokens']} tokens, {fields['dtype']}"
    for check, num in fields["checks"].items():
        result = f"{num} answers part" if num else "identical"
        console.print(f"{WORDS[check]}: {result} ({count})", style="yellow" if num else "green")
    if first := fields["first_divergence"]:
        console.print(f"First at token {first['token']} of prompt {first['prompt'] + 1} ({WORDS[first['check']]}).")
        if first["logit_gap"] is not None:
            console.print(f"The plain model's logits of the two tokens there are {abs(first['logit_gap']):.2g} apart.")
        if fields["dtype"] != "float32":
            console.print("Identity is promised in float32 only: try --dtype float32.")
