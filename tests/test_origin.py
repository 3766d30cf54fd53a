"""Every token of an answer has an origin, and every character of it is shown once, whatever pieces
it came in."""

import json
from html import unescape
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import PREFILLS, engine_for, finish, prompts, request_for
from test_explain import page
from tiny import byte_fallback, byte_level, save_model

from lazyahead.cli import run
from lazyahead.cli.origin import OWN, ColourPrinter, Painter, as_json, counts, legend, parts
from lazyahead.config import Lookahead
from lazyahead.draft.factory import drafter_for
from lazyahead.draft.tree import Draft, Source
from lazyahead.results import Completion, Piece, Stats
from lazyahead.text import Detokenizer

STATS = Stats(3, 0, 6, 0.5, 0.1, 0.5, 2, 0)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
SOURCES = st.lists(st.sampled_from([None, *Source]), min_size=1, max_size=9)


def completion(text, sources, tokenizer=None):
    tokenizer = tokenizer or byte_level()
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    detokenizer = Detokenizer(tokenizer)
    text = "".join(map(detokenizer.add, ids)) + detokenizer.flush()
    return Completion(
        text, ids, STATS, "stop", tuple(sources[i % len(sources)] for i in range(len(ids)))
    )


@given(TEXT, SOURCES, st.booleans())
def test_the_parts_joined_are_the_text_and_hold_each_token_once(text, sources, fallback):
    tokenizer = byte_fallback() if fallback else byte_level()
    answer = completion(text, sources, tokenizer)
    found = parts(tokenizer, answer)
    assert "".join(part.text for part in found) == answer.text
    assert sum(counts(answer).values()) == len(answer.token_ids)
    assert all(a.origin != b.origin for a, b in pairwise(found))


@given(
    st.text("abc é", max_size=30),
    SOURCES,
    st.lists(st.integers(0, 30), max_size=4),
    st.integers(0, 3),
)
def test_pieces_that_hold_text_back_are_painted_as_the_whole(text, sources, cuts, held):
    answer = completion(text, sources)
    painter, shown, start = Painter(byte_level()), 0, 0
    painted = []
    for cut in sorted({*(min(cut, len(answer.token_ids)) for cut in cuts), len(answer.token_ids)}):
        is_last = cut == len(answer.token_ids)
        ready = byte_level().decode(answer.token_ids[:cut], skip_special_tokens=True).rstrip("�")
        end = len(answer.text) if is_last else max(shown, len(ready) - held)
        painted += painter.add(
            answer.text[shown:end], answer.token_ids[start:cut], answer.sources[start:cut]
        )
        shown, start = end, cut
    whole = Painter(byte_level()).add(answer.text, answer.token_ids, answer.sources)
    assert _characters(painted) == _characters(whole)


def _characters(painted):
    return [(part.origin.name, character) for part in painted for character in part.text]


def test_text_behind_a_stop_string_has_no_part():
    answer = completion("one two", [Source.PROMPT])
    cut = Completion("one", answer.token_ids, STATS, "stop", answer.sources)
    assert "".join(part.text for part in parts(byte_level(), cut)) == "one"


def test_without_drafts_all_is_the_models_own():
    answer = completion("yes", [None])
    assert as_json(byte_level(), answer) == [
        {"source": "model", "text": "yes", "tokens": len(answer.token_ids)}
    ]
    assert counts(answer)[OWN] == len(answer.token_ids)


def test_the_legend_counts_and_names_memory_only_where_it_helped():
    plain = completion("uvwxyz", [None, Source.PROMPT, Source.OUTPUT])
    assert "2 from the prompt, 2 from the answer, 2 the model's own" in str(legend(plain))
    assert "memory" not in str(legend(plain))
    assert "memory" in str(legend(completion("abc", [Source.MEMORY])))


def test_an_answer_is_the_sum_of_its_pieces_sources_too():
    pieces = [
        Piece("a", (1, 2), STATS, None, (Source.PROMPT, None)),
        Piece("b", (3,), STATS, "stop", (None,)),
    ]
    assert Completion.fold(pieces).sources == (Source.PROMPT, None, None)


def test_the_page_tells_origins_apart_without_colour():
    html = page("x", [4], answer="<b>yes</b>", sources=[Source.PROMPT, None, Source.MEMORY])
    shown = html.partition('<div class="text answer">')[2].partition("</div>")[0]
    assert 'class="from-prompt" data-words="drafted from the prompt, 1 token"' in shown
    assert "<b>" not in shown
    assert "".join(part.partition(">")[2] for part in unescape(shown).split("<span ")).replace(
        "</span>", ""
    ) == ("<b>yes</b>")
    styles = [
        html.partition(f".from-{name} {{")[2].partition("}")[0]
        for name in ("prompt", "answer", "memory")
    ]
    assert ["solid" in styles[0], "double" in styles[1], "wavy" in styles[2]] == [True] * 3


@pytest.mark.parametrize("reading", ["none", "lazy"])
def test_the_engine_tells_the_source_of_every_token(reading):
    known = prompts(40)[0]
    for drafter in (None, drafter_for(Lookahead())):
        engine = engine_for("llama", PREFILLS[reading], drafter)
        emitted = []
        request = request_for(
            engine,
            known,
            30,
            emit=lambda ids, _, emitted=emitted: emitted.append((len(ids), request.sources)),  # noqa: B023
        )
        finish(engine, [request])
        assert all(len(sources) == num for num, sources in emitted)
        sources = [source for _, some in emitted for source in some]
        drafted = sum(source is not None for source in sources)
        assert drafted == 0 if drafter is None else drafted >= 30 - 1 - request.num_steps
        assert drafted <= 30 - request.num_steps


def test_a_blocked_or_own_token_is_the_models_own():
    draft = Draft([1, 2, 3], [-1, 0, 1], [Source.PROMPT, Source.OUTPUT, Source.MEMORY])
    assert draft.sources_of([0, 1], 3) == (Source.PROMPT, Source.OUTPUT, None)
    assert draft.sources_of([0, 1], 1) == (Source.PROMPT,)
    assert Draft.EMPTY.sources_of([], 1) == (None,)


@pytest.mark.parametrize(
    "text", ["a\nb", "\n\n", "x \n  y ", "[bold]a[/]", "word " * 60, "tab\tstop"]
)
def test_a_terminal_gets_the_text_as_it_is(text, capsys):
    answer = completion(text, [Source.PROMPT, None, Source.OUTPUT])
    show = ColourPrinter(byte_level())
    show(Piece(answer.text, answer.token_ids, STATS, "stop", answer.sources))
    assert capsys.readouterr().out == text


def test_generate_tells_the_origin_of_its_text(tmp_path, capsys):
    model, page = str(save_model(tmp_path / "tiny")), tmp_path / "page.html"
    capsys.readouterr()
    options = ("generate", "The code is 417. " * 9, "-m", model, "--max-new-tokens", "8", "--json")
    for more in (("--decode", "lookahead", "--explain", str(page)), ("--decode", "off")):
        assert run([*options, *more]) == 0
        out, err = capsys.readouterr()
        values = json.loads(out.splitlines()[-1])
        assert "".join(part["text"] for part in values["answer_sources"]) == values["text"]
        assert ("8 tokens: " in err) == ("--explain" in more)
    assert {part["source"] for part in values["answer_sources"]} == {"model"}
    assert 'class="from-model"' in page.read_text(encoding="utf-8")
