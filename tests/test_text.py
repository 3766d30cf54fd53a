"""Text in and out: streaming loses nothing, stops where a search would, and finds the question."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_fallback, byte_level, chatty

from lazyahead import text as text_module
from lazyahead.errors import RequestError
from lazyahead.text import Detokenizer, StopStrings, encode_prompt, encode_turn, read_text

TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}
tokenizers = pytest.mark.parametrize(
    "tokenizer", [make() for make in TOKENIZERS.values()], ids=list(TOKENIZERS)
)
some_text = st.text(st.characters(codec="utf-8"), max_size=60) | st.text(
    "the code 日本語😀é", max_size=200
)


class Slow:
    """A tokenizer that cannot say where its tokens lie in the text."""

    is_fast, chat_template = False, None

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": byte_level()(text, add_special_tokens=False)["input_ids"]}


def stream(tokenizer: object, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in token_ids), detokenizer.flush()]


def decode(tokenizer: object, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@tokenizers
@settings(deadline=None, max_examples=100)
@given(text=some_text)
def test_streamed_pieces_join_to_the_whole_text(tokenizer, text):
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(stream(tokenizer, token_ids)) == decode(tokenizer, token_ids)


@settings(deadline=None, max_examples=200)
@given(token_ids=st.lists(st.integers(0, len(byte_level()) - 1), max_size=80))
def test_even_bytes_that_are_no_text_stream_to_what_decoding_gives(token_ids):
    assert "".join(stream(byte_level(), token_ids)) == decode(byte_level(), token_ids)


@tokenizers
def test_half_a_character_is_never_shown(tokenizer):
    token_ids = tokenizer("x😀日é😀", add_special_tokens=False)["input_ids"]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in stream(tokenizer, token_ids))


@pytest.mark.parametrize(
    "token", [byte_level().convert_tokens_to_ids(name) for name in ("a", "Ġ", "æ")]
)
def test_a_long_answer_costs_no_more_per_token(token):
    longest = 0

    class Counting:
        def decode(self, token_ids, **options):
            nonlocal longest
            longest = max(longest, len(token_ids))
            return byte_level().decode(token_ids, **options)

    pieces = stream(Counting(), [token] * 1000)
    assert "".join(pieces) == decode(byte_level(), [token] * 1000)
    assert longest <= 8 * text_module.CONTEXT


def test_without_a_tokenizer_there_is_no_text():
    assert stream(None, [1, 2, 3]) == [""] * 4


def search(text: str, stops: list[str]) -> str:
    """The law, spelled out: the stop string that is complete first ends the text; the longest, if
    several."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("ab\n", max_size=6), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
)
def test_streaming_stops_exactly_where_a_search_over_the_full_text_does(pieces, stops):
    watch = StopStrings(stops)
    shown = "".join(watch.add(piece) for piece in pieces)
    assert shown + watch.flush() == search("".join(pieces), stops)
    assert (watch.matched is not None) == any(stop in "".join(pieces) for stop in stops)


def test_only_what_may_start_a_stop_string_is_held_back():
    watch = StopStrings(["\n\n"])
    assert [watch.add(piece) for piece in ("one", "\n", "two\n", "\nthree", "four")] == [
        "one",
        "",
        "\ntwo",
        "",
        "",
    ]
    assert (watch.matched, watch.flush()) == ("\n\n", "")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match="stop string"):
        StopStrings([""])


CASES = [
    ("The code is 417.", "What is it?"),
    ("user assistant", "user"),
    ("", "What is it?"),
    ("a\n\na", " a "),
]


@pytest.mark.parametrize(("document", "question"), CASES)
@pytest.mark.parametrize("chat", [False, True])
@tokenizers
def test_the_question_span_covers_the_question(tokenizer, chat, document, question):
    tokenizer = chatty(tokenizer) if chat else tokenizer
    prompt = encode_prompt(tokenizer, document, question)
    start, end = prompt.question
    inside, after = (
        tokenizer.decode(prompt.token_ids[part]) for part in (slice(start, end), slice(end, None))
    )
    assert question.strip() in inside
    assert len(inside) <= len(question) + 2
    assert after.replace(" ", "") == ("</s>\n<|assistant|>\n" if chat else "\nAnswer:")


def test_a_slow_tokenizer_counts_all_after_the_document_as_question():
    prompt = encode_prompt(Slow(), "The code is 417.", "What is it?")
    start, end = prompt.question
    assert end == len(prompt.token_ids)
    assert "What is it?" in decode(byte_level(), prompt.token_ids[start:])


