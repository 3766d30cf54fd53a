"""`lazyahead bench replay`: drafters on recorded text, in seconds, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.input import check_text, parse_path
from lazyahead.cli.output import envelope, print_json, tables
from lazyahead.cli.progress import progress
from lazyahead.errors import ConfigError, ModelNotFoundError, RequestError
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.bench.replay import Text
    from lazyahead.draft.budget import RowCost


def bench_replay(
    text: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            help="Recorded text, or JSON lines with `prompt` and `answer`. Left out: our own.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Whose tokenizer cuts it. Left out: the built-in reader's."
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, help="Of a text: tokens before each answer.")
    ] = 4096,
    answer_length: Annotated[
        int, typer.Option(min=2, help="Of a text: tokens of each answer.")
    ] = 256,
    answers: Annotated[int, typer.Option(min=1, help="Most answers.")] = 20,
    remember: Annotated[
        bool, typer.Option("--remember", help="Answers help those after them.")
    ] = False,
    row_cost: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            help="What rows cost, as measured (JSON). Left out: nothing, up to 64 of them.",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Also time drafting behind contexts of these lengths, e.g. 4096,32768,131072."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """How many tokens a step would bring, by drafter, and what drafting costs."""
    from lazyahead.bench.replay import measure_contexts, measure_drafters
    from lazyahead.cli.bench import parse_lengths

    wanted = parse_lengths(lengths) if lengths else ()
    cost = _row_cost(row_cost)
    with options.quiet_transformers(), progress("replay"):
        tokenizer = _tokenizer(model)
        texts = _texts(text, tokenizer, length, answer_length, answers)
        rows = measure_drafters(texts, cost, remember=remember)
        contexts = list(measure_contexts([*texts[0][0], *texts[0][1]], wanted)) if wanted else []
    if json:
        config = {
            "text": str(text) if text else None,
            "length": length,
            "answer_length": answer_length,
            "answers": len(texts),
            "remember": remember,
            "row_cost": cost.points,
        }
        results = {
            "rows": [asdict(row) for row in rows],
            "contexts": [asdict(row) for row in contexts],
        }
        _print(model, config, results)
    else:
        for title, table in (("drafters", rows), ("contexts", contexts)):
            _show(title, [asdict(row) for row in table])


def _texts(
    path: Path | None, tokenizer: Any, length: int, answer_length: int, count: int
) -> list[Text]:
    from lazyahead.bench.replay import own_texts, windows
    from lazyahead.draft.sources import json_lines

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    if path is not None and path.suffix.lower() == ".jsonl":
        texts: list[Text] = []
        for number, values in json_lines(path):
            prompt = values.get("prompt")
            answer = values.get("answer")
            if not (isinstance(prompt, str) and isinstance(answer, str)):
                raise RequestError(f"{path}, line {number}: needs `prompt` and `answer`")
            where = f"{path}, line {number}"
            texts.append((encode(check_text(where, prompt)), encode(check_text(where, answer))))
        return texts[:count]
    if path is None:
        return own_texts(encode, length, count)
    token_ids = encode(read_text(path))
    if len(token_ids) < 2 * answer_length:
        raise RequestError(
            f"{path} has {len(token_ids)} tokens; give at least twice --answer-length "
            f"({answer_length})"
        )
    return windows(token_ids, length, answer_length, count)


def _tokenizer(model: str | None) -> Any:
    from transformers import AutoTokenizer

    from lazyahead.reader import reader_path

    try:
        return AutoTokenizer.from_pretrained(model or reader_path(), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFoundError(
            f"no tokenizer for {model!r}: {str(error).splitlines()[0]}"
        ) from None


def _row_cost(path: Path | None) -> RowCost:
    from lazyahead.draft.budget import RowCost
    from lazyahead.draft.replay import FREE_ROWS

    if path is None:
        return FREE_ROWS
    try:
        return RowCost.from_json(read_text(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _print(model: str | None, config: dict[str, Any], results: dict[str, Any]) -> None:
    import torch

    where = (torch.device("cpu"), torch.get_default_dtype())
    print_json(envelope(model or options.BUILT_IN, where, config, 0, 1, results))


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "drafter" else "right")
    for row in rows:
        table.add_row(
            *(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    tables().print(table)
