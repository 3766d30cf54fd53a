"""`lazyahead chat`: a conversation, about a document or about none."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from lazyahead.cli import INTERRUPTED, options
from lazyahead.cli.generate import Ask, answer
from lazyahead.cli.input import STDIN, check_text, decode_text
from lazyahead.cli.output import describe, note
from lazyahead.errors import ContextLengthError, RequestError
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.llm import LLM
    from lazyahead.sampling import Sampling

PASTE_S = 0.05
"""Lines that arrive within this time of each other are one message: a paste."""
COMMANDS = "/reset begins anew, /exit ends"


def chat(
    file: options.File = None,
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
) -> None:
    """Answers message by message. Ctrl-C stops an answer, /reset begins anew, /exit ends."""
    if file == STDIN:
        raise RequestError("--file - reads stdin, where chat takes its messages; name a file")
    document = read_text(file) if file else ""
    sampling = options.make_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    llm = options.Loading(model, dtype, device, prefill, decode, memory, namespace, tp).load()
    _check_room(llm, document, sampling)
    if sys.stdin.isatty():
        note(f"{llm.name}. Ctrl-C stops an answer; {COMMANDS}.")
    Conversation(llm, document, sampling).run(messages())


def _check_room(llm: LLM, document: str, sampling: Sampling) -> None:
    """Raises ContextLengthError for a document that no question could follow."""
    if not document.strip():
        return
    num, limit = len(llm.encode(document).token_ids), llm.max_context
    if num + sampling.max_new_tokens >= limit:
        raise ContextLengthError(
            f"--file has {num} tokens, which with max_new_tokens {sampling.max_new_tokens} fill "
            f"the model's context of {limit}; shorten one of them"
        )


class Conversation:
    """The turns so far, as text for the chat template and as tokens in the session."""

    def __init__(self, llm: LLM, document: str, sampling: Sampling) -> None:
        self.llm = llm
        self.document = document
        self.sampling = sampling
        self.reset()

    def reset(self) -> None:
        """Forgets all turns; the document stays."""
        self.session = self.llm.session()
        self.turns: list[dict[str, str]] = []

    def run(self, questions: Iterator[str]) -> None:
        """Answers one question after the other, up to `/exit`. A question that cannot be answered
        gets a line on stderr and changes nothing."""
        for question in questions:
            if question == "/exit":
                return
            if question == "/reset":
                self.reset()
                note("the conversation begins anew")
                continue
            try:
                self.turn(question)
            except ContextLengthError as error:
                note(f"lazyahead: {error}; the context is full: {COMMANDS}")
            except RequestError as error:
                note(f"lazyahead: {error}")

    def turn(self, question: str) -> None:
        """Prints the answer to one question, and its measurements on stderr."""
        try:
            completion = answer(self._ask(question))
        except KeyboardInterrupt:  # in mid-pass: the session may hold half of this turn
            self.session = self.llm.session()
            note("stopped in the prefill; the next question computes all turns again")
            return
        stopped = " · stopped" if completion.finish_reason == "cancelled" else ""
        note(describe(completion.stats) + stopped)
        self.turns += [self._message(question), {"role": "assistant", "content": completion.text}]

    def _ask(self, question: str) -> Ask:
        given: dict[str, Any] = {"sampling": self.sampling, "session": self.session}
        if not self.turns:
            return partial(self.llm.stream, self.document, question, **given)
        return partial(self.llm.chat, [*self.turns, self._message(question)], **given)

    def _message(self, question: str) -> dict[str, str]:
        """The user's message; the first one contains the document."""
        document = self.document if not self.turns else ""
        content = "\n\n".join(part for part in (document, question) if part)
        return {"role": "user", "content": content}


def messages() -> Iterator[str]:
    """Messages from stdin, empty ones left out: with a prompt on a terminal, else one a line.

    Raises RequestError for a piped line that is not UTF-8.
    """
    return typed() if sys.stdin.isatty() else piped()


def piped() -> Iterator[str]:
    """Each line of stdin."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        message = decode_text(f"line {number} of stdin", line).strip()
        if message:
            yield message


def typed() -> Iterator[str]:
    """What is typed at a prompt; all lines of a paste are one message."""
    with suppress(ImportError):
        import readline  # noqa: F401 (line editing and bracketed paste)
    while True:
        try:
            lines = [input("> "), *_rest_of_paste()]
            message = check_text("the message", "\n".join(lines).strip())
        except EOFError:
            return
        except (RequestError, UnicodeDecodeError) as error:
            note(f"lazyahead: {error}")
            continue
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        if message:
            yield message


def _rest_of_paste() -> Iterator[str]:
    """Lines that are there at once after the first one."""
    with suppress(EOFError, OSError):  # the end of stdin; a system that cannot poll it
        while select.select([sys.stdin], [], [], PASTE_S)[0]:
            yield input()
