"""Streamed text, cut by what its tokens are labelled with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from lazyahead.text.detokenizer import Detokenizer, Tokenizer

L = TypeVar("L")


class Labelled(NamedTuple, Generic[L]):
    """Some text of one label, and how many tokens completed it."""

    label: L
    text: str
    num_tokens: int


class Spans(Generic[L]):
    """Splits streamed text by its tokens' labels. A character belongs to the token that completes
    it."""

    def __init__(self, tokenizer: Tokenizer, default: L) -> None:
        """`default` labels tokens that come without."""
        self._detokenizer = Detokenizer(tokenizer)
        self._ready: deque[tuple[L, str]] = deque()
        """Text of tokens that no piece has shown yet: it may be the start of a stop string."""
        self._default = self._last = default

    def add(
        self, text: str, token_ids: Sequence[int], labels: Sequence[L]
    ) -> Iterator[Labelled[L]]:
        """The parts of `text`, which joined are `text`. `labels` may be empty."""
        for token_id, label in zip(
            token_ids, labels or [self._default] * len(token_ids), strict=True
        ):
            self._ready.append((label, self._detokenizer.add(token_id)))
        while text and self._ready:
            self._last, ready = self._ready.popleft()
            num = len(ready)
            if num > len(text):
                self._ready.appendleft((self._last, ready[len(text) :]))
            yield Labelled(self._last, text[:num], int(num <= len(text)))
            text = text[num:]
        if text:  # half a character that an answer ended in
            yield Labelled(self._last, text, 0)
