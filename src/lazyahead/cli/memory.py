"""`lazyahead memory`: the answers that a memory file holds, by namespace."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.input import parse_path
from lazyahead.cli.output import envelope, note, print_json, record, tables
from lazyahead.cli.progress import load_torch, progress
from lazyahead.errors import MemoryFileError, RequestError

if TYPE_CHECKING:
    from lazyahead.draft.answers import AnswerLog

app = typer.Typer(no_args_is_help=True)
File = Annotated[
    Path, typer.Option("--file", "-f", parser=parse_path, help="The file of the memory.")
]
Namespace = Annotated[str | None, typer.Option(help="Left out: all of them.")]


@app.callback()
def group() -> None:
    """Look into a memory of answers, add to it, clear it."""


@app.command("list")
def list_memory(file: File, namespace: Namespace = None, json: options.Json = False) -> None:
    """Shows how many answers the file holds, by namespace."""
    from lazyahead.draft.answers import AnswerLog

    with AnswerLog(file) as log:
        rows = _by_namespace(log, namespace)
        if json:
            _print(
                log,
                {"namespace": namespace},
                {"namespaces": rows, "file_bytes": file.stat().st_size},
            )
            return
    table = Table(title=str(file), title_justify="left")
    for header in ("namespace", "answers", "tokens", "oldest", "newest"):
        table.add_column(header, justify="right" if header in ("answers", "tokens") else "left")
    for row in rows:
        table.add_row(
            row["namespace"],
            f"{row['answers']:,}",
            f"{row['tokens']:,}",
            row["oldest"],
            row["newest"],
        )
    tables().print(table)


@app.command("import")
def import_memory(
    sources: Annotated[
        list[Path],
        typer.Argument(
            parser=parse_path,
            help="Texts, JSON lines (text, prompt and answer, or tokens), or folders of those.",
        ),
    ],
    file: File,
    namespace: Annotated[str, typer.Option(help="Under which they are kept.")] = "default",
    model: options.Model = None,
    capacity_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of a namespace; the oldest answers are deleted.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Adds documents and earlier answers, so that drafts are found in them."""
    from lazyahead.config import Lookahead
    from lazyahead.draft.factory import open_log
    from lazyahead.draft.sources import find_sources, read_sequences

    found = find_sources(sources)
    load_torch()
    from lazyahead.hf.fingerprint import owner_of

    limits = Lookahead(
        memory=str(file), namespace=namespace, **_given(capacity_bytes=capacity_bytes)
    )
    llm = options.Loading(model, prefill="off").load()
    vocabulary = llm.model.get_input_embeddings().weight.shape[0]
    num_sequences = num_tokens = 0
    with (
        open_log(str(file), owner_of(llm.model, llm.tokenizer), limits.capacity_bytes) as log,
        progress("adding") as report,
    ):
        for number, path in enumerate(found):
            report(f"adding {path.name}", number / len(found))
            try:
                for tokens in read_sequences(path, llm.tokenizer, vocabulary):
                    log.append(tokens, namespace)
                    num_sequences += 1
                    num_tokens += len(tokens)
            except RequestError as error:
                if path in sources:
                    raise
                note(f"left out: {error}")  # found in a folder
    results = {"files": len(found), "sequences": num_sequences, "tokens": num_tokens}
    if json:
        config = {
            "file": str(file),
            "namespace": namespace,
            "capacity_bytes": limits.capacity_bytes,
        }
        print_json(record(llm, seed=None, runs=1, results=results, **config))
    else:
        print(
            f"{num_sequences:,} texts of {num_tokens:,} tokens from {len(found):,} files are in "
            f"{file} now"
        )


@app.command("clear")
def clear_memory(file: File, namespace: Namespace = None, json: options.Json = False) -> None:
    """Deletes the answers of a namespace, or all, from the disk too."""
    from lazyahead.draft.answers import AnswerLog

    with AnswerLog(file) as log:
        if namespace is not None and namespace not in log.usage():
            raise MemoryFileError(
                f"{file} has no namespace {namespace!r}; there are "
                f"{', '.join(log.usage()) or 'none'}"
            )
        num_cleared = log.clear(namespace)
        if json:
            _print(log, {"namespace": namespace}, {"cleared": num_cleared})
            return
    print(f"{num_cleared:,} answers deleted")


def _by_namespace(log: AnswerLog, namespace: str | None) -> list[dict[str, Any]]:
    rows = []
    for name, usage in log.usage().items():
        if namespace not in (None, name):
            continue
        records = log.records(name)
        oldest, newest = (_when(records[place].created) for place in (0, -1))
        rows.append(
            {
                "namespace": name,
                "answers": usage.num_answers,
                "tokens": usage.num_tokens,
                "oldest": oldest,
                "newest": newest,
            }
        )
    return rows


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _print(log: AnswerLog, config: dict[str, Any], results: dict[str, Any]) -> None:
    """The JSON of a command that needs no model: the file names its owner."""
    import torch

    where = (torch.device("cpu"), torch.get_default_dtype())
    owner = log.owner
    values = {**results, "tokenizer": owner.tokenizer}
    print_json(
        envelope(
            owner.model or "unknown", where, {"file": str(log.path), **config}, None, 1, values
        )
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
