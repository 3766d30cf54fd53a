"""Between text and tokens: prompts in, answers out. Knows tokenizers, but neither torch nor models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyahead.errors import RequestError

Tokenizer = Any
"""A transformers tokenizer, fast or slow. `None` where token ids are all there is: text then stays
empty."""
Message = dict[str, str]
"""A turn of a chat: `role` and `content`."""

MAX_FILE_BYTES = 64 << 20
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so at most tokens
# tokens that a detokenizer keeps, so that spaces between tokens come out as in the whole text
CONTEXT = 8
ANSWER_MARK = "\ue000answer\ue000"  # private use: in nobody's text, and no template trims it
LONGEST_QUESTION = 1000  # characters; a longer last paragraph is text to read
QUESTION_MARK = "\ue000question\ue000"


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    token_ids: list[int]
    question: tuple[int, int] | None = None
    """Half-open span of the question's tokens, where the caller said what the question is."""


def encode_prompt(tokenizer: Tokenizer, document: str, question: str | None = None) -> Prompt:
    """Document and question to tokens, through the chat template where the tokenizer has one.

    Raises RequestError when there is no text at all.
    """
    document, question = document or "", (question or "").strip()
    if not (document.strip() or question):
        raise RequestError("the prompt is empty; give some text, or a file")
    if tokenizer.chat_template:
        content = "\n\n".join(part for part in (document, question) if part)
        return _encode(
            tokenizer, _render(tokenizer, [{"role": "user", "content": content}], question), False
        )
    if not question:
        return _encode(tokenizer, document, True)
    head = f"{document}\n\n" if document else ""
    return _encode(
        tokenizer, f"{head}Question: {QUESTION_MARK}{question}{QUESTION_MARK}\nAnswer:", True
    )


def encode_turn(
    tokenizer: Tokenizer, messages: Sequence[Message], previous: Sequence[int] = ()
) -> Prompt:
    """The next turn of a chat, as a continuation of `previous`: prompt and answer tokens of the
    turn before.

    The answer's own tokens are kept rather than encoded anew, so that a session finds all of them
    again. The last paragraph of the last message counts as the question. Raises RequestError when
    that message is empty.
    """
    *earlier, last = messages
    if not last["content"].strip():
        raise RequestError("the message is empty; write something")
    document, _, question = last["content"].strip().rpartition("\n\n")
    if len(question) > LONGEST_QUESTION:
        document, question = last["content"], ""
    if not previous:
        if not tokenizer.chat_template:
            return encode_prompt(
                tokenizer,
                "\n\n".join([*(m["content"] for m in earlier), document]).strip(),
                question,
            )
        return _encode(tokenizer, _render(tokenizer, list(messages), question), False)
    if tokenizer.chat_template:
        answer = {"role": "assistant", "content": ANSWER_MARK}
        text = _render(tokenizer, [*earlier[:-1], answer, last], question).rpartition(ANSWER_MARK)[
            2
        ]
    else:
        text = f"\n\nQuestion: {_mark(last, question)['content'].strip()}\nAnswer:"
    turn = _encode(tokenizer, text, False)
    ended = int(previous[-1] == turn.token_ids[0])  # the answer brought its own end of turn
    shift = len(previous) - ended
    span = turn.question and (turn.question[0] + shift, turn.question[1] + shift)
    return Prompt([*previous, *turn.token_ids[ended:]], span)


def _mark(message: Message, question: str) -> Message:
    """The message with marks around the question that it ends with."""
    if not question:
        return message
    head, _, tail = message["content"].rpartition(question)
    return {**message, "content": f"{head}{QUESTION_MARK}{question}{QUESTION_MARK}{tail}"}


def _render(tokenizer: Tokenizer, messages: list[Message], question: str) -> str:
    """The chat template's text, ready for the answer, the question marked unless marks change what
    it writes."""
    marked = [*messages[:-1], _mark(messages[-1], question)]
    options = {"tokenize": False, "add_generation_prompt": True}
    text, plain = (
        str(tokenizer.apply_chat_template(turns, **options)) for turns in (marked, messages)
    )
    return text if text.replace(QUESTION_MARK, "") == plain else plain


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Prompt:
    """Text to tokens, and the question in it, where it is marked, to a span of tokens."""
    head, *marked = text.split(QUESTION_MARK)
    text = head + "".join(marked)
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    if len(marked) != 2:
        return Prompt(list(tokenizer(text, **options)["input_ids"]))
    start, end = len(head), len(head) + len(marked[0])
    if tokenizer.is_fast:
        encoding = tokenizer(text, return_offsets_mapping=True, **options)
        inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < end and b > start]
        return Prompt(list(encoding["input_ids"]), (inside[0], inside[-1] + 1) if inside else None)
    token_ids = list(tokenizer(text, **options)["input_ids"])
    before = tokenizer(text[:start], **options)["input_ids"]
    same = zip(
        token_ids, before, strict=False
    )  # the question takes all that comes after the document
    first = next(
        (i for i, (a, b) in enumerate(same) if a != b), min(len(before), len(token_ids) - 1)
    )
    return Prompt(token_ids, (first, len(token_ids)))


