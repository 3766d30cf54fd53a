"""`lazyahead chat`: a conversation, about a file or about nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from lazyahead.cli import INTERRUPTED, options
from lazyahead.cli.generate import Ask, answer
from lazyahead.cli.output import describe, note
from lazyahead.errors import RequestError
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.llm import LLM
    from lazyahead.sampling import Sampling


def chat(
    file: options.File = None,
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
) -> None:
    """Talks line by line. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    document = read_text(file) if file else ""
    sampling = options.make_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    llm = options.Loading(model, dtype, device, prefill, decode, memory, namespace).load()
    if sys.stdin.isatty():
        note(f"{llm.name}. Ctrl-C stops an answer, Ctrl-D ends.")
    Conversation(llm, document, sampling).run(lines())


class Conversation:
    """What was said, as text for the template and as tokens for the session."""

    def __init__(self, llm: LLM, document: str, sampling: Sampling) -> None:
        self.llm, self.document, self.sampling = llm, document, sampling
        self.session = llm.session()
        self.turns: list[dict[str, str]] = []

    def run(self, questions: Iterator[str]) -> None:
        """Answers one question after the other. A question that cannot be answered is told, and
        costs nothing."""
        for question in questions:
            try:
                self.turn(question)
            except RequestError as error:
                note(f"lazyahead: {error}")

    def turn(self, question: str) -> None:
        """One question, one answer, and its measurements."""
        try:
            completion = answer(self._ask(question))
        except KeyboardInterrupt:  # in mid-pass: what the session holds of this turn is not whole
            self.session = self.llm.session()
            note("stopped while reading; the next question reads from the start")
            return
        note(
            describe(completion.stats)
            + (" · stopped" if completion.finish_reason == "cancelled" else "")
        )
        self.turns += [self._said(question), {"role": "assistant", "content": completion.text}]

    def _ask(self, question: str) -> Ask:
        options: dict[str, Any] = {"sampling": self.sampling, "session": self.session}
        if not self.turns:
            return partial(self.llm.stream, self.document, question, **options)
        return partial(self.llm.chat, [*self.turns, self._said(question)], **options)

    def _said(self, question: str) -> dict[str, str]:
        """The user's message; the first one carries the document."""
        document = self.document if not self.turns else ""
        return {
            "role": "user",
            "content": "\n\n".join(part for part in (document, question) if part),
        }


def lines() -> Iterator[str]:
    """Questions from stdin: with a prompt on a terminal, plain where it is piped."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()
