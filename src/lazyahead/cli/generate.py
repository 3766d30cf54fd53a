"""`lazyahead generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyahead.cli import INTERRUPTED, options
from lazyahead.cli.compare import compare_and_show
from lazyahead.cli.output import (
    Interrupt,
    ReadingBar,
    check_folders,
    describe,
    note,
    print_json,
    record,
    whole_file,
)
from lazyahead.errors import RequestError
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.cache.session import Session
    from lazyahead.llm import LLM
    from lazyahead.results import Completion, Piece
    from lazyahead.sampling import Sampling

Ask = Callable[..., "Iterator[Piece]"]
"""A question, ready to be asked: takes `on_progress`."""


SessionFile = Annotated[
    Path | None,
    typer.Option(help="Continue this conversation where the file exists, and keep it there."),
]
Explain = Annotated[
    Path | None,
    typer.Option(
        help="Write a page that shows what was read how deeply and what was drafted; colour the answer."
    ),
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to answer; - reads stdin.")] = None,
    file: options.File = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="What to answer about the text.")
    ] = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    prefill: options.Prefill = None,
    decode: options.Decode = None,
    memory: options.Memory = None,
    namespace: options.Namespace = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    session: SessionFile = None,
    explain: Explain = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run plain transformers as well, side by side.")
    ] = False,
    runs: options.Runs = 3,
    json: options.Json = False,
) -> None:
    """Answers a prompt: the text, or a file with a question about it."""
    from lazyahead.cli.origin import as_json, print_legend

    document = _document(prompt, file, question)
    _check_files(session, explain, compare)
    sampling = options.make_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    llm = options.Loading(model, dtype, device, prefill, decode, memory, namespace).load()
    kept = _open_session(llm, session, needed=explain is not None)
    ask = _question(llm, document, question, kept, sampling)
    results: dict[str, Any] = {}
    if compare:
        completion, results = compare_and_show(llm, document, question, sampling, runs, quiet=json)
    if not compare or kept is not None:
        completion = answer(
            ask, quiet=json or compare, show=_printer(llm, coloured=explain is not None)
        )
    if explain is not None:
        print_legend(completion)
    if not compare:
        note(describe(completion.stats))
    cancelled = completion.finish_reason == "cancelled"
    if kept is not None and not cancelled:
        _keep(llm, kept, completion, session, explain)
    if json:
        values = {
            **summary(completion),
            "answer_sources": as_json(llm.tokenizer, completion),
            **results,
        }
        num_runs = runs if compare else 1
        print_json(
            record(
                llm, seed=sampling.seed, runs=num_runs, results=values, sampling=asdict(sampling)
            )
        )
    if cancelled:
        raise typer.Exit(INTERRUPTED)


def _check_files(session: Path | None, explain: Path | None, compare: bool) -> None:
    """Before any work: files that could not be written, or would not be."""
    check_folders(session, explain)
    if compare and session:
        raise RequestError(
            "--compare reads everything anew and --session continues; give one of them"
        )


def answer(
    ask: Ask, *, quiet: bool = False, show: Callable[[Piece], None] | None = None
) -> Completion:
    """Streams an answer to `show`, or to stdout, and folds it. Ctrl-C ends it with what it has:
    `cancelled`."""
    from lazyahead.results import Completion, Piece

    bar, pieces = ReadingBar(), list[Piece]()
    try:
        with Interrupt() as interrupt:
            for piece in ask(on_progress=bar):
                bar.close()
                interrupt.can_wait = True
                pieces.append(piece)
                if not quiet:
                    (show or _print)(piece)
                if interrupt.came:
                    break
    finally:
        bar.close()
        if pieces and not quiet:
            print(flush=True)
    return Completion.fold(pieces)


def _print(piece: Piece) -> None:
    print(piece.text, end="", flush=True)


def _printer(llm: LLM, coloured: bool) -> Callable[[Piece], None]:
    """In colours where that was asked for and stdout is a terminal."""
    if not (coloured and sys.stdout.isatty()):
        return _print
    from lazyahead.cli.origin import ColourPrinter

    return ColourPrinter(llm.tokenizer)


def summary(completion: Completion) -> dict[str, Any]:
    """The contract's fields of one answer."""
    stats = completion.stats
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "ttft_s": stats.ttft_s,
        "decode_s": stats.decode_s,
        "prompt_tokens": stats.prompt_tokens,
        "prompt_tokens_reused": stats.reused_tokens,
        "prompt_tokens_computed": stats.prompt_tokens_computed,
        "answer_tokens": stats.answer_tokens,
        "tokens_per_step": stats.tokens_per_step,
        "revived": stats.revived,
    }


def _document(prompt: str | None, file: Path | None, question: str | None) -> str:
    """The text, wherever it comes from. Refuses a request that says nothing."""
    if prompt is not None and file is not None:
        raise RequestError(
            "give PROMPT or --file, not both; a question about the file goes into --question"
        )
    document = read_text(file) if file is not None else _stdin() if prompt == "-" else prompt or ""
    if not (document.strip() or (question or "").strip()):
        raise RequestError("the prompt is empty; give PROMPT, --file or --question")
    return document


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text (byte {error.start}); convert it") from None


def _open_session(llm: LLM, path: Path | None, needed: bool) -> Session | None:
    if path is not None and path.exists():
        return llm.load_session(path)
    return llm.session() if path is not None or needed else None


def _question(
    llm: LLM, document: str, question: str | None, session: Session | None, sampling: Sampling
) -> Ask:
    """A new text starts anew (sharing what a session has read of it); a bare question is the
    session's next turn."""
    if session is not None and len(session) and not (document and question):
        return partial(llm.next_turn, question or document, sampling=sampling, session=session)
    return partial(llm.stream, document, question, sampling=sampling, session=session)


def _keep(
    llm: LLM, session: Session, completion: Completion, path: Path | None, explain: Path | None
) -> None:
    """Writes what was asked to be kept."""
    if path is not None:
        llm.save_session(session, path)
    if explain is not None:
        from lazyahead.cli.explain import explain_page

        page = explain_page(
            llm.reach(session), llm.tokenizer, completion, model=llm.name, prefill=llm.prefill
        )
        with whole_file(explain) as name:
            name.write_text(page, encoding="utf-8")
        note(f"wrote {explain}")
