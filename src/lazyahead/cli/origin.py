"""The source of each part of an answer: the prompt, the answer so far or the memory, where it was
drafted, or the model alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from lazyahead.draft.tree import Source
from lazyahead.text.spans import Spans

if TYPE_CHECKING:
    from lazyahead.results import Completion, Piece


class Origin(NamedTuple):
    """One source of tokens. Their styles differ without colour too."""

    name: str
    """In JSON, and as a class of the page."""
    words: str
    style: str
    """On a terminal."""


OWN = Origin("model", "the model's own", "none")
ORIGINS: dict[Source | None, Origin] = {
    Source.PROMPT: Origin("prompt", "from the prompt", "underline cyan"),
    Source.OUTPUT: Origin("answer", "from the answer", "bold yellow"),
    Source.MEMORY: Origin("memory", "from memory", "italic magenta"),
    None: OWN,
}


class Part(NamedTuple):
    """Neighbouring text of one origin, and how many tokens completed it."""

    origin: Origin
    text: str
    num_tokens: int


class Painter:
    """Splits streamed text into parts by origin. A character belongs to the token that completes
    it."""

    def __init__(self, tokenizer: Any) -> None:
        self._spans: Spans[Source | None] = Spans(tokenizer, None)

    def add(
        self, text: str, token_ids: Sequence[int], sources: Sequence[Source | None]
    ) -> Iterator[Part]:
        """The parts of `text`, which joined are `text`. `sources` may be empty: all the model's
        own."""
        for source, part, num_tokens in self._spans.add(text, token_ids, sources):
            yield Part(ORIGINS[source], part, num_tokens)


def parts(tokenizer: Any, completion: Completion) -> list[Part]:
    """An answer's text, neighbours of one origin joined. Tokens that complete no character are in
    none of them."""
    painted = Painter(tokenizer).add(completion.text, completion.token_ids, completion.sources)
    joined = []
    for origin, group in groupby(
        (part for part in painted if part.text), key=lambda part: part.origin
    ):
        _, texts, nums = zip(*group, strict=True)
        joined.append(Part(origin, "".join(texts), sum(nums)))
    return joined


def counts(completion: Completion) -> dict[Origin, int]:
    """Tokens of each origin, the end-of-text token included; the memory is left out at 0."""
    counted = Counter(
        ORIGINS[source] for source in completion.sources or [None] * len(completion.token_ids)
    )
    return {
        origin: counted[origin]
        for origin in ORIGINS.values()
        if counted[origin] or origin.name != "memory"
    }


def legend(completion: Completion) -> Text:
    """For example: 62 tokens: 41 from the prompt, 9 from the answer, 12 the model's own; 4.8 tokens
    a step."""
    num = len(completion.token_ids)
    text = Text(f"{num} token{'' if num == 1 else 's'}: ")
    for place, (origin, count) in enumerate(counts(completion).items()):
        text.append(", " if place else "")
        text.append(f"{count} {origin.words}", origin.style)
    return text.append(f"; {completion.stats.tokens_per_step:.1f} tokens a step")


def print_legend(completion: Completion) -> None:
    """What the colours mean and how many tokens have them, on stderr."""
    Console(stderr=True, highlight=False).print(legend(completion), soft_wrap=True)


def as_json(tokenizer: Any, completion: Completion) -> list[dict[str, Any]]:
    """Run by run: `source` (prompt, answer, memory or model), `text` and `tokens`."""
    return [
        {"source": origin.name, "text": text, "tokens": num_tokens}
        for origin, text, num_tokens in parts(tokenizer, completion)
    ]


class ColourPrinter:
    """Prints pieces to a terminal, in colours where it has some."""

    def __init__(self, tokenizer: Any) -> None:
        self._painter = Painter(tokenizer)
        self._console = Console(highlight=False)

    def __call__(self, piece: Piece) -> None:
        for part in self._painter.add(piece.text, piece.token_ids, piece.sources):
            segment = Segment(
                part.text, Style.parse(part.origin.style)
            )  # as it is: `Text` would expand tabs
            self._console.print(Segments([segment]), end="", soft_wrap=True)
