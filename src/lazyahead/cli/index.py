"""`lazyahead index`: documents are read once, before anybody asks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.input import parse_path
from lazyahead.cli.output import envelope, note, print_json, seconds, tables
from lazyahead.cli.progress import load_torch, progress
from lazyahead.errors import RequestError
from lazyahead.text import read_text

Files = Annotated[
    list[Path], typer.Argument(parser=parse_path, help="Text files.", show_default=False)
]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", parser=parse_path, help="Folder; `serve --documents` reads it."),
]


def index(
    files: Files,
    out: Out,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    prefill: options.Prefill = None,
    json: options.Json = False,
) -> None:
    """Reads documents and writes what all questions over them have in common. Questions must come
    to a server with the same model and prefill, at the end of a message that begins with the text.
    """
    texts = [(file, read_text(file)) for file in files]  # bad files first, before the model loads
    for file, text in texts:
        if not text.strip():
            raise RequestError(f"{file} holds no text")
    load_torch()
    from lazyahead.documents import DocumentStore
    from lazyahead.hf.attach import dtype_name

    llm = options.Loading(model, dtype, device, prefill).load()
    store = DocumentStore(llm, out)
    rows: list[dict[str, Any]] = []
    with progress("reading") as report:
        for num, (file, text) in enumerate(texts, 1):
            report(f"{file.name}, {num} of {len(texts)}")
            rows.append({"file": str(file), **_index(llm, store, text)})
    if json:
        where = (llm.model.device, dtype_name(llm.model))
        config = {"prefill": llm.prefill and llm.prefill.to_dict()}
        print_json(envelope(llm.name, where, config, 0, 1, {"out": str(out), "rows": rows}))
    else:
        _show(rows)
        note(f"ask with: lazyahead serve --documents {out}")


def _index(llm: Any, store: Any, text: str) -> dict[str, Any]:
    """One document, unless it is there."""
    token_ids = llm.beginning(text)
    path = store.path(token_ids)
    began = time.perf_counter()
    is_known = store.load(token_ids) is not None
    if not is_known:
        store.save(llm.read_ahead(text))
    return {
        "path": str(path),
        "tokens": len(token_ids),
        "bytes": path.stat().st_size,
        "was_there": is_known,
        "seconds": time.perf_counter() - began,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for header in ("file", "tokens", "MB", "seconds"):
        table.add_column(header, justify="left" if header == "file" else "right")
    for row in rows:
        took = "was there" if row["was_there"] else seconds(row["seconds"])
        table.add_row(row["file"], f"{row['tokens']:,}", f"{row['bytes'] / 1e6:,.1f}", took)
    tables().print(table)
