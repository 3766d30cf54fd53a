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
from lazyahead.cli.input import parse_path, read_document
from lazyahead.cli.output import (
    Interrupt,
    SideOutputs,
    check_folders,
    describe,
    note,
    print_json,
    record,
    whole_file,
)
from lazyahead.cli.progress import PrefillBar
from lazyahead.errors import RequestError

if TYPE_CHECKING:
    from lazyahead.cache.session import Session
    from lazyahead.llm import LLM
    from lazyahead.results import Completion, Piece
    from lazyahead.sampling import Sampling

Ask = Callable[..., "Iterator[Piece]"]
"""A request that is ready to run: takes `on_progress`, gives the pieces of the answer."""

SessionFile = Annotated[
    Path | None,
    typer.Option(parser=parse_path, help="Continue this conversation, and keep it in this file."),
]
Explain = Annotated[
    Path | None,
    typer.Option(
        parser=parse_path,
        help="Write a page that shows how deep each prompt token was computed and what was "
        "drafted; colour the answer.",
    ),
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to answer; - for stdin.")] = None,
    file: options.File = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="What to answer about the text.")
    ] = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    tp: options.TensorParallel = 1,
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
        bool, typer.Option("--compare", help="Time plain transformers on the same prompt too.")
    ] = False,
    runs: options.Runs = 3,
    json: options.Json = False,
) -> None:
    """Answers a prompt: the text, or a file with a question about it."""
    from lazyahead.cli.origin import as_json, print_legend

    continues = session is not None and session.exists() and question is not None
    document = read_document(prompt, file, question, piped=not continues)
    _check_files(session, explain, compare)
    sampling = options.make_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    llm = options.Loading(model, dtype, device, prefill, decode, memory, namespace, tp).load()
    kept = _open_session(llm, session, needed=explain is not None)
    ask = _question(llm, document, question, kept, sampling)
    results: dict[str, Any] = {}
    if compare:
        completion, results = compare_and_show(llm, document, question, sampling, runs, quiet=json)
    if not compare or kept is not None:
        show = _printer(llm, coloured=explain is not None)
        completion = answer(ask, quiet=json or compare, show=show)
    if explain is not None:
        print_legend(completion)
    if not compare:
        note(describe(completion.stats))
    if json:
        sources = as_json(llm.tokenizer, completion)
        values = {**summary(completion), "answer_sources": sources, **results}
        num_runs = runs if compare else 1
        settings = {"sampling": asdict(sampling)}
        print_json(record(llm, seed=sampling.seed, runs=num_runs, results=values, **settings))
    if completion.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)
    if kept is not None and not _keep(llm, kept, completion, session, explain):
        raise typer.Exit(1)


def _check_files(session: Path | None, explain: Path | None, compare: bool) -> None:
    """Raises RequestError for files that could not be written, or would not be."""
    check_folders(session, explain)
    if compare and session:
        raise RequestError(
            "--compare computes the whole prompt and --session continues; give one of them"
        )


def answer(
    ask: Ask, *, quiet: bool = False, show: Callable[[Piece], None] | None = None
) -> Completion:
    """Streams an answer to `show`, or to stdout, and returns all of it. Ctrl-C ends it early: the
    finish reason is then `cancelled`."""
    from lazyahead.results import Completion

    bar = PrefillBar()
    pieces: list[Piece] = []
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
    """Prints in colours if `coloured` and stdout is a terminal."""
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


def _open_session(llm: LLM, path: Path | None, needed: bool) -> Session | None:
    if path is not None and path.exists():
        return llm.load_session(path)
    return llm.session() if path is not None or needed else None


def _question(
    llm: LLM, document: str, question: str | None, session: Session | None, sampling: Sampling
) -> Ask:
    """A new document begins a new prompt (and reuses the prefix that the session has of it); a
    question alone is the session's next turn."""
    if session is not None and len(session) and not (document and question):
        return partial(llm.next_turn, question or document, sampling=sampling, session=session)
    return partial(llm.stream, document, question, sampling=sampling, session=session)


def _keep(
    llm: LLM, session: Session, completion: Completion, path: Path | None, explain: Path | None
) -> bool:
    """Writes the session and the page that were asked for; returns whether all could be written."""
    outputs = SideOutputs()
    if path is not None:
        with outputs.writing(path):
            llm.save_session(session, path)
    if explain is not None:
        from lazyahead.cli.explain import explain_page

        reach = llm.reach(session)
        page = explain_page(reach, llm.tokenizer, completion, model=llm.name, prefill=llm.prefill)
        with outputs.writing(explain):
            with whole_file(explain) as name:
                name.write_text(page, encoding="utf-8")
            note(f"wrote {explain}")
    return not outputs.failed