class Detokenizer:
    """Tokens to text, one at a time. The pieces, joined, are the text of all tokens decoded at
    once.

    Never gives out half a character. A call costs the same however long the answer is: only a
    window of the last tokens is decoded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = ""  # of the window's text

    def add(self, token_id: int) -> str:
        """The text that this token completes: maybe none, maybe some held back before."""
        if self._tokenizer is None:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = text[: len(text) - _num_unsettled(text)]
        piece = ""
        if settled.startswith(
            self._shown
        ):  # else a run of single bytes, which decoders take back until it is whole
            piece, self._shown = settled[len(self._shown) :], settled
        if len(self._window) >= (8 if _num_unsettled(text) else 2) * CONTEXT:
            self._slide(text)
        return piece

    def flush(self) -> str:
        """What was held back. The answer is over."""
        if self._tokenizer is None:
            return ""
        piece = self._decode(self._window)[len(self._shown) :]
        self._window, self._shown = [], ""
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(token_ids, **options))

    def _slide(self, text: str) -> None:
        """Forgets the oldest tokens, at a place where the text falls into two (up to a space that
        decoders strip)."""
        num_pending = max(0, len(text) - len(self._shown))
        latest = len(self._window) - CONTEXT
        must = latest >= 7 * CONTEXT  # bytes that never become text: their exact count may be lost
        for cut in range(latest, latest - LONGEST_CHARACTER, -1):
            head, tail = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            falls = text in (head + tail, f"{head} {tail}") and num_pending <= len(tail)
            if falls or (must and cut == latest - LONGEST_CHARACTER + 1):
                self._window = self._window[cut:]
                self._shown = tail[: max(0, len(tail) - num_pending)]
                return


def _num_unsettled(text: str) -> int:
    """Replacement characters at the end that may stand for a character whose last bytes are still
    to come."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), LONGEST_CHARACTER - 1)


class StopStrings:
    """Watches streamed text for stop strings, character by character, however the text is cut into
    pieces.

    The answer ends before the stop string that is complete first (the longest, where several end
    together).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise RequestError("a stop string is empty; leave it out")
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def add(self, text: str) -> str:
        """The text that may be shown: what cannot be the start of a stop string. Empty once one was
        found."""
        if self.matched is not None:
            return ""
        if not self._matchers:
            return text
        for index, character in enumerate(text):
            complete = [matcher.stop for matcher in self._matchers if matcher.add(character)]
            if complete:
                self.matched = max(complete, key=len)
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen[: -len(self.matched)]
        seen = self._held + text
        settled = len(seen) - max(matcher.length for matcher in self._matchers)
        self._held = seen[settled:]
        return seen[:settled]

    def flush(self) -> str:
        """What was held back. The answer is over, no stop string came."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth, Morris, Pratt: how much of `stop` the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._fallback = [0] * (len(stop) + 1)  # longest proper border of stop[:n]
        border = 0
        for end in range(1, len(stop)):
            while border and stop[border] != stop[end]:
                border = self._fallback[border]
            border += stop[border] == stop[end]
            self._fallback[end + 1] = border

    def add(self, character: str) -> bool:
        """Whether `character` completes the stop string."""
        while self.length and self.stop[self.length] != character:
            self.length = self._fallback[self.length]
        self.length += self.stop[self.length] == character
        return self.length == len(self.stop)


def read_text(path: str | Path) -> str:
    """A file's text. Raises RequestError, in one line that names the file, for what is none."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise RequestError(f"{path} is a folder; name a file in it")
        if size > MAX_FILE_BYTES:
            raise RequestError(
                f"{path} has {size >> 20} MB, more than any context holds; cut it below 64 MB"
            )
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"no file at {path}; check the path") from None
    except UnicodeDecodeError as error:
        remedy = "convert it, e.g. with iconv -t UTF-8"
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); {remedy}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
