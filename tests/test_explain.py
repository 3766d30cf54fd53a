"""The page: every character of the prompt is on it, escaped, coloured by its layers."""

import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_level

from lazyahead.cli import explain
from lazyahead.cli.explain import DepthKind, explain_page, runs, token_texts
from lazyahead.config import LazyPrefill
from lazyahead.results import Completion, Reach, Stats

LAYERS = 4
STATS = Stats(3, 0, 2, 0.5, 0.1, 0.5, 1, 7)


def page(
    text: str,
    depth: list[int],
    before: list[int] | None = None,
    answer: str = "yes",
    sources=(None,),
) -> str:
    ids = byte_level()(text, add_special_tokens=False)["input_ids"]
    depth = [depth[i % len(depth)] for i in range(len(ids))]
    before = depth if before is None else [before[i % len(before)] for i in range(len(ids))]
    reach = Reach(tuple(ids), tuple(depth), tuple(before), LAYERS)
    answer_ids = tuple(byte_level()(answer, add_special_tokens=False)["input_ids"])
    emitted = tuple(sources[i % len(sources)] for i in range(len(answer_ids)))
    completion = Completion(answer, answer_ids, STATS, "stop", emitted)
    return explain_page(reach, byte_level(), completion, model="a<b>", prefill=LazyPrefill())


def prompt_on(html: str) -> str:
    """The prompt as a reader of the page sees it."""
    shown = html.rpartition('<div class="text">')[2].partition("\n</body>")[0]
    return unescape(re.sub(r"<[^>]+>", "", shown))


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=60))
def test_every_character_is_on_the_page(text):
    assert prompt_on(page(text, [1, 4, 4, 2])).rstrip() == text.rstrip()


def test_a_long_prompt_is_cut_at_line_ends_only_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(explain, "BLOCK_CHARACTERS", 20)
    text = "one two three four\nfive six seven eight nine ten\n\neleven twelve\n" * 3
    html = page(text, [1, 1, 4])
    assert prompt_on(html).rstrip() == text.rstrip()
    assert html.count("<div>") > 3


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", "&amp; \"'", "{prompt}{answer}{tiles}", "</span></div>"]
)
def test_text_is_never_markup(evil):
    html = page(f"x {evil} y", [4, 2], answer=evil)
    assert prompt_on(html).strip() == f"x {evil} y"
    assert "<script" not in html
    assert "a<b>" not in html


def test_nothing_is_fetched():
    html = page("text", [4])
    assert not re.search(r"(src|href|@import|url\()", html)


def test_neighbours_of_one_kind_share_an_element():
    kinds = [DepthKind(4, False)] * 500 + [DepthKind(2, False)] * 500 + [DepthKind(2, True)] * 3
    merged = list(runs(kinds, ["a"] * 1003))
    assert [len(run.text) for run in merged] == [500, 500, 3]


def test_revived_tokens_are_marked_and_counted():
    html = page("The code of the red door", [4, 2, 2], before=[2, 2, 2])
    legend = html.partition('<table class="legend">')[2].partition("</table>")[0]
    rows = re.findall(
        r'class="(d\d r?)">text</span></td><td class="n">(\d+)<', legend.replace('d2"', 'd2 "')
    )
    assert [name for name, _ in rows] == ["d4 r", "d2 "]
    assert sum(int(count) for _, count in rows) == len(
        byte_level().encode("The code of the red door")
    )
    assert "revived" in legend
    assert 'class="d4 r"' in html.rpartition('<div class="text">')[2]


def test_special_tokens_are_shown_by_name():
    tokenizer = byte_level()
    assert token_texts(tokenizer, [tokenizer.bos_token_id, tokenizer.eos_token_id]) == [
        "<s>",
        "</s>",
    ]


def test_half_characters_stay_with_the_token_that_completes_them():
    ids = byte_level()("€", add_special_tokens=False)["input_ids"]
    assert token_texts(byte_level(), ids) == [*[""] * (len(ids) - 1), "€"]