def test_without_a_question_the_prompt_is_the_bare_text():
    prompt = encode_prompt(byte_level(), "The code")
    assert decode(byte_level(), prompt.token_ids) == "The code"
    assert prompt.question is None


def test_the_chat_template_is_used_as_the_tokenizer_has_it():
    prompt = encode_prompt(chatty(byte_level()), "The code is 417.", "What?")
    text = byte_level().decode(prompt.token_ids)
    assert text == "<|user|>\nThe code is 417.\n\nWhat?</s>\n<|assistant|>\n"


@pytest.mark.parametrize("document", ["", " \n"])
def test_an_empty_prompt_is_refused(document):
    with pytest.raises(RequestError, match="empty"):
        encode_prompt(byte_level(), document)


@pytest.mark.parametrize("brought_end", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_the_next_turn_continues_the_tokens_of_the_last(chat, brought_end):
    tokenizer = chatty(byte_level()) if chat else byte_level()
    turns = [{"role": "user", "content": "The code is 417."}]
    first = encode_turn(tokenizer, turns)
    answer = tokenizer("naïve", add_special_tokens=False)["input_ids"]
    previous = [
        *first.token_ids,
        *answer,
        *([tokenizer.eos_token_id] if brought_end and chat else []),
    ]
    turns += [{"role": "assistant", "content": "naïve"}, {"role": "user", "content": "What is it?"}]
    second = encode_turn(tokenizer, turns, previous)
    assert second.token_ids[: len(previous)] == previous
    assert decode(tokenizer, second.token_ids[slice(*second.question)]).strip() == "What is it?"
    if chat:
        whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(second.token_ids) == whole


@pytest.mark.parametrize("chat", [True, False])
def test_a_long_message_is_read_whole_and_its_last_paragraph_is_the_question(chat):
    tokenizer = chatty(byte_level()) if chat else byte_level()
    for content, asked in [("word " * 300 + "\n\nWhich?", "Which?"), ("word " * 300, None)]:
        prompt = encode_turn(tokenizer, [{"role": "user", "content": content}])
        assert decode(tokenizer, prompt.token_ids).count("word") == 300
        assert (
            decode(tokenizer, prompt.token_ids[slice(*prompt.question)]).strip()
            if prompt.question
            else None
        ) == asked


@pytest.mark.parametrize("content", ["word " * 300, "Question: which?", "a\n\nwhich?"])
def test_a_template_that_looks_into_the_message_writes_what_it_always_does(content):
    tokenizer = chatty(byte_level())
    tokenizer.chat_template = (
        "{% if messages[0].content.startswith('Question:') %}Q!{% endif %}{{messages[0].content}}"
    )
    turns = [{"role": "user", "content": content}]
    prompt = encode_turn(tokenizer, turns)
    assert tokenizer.decode(prompt.token_ids) == tokenizer.apply_chat_template(
        turns, tokenize=False
    )
    assert (prompt.question is not None) == content.startswith("a")


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, monkeypatch):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    monkeypatch.setattr(text_module, "MAX_FILE_BYTES", 10)
    huge = tmp_path / "huge.txt"
    huge.write_text("x" * 11)
    for path, reason in [
        (latin, "UTF-8"),
        (tmp_path, "folder"),
        (tmp_path / "no", "no file"),
        (huge, "MB"),
    ]:
        with pytest.raises(RequestError, match=reason) as caught:
            read_text(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(path) == "hello"


@pytest.mark.parametrize("chat", [True, False])
@tokenizers
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_an_answer_of_any_tokens_is_found_again_by_its_streamed_text(tokenizer, chat, data):
    tokenizer = chatty(tokenizer) if chat else tokenizer
    turns = [{"role": "user", "content": "The code is 417.\n\nWhat?"}]
    previous = []
    for _ in range(2):
        previous = encode_turn(tokenizer, turns, previous).token_ids
        ids = st.integers(5, len(tokenizer) - 1)  # none of them special
        answer = data.draw(st.lists(ids, min_size=1, max_size=12))
        previous = [*previous, *answer]
        content = "".join(stream(tokenizer, answer))
        turns += [{"role": "assistant", "content": content}, {"role": "user", "content": "Why?"}]
    assert encode_turn(tokenizer, turns, previous).token_ids[: len(previous)] == previous
