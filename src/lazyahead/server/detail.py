"""Pieces of an answer as `lazyahead` objects and log-probabilities of its replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lazyahead.draft.tree import Source
from lazyahead.results import Piece
from lazyahead.server.reply import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    Detail,
    Reading,
    Revived,
    Span,
    TopLogprob,
    live,
)
from lazyahead.server.watch import Seen, TokenLogprob
from lazyahead.text.detokenizer import REPLACEMENT, Detokenizer
from lazyahead.text.spans import Spans

_SOURCES: dict[Source | None, Any] = {
    Source.PROMPT: "prompt",
    Source.OUTPUT: "answer",
    Source.MEMORY: "memory",
    None: "model",
}


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token completes; empty for special ones."""
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.add(token) for token in token_ids]
    if texts:
        texts[-1] += detokenizer.flush()
    return texts


class Details:
    """Of one answer, chunk by chunk."""

    def __init__(self, tokenizer: Any, prompt_texts: list[str]) -> None:
        self._prompt_texts = prompt_texts
        self._spans: Spans[Source | None] = Spans(tokenizer, None)

    def of(self, piece: Piece, seen: Seen) -> Detail:
        """What belongs to one piece."""
        parts = self._spans.add(piece.text, piece.token_ids, piece.sources)
        spans = [Span(text=part.text, source=_SOURCES[part.label]) for part in parts if part.text]
        detail = Detail(spans=_joined(spans), stats=live(piece.stats))
        if seen.reach is not None:
            detail.reading = Reading(
                num_layers=seen.reach.num_layers,
                tokens=self._prompt_texts,
                depth=list(seen.reach.prefill_depth),
            )
        if seen.deeper is not None:
            detail.revived = Revived(
                positions=list(seen.deeper.positions), depth=list(seen.deeper.depths)
            )
        return detail


def fold(details: Sequence[Detail]) -> Detail:
    """Of a whole answer."""
    spans = _joined([span for detail in details for span in detail.spans])
    whole = Detail(spans=spans, stats=details[-1].stats)
    whole.reading = details[0].reading
    came_back = {
        position: depth
        for detail in details
        if detail.revived is not None
        for position, depth in zip(detail.revived.positions, detail.revived.depth, strict=True)
    }
    if came_back:
        whole.revived = Revived(positions=list(came_back), depth=list(came_back.values()))
    return whole


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbours of one source as one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].source == span.source:
            joined[-1] = Span(text=joined[-1].text + span.text, source=span.source)
        else:
            joined.append(span)
    return joined


class TokenNames:
    """Tokens as log-probabilities name them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def name(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def chat(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        content = [
            ChatLogprob(
                **self._entry(one.token, one.logprob),
                top_logprobs=[TopLogprob(**self._entry(*pair)) for pair in one.top],
            )
            for one in logprobs
        ]
        return ChatLogprobs(content=content)

    def completion(self, logprobs: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
        """`offset`: characters in front of these tokens."""
        names = [self.name(one.token) for one in logprobs]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return CompletionLogprobs(
            tokens=names,
            token_logprobs=[_finite(one.logprob) for one in logprobs],
            top_logprobs=[
                {self.name(token): _finite(value) for token, value in one.top} for one in logprobs
            ],
            text_offset=offsets,
        )

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self.name(token)
        whole = None if REPLACEMENT in name else list(name.encode())
        return {"token": name, "logprob": _finite(logprob), "bytes": whole}


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999."""
    return max(value, -9999.0)
