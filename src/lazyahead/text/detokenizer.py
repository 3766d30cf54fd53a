"""Answers to text, token by token: no half characters, no stop strings. Knows tokenizers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lazyahead.errors import RequestError

Tokenizer = Any
"""A transformers tokenizer, fast or slow. `None` where token ids are all there is: text then stays
empty."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so at most tokens
# tokens that a detokenizer keeps, so that spaces between tokens come out as in the whole text
CONTEXT = 8


def special_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """What the tokens are called that never show in a text."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {int(index): str(token) for index, token in added.items() if token.special}


def decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """The text of all tokens at once, special ones left out."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(token_ids, **options))


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
        return decode(self._tokenizer, token_ids)

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
        self._held: list[str] = []  # by character; empty where it is not shown
        self.matched: str | None = None
        """The stop string that was found."""

    def add(self, text: str, shown: bool = True) -> str:
        """The text that may be shown: what cannot be the start of a stop string. Empty once one was
        found. Text that is not `shown` (of special tokens) is watched only."""
        if self.matched is not None:
            return ""
        if not self._matchers:
            return text if shown else ""
        characters = [*text] if shown else [""] * len(text)
        for index, character in enumerate(text):
            complete = [matcher.stop for matcher in self._matchers if matcher.add(character)]
            if complete:
                self.matched = max(complete, key=len)
                seen = self._held + characters[: index + 1]
                self._held = []
                return "".join(seen[: -len(self.matched)])
        seen = self._held + characters
        settled = len(seen) - max(matcher.length for matcher in self._matchers)
        self._held = seen[settled:]
        return "".join(seen[:settled])

    def flush(self) -> str:
        """What was held back. The answer is over, no stop string came."""
        held, self._held = "".join(self._held), []
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
