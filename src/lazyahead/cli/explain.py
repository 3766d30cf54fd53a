"""A page that shows at how many layers each prompt token was computed, and what was drafted.

It has no scripts and loads nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from lazyahead.cli import origin
from lazyahead.cli.output import seconds
from lazyahead.text import Detokenizer

if TYPE_CHECKING:
    from lazyahead.config import LazyPrefill
    from lazyahead.results import Completion, Reach, Stats

BLOCK_CHARACTERS = 4000
"""The prompt's text is cut at line ends into blocks of about this size; a browser draws only those
in view."""


class DepthKind(NamedTuple):
    """What tokens of one colour on the page have in common."""

    depth: int
    revived: bool

    @property
    def css(self) -> str:
        return f"d{self.depth} r" if self.revived else f"d{self.depth}"

    def words(self, num_layers: int) -> str:
        """For the legend and the tooltip."""
        if self.depth >= num_layers:
            return "computed at all layers" + (
                ", deferred before and revived" if self.revived else ""
            )
        revived = "revived, then " if self.revived else ""
        return f"{revived}computed at {self.depth} of {num_layers} layers, then deferred"


class TextRun(NamedTuple):
    """Neighbouring tokens of one kind."""

    kind: DepthKind
    text: str


def explain_page(
    reach: Reach, tokenizer: Any, completion: Completion, *, model: str, prefill: LazyPrefill | None
) -> str:
    """The page. All text is escaped."""
    kinds = [
        DepthKind(depth, depth > before)
        for depth, before in zip(reach.depth, reach.prefill_depth, strict=True)
    ]
    counts = Counter(kinds)
    template = files("lazyahead.cli").joinpath("explain.html").read_text(encoding="utf-8")
    depths = "\n".join(_rule(kind, reach.num_layers) for kind in sorted(counts))
    layers = [sum(depth > layer for depth in reach.depth) for layer in range(reach.num_layers)]
    parts = {
        "about": escape(f"{model} · {prefill if prefill is not None else 'nothing deferred'}"),
        "tiles": "".join(
            f"<li><span>{escape(k)}</span><b>{escape(v)}</b></li>"
            for k, v in _tiles(completion.stats)
        ),
        "legend": "".join(
            _legend_row(kind, counts[kind], len(kinds), reach.num_layers) for kind in _order(counts)
        ),
        "layers": "".join(
            f'<i style="height:{100 * n / max(1, len(kinds)):.1f}%" title="{n:,}"></i>'
            for n in layers
        ),
        "layers_label": ", ".join(map(str, layers)),
        "last_layer": str(reach.num_layers - 1),
        "origins": "".join(
            _origin_row(*row, len(completion.token_ids))
            for row in origin.counts(completion).items()
        ),
        "answer": "".join(map(_origin_span, origin.parts(tokenizer, completion))),
        "prompt": "".join(_blocks(runs(kinds, token_texts(tokenizer, reach.token_ids)))),
    }
    head, body = template.replace("/*depths*/", depths).split("<body>")
    return head + "<body>" + re.sub(r"{(\w+)}", lambda name: parts[name[1]], body)


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token; special tokens by name. Joined, they are the prompt."""
    detokenizer = Detokenizer(tokenizer)
    special = set(tokenizer.all_special_ids)
    texts = []
    for token_id in token_ids:
        text = detokenizer.add(token_id)
        texts.append(
            text + (str(tokenizer.convert_ids_to_tokens(token_id)) if token_id in special else "")
        )
    if texts:
        texts[-1] += detokenizer.flush()
    return texts


def runs(kinds: Sequence[DepthKind], texts: Sequence[str]) -> Iterator[TextRun]:
    """Neighbours of one kind joined, so that the page has fewer elements than tokens."""
    for kind, group in groupby(zip(kinds, texts, strict=True), key=lambda pair: pair[0]):
        yield TextRun(kind, "".join(text for _, text in group))


def _blocks(all_runs: Iterator[TextRun]) -> Iterator[str]:
    """Spans, in blocks that end where a line does."""
    block: list[str] = []
    length = 0
    for run in all_runs:
        text = run.text
        while (
            length + len(text) > BLOCK_CHARACTERS
            and (end := text.find("\n", max(0, BLOCK_CHARACTERS - length))) >= 0
        ):
            block.append(_span(run.kind, text[:end]))
            yield f"<div>{''.join(block)}\n</div>"
            block = []
            length = 0
            text = text[end + 1 :]
        block.append(_span(run.kind, text))
        length += len(text)
    yield f"<div>{''.join(block)}</div>"


def _span(kind: DepthKind, text: str) -> str:
    return f'<span class="{kind.css}">{escape(text, quote=False)}</span>' if text else ""


def _rule(kind: DepthKind, num_layers: int) -> str:
    """The style of a kind: more layers, stronger background; few layers, dim text."""
    share = kind.depth / max(1, num_layers)
    selector = "." + kind.css.replace(" ", ".")
    ink = "color: var(--dim); " if share < 0.5 else ""
    return (
        f"{selector} {{ {ink}background: rgb(var(--depth) / {0.42 * share**1.5:.2f}); }}\n"
        f'.text {selector}:hover::after {{ content: "{kind.words(num_layers)}"; }}'
    )


def _order(counts: Counter[DepthKind]) -> list[DepthKind]:
    """Deepest first."""
    return sorted(counts, key=lambda kind: (-kind.depth, kind.revived))


def _legend_row(kind: DepthKind, count: int, total: int, num_layers: int) -> str:
    words = escape(kind.words(num_layers))
    share = f'<td class="n">{count:,}</td><td class="n">{count / total:.1%}</td>'
    return f'<tr><td><span class="{kind.css}">text</span></td>{share}<td>{words}</td></tr>'


def _origin_row(kind: origin.Origin, count: int, total: int) -> str:
    share = f'<td class="n">{count:,}</td><td class="n">{count / max(1, total):.1%}</td>'
    name = f'<td><span class="from-{kind.name}">text</span></td>'
    return f"<tr>{name}{share}<td>{_origin_words(kind)}</td></tr>"


def _origin_span(part: origin.Part) -> str:
    tokens = f"{part.num_tokens} token{'' if part.num_tokens == 1 else 's'}"
    words = f"{_origin_words(part.origin)}, {tokens}"
    text = escape(part.text, quote=False)
    return f'<span class="from-{part.origin.name}" data-words="{words}">{text}</span>'


def _origin_words(kind: origin.Origin) -> str:
    return kind.words if kind is origin.OWN else f"drafted {kind.words}"


def _tiles(stats: Stats) -> list[tuple[str, str]]:
    return [
        ("first token after", seconds(stats.ttft_s)),
        ("prompt tokens", f"{stats.prompt_tokens:,}"),
        ("computed (mean over layers)", f"{stats.prompt_tokens_computed:.1%}"),
        ("revived while answering", f"{stats.revived:,}"),
        ("answer tokens", f"{stats.answer_tokens:,}"),
        ("tokens a second", f"{stats.tokens_per_s:.1f}"),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
    ]
