"""What a user of the library may hand to an LLM, and what is refused in one line."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import families
import pytest
import tiny as disk
import torch
from support import KEEP_ALL, LAZY, prompts, tiny
from test_generate_batch import Adapted, Wrapper
from torch import nn

from lazyahead import LLM, PRESETS, Lookahead, Sampling
from lazyahead.errors import (
    ConfigError,
    ContextLengthError,
    ModelNotFoundError,
    RequestError,
    UnsupportedModelError,
)
from lazyahead.sampling import Picker

SHORT = Sampling(max_new_tokens=8)
(DOCUMENT,) = prompts(60)


def reader(chat=True, **options):
    """A tiny model that takes text."""
    tokenizer = disk.chatty(disk.byte_level()) if chat else disk.byte_level()
    model = families.build("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    return LLM(model, tokenizer=tokenizer, **{"prefill": None, **options})


@pytest.fixture(scope="module")
def llm():
    return reader()


def user(content):
    return {"role": "user", "content": content}


# --- models and settings --------------------------------------------------------------------------


def test_where_branches_are_dear_one_is_drafted_unless_more_are_asked_for():
    model = tiny("llama:bfloat16")[0]
    modes = [None, "hierarchical", "single"]
    engines = [LLM(model, prefill=None, decode=Lookahead(mode=mode)).engine for mode in modes]
    assert [engine.drafter.mode for engine in engines] == ["single", "hierarchical", "single"]


def test_settings_may_be_given_by_name(tmp_path):
    model = tiny("llama")[0]
    named = LLM(model, prefill="balanced", decode="lookahead")
    assert (named.prefill, named.decode) == (PRESETS["balanced"], Lookahead())
    plain = LLM(model, prefill="off", decode="off")
    assert (plain.prefill, plain.decode) == (None, None)
    LAZY.save(tmp_path / "profile.toml")
    assert LLM(model, prefill=str(tmp_path / "profile.toml")).prefill == LAZY
    for wrong in ({"prefill": "no such"}, {"decode": "on"}, {"prefill": 3}, {"decode": True}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            LLM(model, **wrong)


def test_a_tokenizer_may_be_a_path_and_a_dtype_torchs_own(tmp_path):
    disk.save_model(tmp_path)
    llm = LLM(str(tmp_path), tokenizer=str(tmp_path), dtype=torch.bfloat16, prefill=None)
    assert llm.model.dtype == torch.bfloat16
    assert llm.generate("The code", sampling=SHORT).stats.answer_tokens == 8


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        Adapted,
        Wrapper,
        lambda model: Wrapper(Adapted(model)),
    ],
    ids=["compiled", "adapted", "parallel", "both"],
)
def test_a_model_inside_another_module_is_found(wrap):
    model = tiny("llama")[0]
    answer = LLM(wrap(model), prefill=None).generate(DOCUMENT, sampling=SHORT)
    assert answer.token_ids == LLM(model, prefill=None).generate(DOCUMENT, sampling=SHORT).token_ids


@pytest.mark.parametrize("given", [nn.Linear(2, 2), {"a": 1}, 3, ["x"]], ids=str)
def test_what_is_no_model_is_refused_by_name(given):
    with pytest.raises(UnsupportedModelError, match=f"a {type(given).__name__} is no model"):
        LLM(given)


# --- prompts --------------------------------------------------------------------------------------


def test_token_ids_and_what_a_tokenizer_gives_are_one_prompt(llm):
    ids = llm.tokenizer("The code of the red door")["input_ids"]
    expected = llm.generate([ids], sampling=SHORT)[0].token_ids
    given = llm.tokenizer("The code of the red door")
    for prompt in (ids, torch.tensor(ids), given, {"input_ids": ids}):
        assert llm.generate(prompt, sampling=SHORT).token_ids == expected
        pieces = list(llm.stream(prompt, sampling=SHORT))
        assert tuple(token for piece in pieces for token in piece.token_ids) == expected
    for prompt in (given.convert_to_tensors("pt", prepend_batch_axis=True), torch.tensor([ids])):
        assert [c.token_ids for c in llm.generate(prompt, sampling=SHORT)] == [expected]


def test_padding_of_a_batch_is_left_out(llm):
    texts = ["The code of the red door", "is"]
    padded = llm.tokenizer(texts, padding=True, return_tensors="pt")
    assert padded["attention_mask"].min() == 0
    alone = [llm.generate(llm.tokenizer(text), sampling=SHORT).token_ids for text in texts]
    assert [c.token_ids for c in llm.generate(padded, sampling=SHORT)] == alone


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "NoneType"),
        (3, "int"),
        (b"text", "bytes"),
        ({"text": "a"}, "'input_ids'"),
        (["a", None], "prompt 1 must be"),
        (["a", 3], "prompt 1 must be"),
        (["a", "b", " "], "prompt 2 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([1, 2.5], "prompt 0 must be"),
        ([1, 10**9], "between 0 and"),
        ("", "empty"),
        ("half \ud83d a character", "the prompt has half a character at place 5"),
    ],
    ids=repr,
)
def test_a_prompt_that_is_none_is_refused_by_name(llm, given, message):
    with pytest.raises(RequestError, match=message) as error:
        llm.generate(given, sampling=SHORT)
    assert "\n" not in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize(
    ("second", "message"),
    [("half \ud83d", "prompt 1: .*half a character"), ([9, 99999], "prompt 1: token ids"),
     ([5] * 600, "prompt 1: .*context")],
    ids=["surrogate", "no token", "too long"],
)  # fmt: skip
def test_of_several_prompts_the_one_that_is_wrong_is_named(llm, second, message):
    first = "fine" if isinstance(second, str) else [5, 6]
    with pytest.raises(RequestError, match=message):
        llm.generate([first, second], sampling=SHORT)
    with pytest.raises(RequestError) as alone:
        llm.generate(second, sampling=SHORT)
    assert "prompt 1" not in str(alone.value)


def test_a_question_needs_no_text(llm):
    answers = [llm.generate(text, "who?", sampling=SHORT).token_ids for text in (None, "")]
    assert answers[0] == answers[1]


def test_settings_of_a_call_that_are_of_another_type_are_named(llm):
    with pytest.raises(RequestError, match="sampling is a Sampling, got dict"):
        llm.generate("a", sampling={"temperature": 1})
    with pytest.raises(RequestError, match="sampling is a Sampling, got dict"):
        llm.generate(["a", "b"], sampling={})
    with pytest.raises(RequestError, match=r"llm.session\(\)`, got str"):
        llm.generate("a", session="s.safetensors", sampling=SHORT)


def test_an_empty_model_name_is_not_the_built_in_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError):
        LLM("")


def test_a_question_with_half_a_character_is_refused(llm):
    with pytest.raises(RequestError, match="the question has half a character"):
        llm.generate("text", "why \udc80?", sampling=SHORT)


@pytest.mark.parametrize("text", ["word " * 2_000_000, "ab" * 4_000_000], ids=["words", "one word"])
def test_a_text_of_megabytes_is_refused_from_its_size(llm, text):
    begin = time.perf_counter()
    for ask in (llm.stream, lambda text: llm.chat([user(text)])):
        with pytest.raises(ContextLengthError, match=f"text of {len(text)} characters"):
            ask(text)
    assert time.perf_counter() - begin < 5


def test_several_answers_of_one_prompt_are_those_of_seeds_that_count_up(llm):
    warm = Sampling(max_new_tokens=8, temperature=1.0, seed=5)
    answers = llm.generate("The code", sampling=warm, n=3)
    alone = [
        llm.generate("The code", sampling=Sampling(max_new_tokens=8, temperature=1.0, seed=seed))
        for seed in (5, 6, 7)
    ]
    assert [a.text for a in answers] == [a.text for a in alone]
    assert len({a.token_ids for a in llm.generate("The code", sampling=warm, n=3)}) == 3
    with pytest.raises(RequestError, match="n=2"):
        llm.generate(["a", "b"], n=2)
    with pytest.raises(ConfigError, match="n must be"):
        llm.generate("a", n=0)


# --- conversations --------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_a_session_goes_on_from_what_it_shares_with_all_messages(chat):
    llm = reader(chat)
    session = llm.session()
    messages = [user("The code of the red door is 417.\n\nWhat is it?")]
    first = list(llm.chat(messages, sampling=SHORT, session=session))
    history = session.history
    messages += [
        {"role": "assistant", "content": "".join(piece.text for piece in first)},
        user("A question"),
    ]
    *_, last = llm.chat(messages, sampling=SHORT, session=session)
    assert session.history[: len(history)] == history
    assert last.stats.reused_tokens == len(history) - 1
    earlier = session.history
    *_, again = llm.chat(messages, sampling=SHORT, session=session)
    assert session.history == earlier
    assert again.stats.reused_tokens == last.stats.prompt_tokens - 1


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda messages: messages[0].update(content="The code of the red door is 418.\n\nWhat?"),
        lambda messages: messages[1].update(content="something else"),
        lambda messages: messages.insert(0, {"role": "system", "content": "Be brief."}),
        lambda messages: messages.pop(1),
        lambda messages: messages.pop(0),
    ],
    ids=["question", "answer", "system", "no answer", "no question"],
)
def test_messages_that_differ_from_the_session_are_read_as_they_are(chat, change):
    llm = reader(chat)
    session = llm.session()
    messages = [user("The code of the red door is 417.\n\nWhat is it?")]
    first = list(llm.chat(messages, sampling=SHORT, session=session))
    messages += [{"role": "assistant", "content": "".join(p.text for p in first)}, user("Why?")]
    change(messages)
    *_, piece = llm.chat(messages, sampling=SHORT, session=session)
    text = llm.tokenizer.decode(session.history[: piece.stats.prompt_tokens])
    *_, fresh = llm.chat(messages, sampling=SHORT, session=(other := llm.session()))
    assert text == llm.tokenizer.decode(other.history[: fresh.stats.prompt_tokens])
    if chat:
        assert text == llm.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def test_a_conversation_that_was_begun_by_stream_goes_on_by_chat(llm):
    session = llm.session()
    pieces = list(llm.stream("The code is 417.", "What?", sampling=SHORT, session=session))
    history = session.history
    answer = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
    messages = [user("The code is 417.\n\nWhat?"), answer, user("Why?")]
    *_, last = llm.chat(messages, sampling=SHORT, session=session)
    assert last.stats.reused_tokens == len(history) - 1


@pytest.mark.parametrize("chat", [True, False])
def test_a_next_turn_needs_no_earlier_messages(chat):
    llm = reader(chat)
    session, other = llm.session(), llm.session()
    first = llm.generate("The code is 417.", "What?", sampling=SHORT, session=session)
    llm.generate("The code is 417.", "What?", sampling=SHORT, session=other)
    history = session.history
    *_, last = llm.next_turn("Why?", sampling=SHORT, session=session)
    assert last.stats.reused_tokens == len(history) - 1
    answer = {"role": "assistant", "content": first.text}
    messages = [user("The code is 417.\n\nWhat?"), answer, user("Why?")]
    list(llm.chat(messages, sampling=SHORT, session=other))
    assert session.history == other.history
    for content in (" ", None, "half \ud800"):
        with pytest.raises(RequestError, match=r"message (is empty|must be|has half)"):
            llm.next_turn(content, session=session)


def test_content_may_be_parts_of_text_or_nothing(llm):
    parts = [{"type": "text", "text": "The code"}, {"type": "text", "text": "of the door"}]
    (whole, *_), (joined, *_) = (
        list(llm.chat([{"role": "system", "content": None}, user(content)], sampling=SHORT))
        for content in (parts, "The code\nof the door")
    )
    assert whole.stats.prompt_tokens == joined.stats.prompt_tokens
    assert whole.token_ids == joined.token_ids


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ("hello", "list of role and content, got str"),
        (None, "NoneType"),
        ([{"content": "a"}], "message 0 has no role"),
        ([user("a"), {"role": "assistant", "content": "b"}, {"role": 3, "content": "c"}], "2 has"),
        ([user(None)], "empty"),
        ([user([])], "empty"),
        ([user(3)], "content of message 0 must be a text, got int"),
        ([user([{"type": "image_url", "image_url": {}}])], "'image_url'; only 'text'"),
        ([user([{"type": "text"}])], "part of message 0"),
        (["hello"], "message 0 must have role"),
        ([user("a \ud800")], "half a character"),
    ],
    ids=repr,
)
def test_messages_that_are_malformed_are_refused_by_name(llm, messages, message):
    with pytest.raises(RequestError, match=message) as error:
        list(llm.chat(messages, sampling=SHORT))
    assert "\n" not in str(error.value)


def test_a_template_that_refuses_messages_is_quoted_in_one_line():
    llm = reader()
    llm.tokenizer.chat_template = "{{ raise_exception('Roles must\nalternate') }}"
    with pytest.raises(RequestError, match="refuses these messages: Roles must alternate"):
        llm.chat([user("a")])


# --- ends -----------------------------------------------------------------------------------------


class Writes:
    """Makes a model write given tokens, whatever it thinks."""

    def __init__(self, monkeypatch, tokens):
        monkeypatch.setattr(Picker, "is_plain", property(lambda _: False))
        monkeypatch.setattr(Picker, "choose", lambda _, logits, offset: tokens[offset])


def test_a_special_token_as_stop_text_ends_the_answer(llm, monkeypatch):
    ids = llm.tokenizer("The<|user|>\nis", add_special_tokens=False)["input_ids"]
    Writes(monkeypatch, ids)
    for stop, text in (("<|user|>", "The"), ("e<|user|>\n", "Th"), ("is", "The\n")):
        sampling = Sampling(max_new_tokens=len(ids), stop=(stop,))
        answer = llm.generate("a", sampling=sampling)
        assert (answer.text, answer.finish_reason) == (text, "stop")
    answer = llm.generate("a", sampling=Sampling(max_new_tokens=len(ids), stop=("<|assistant|>",)))
    assert (answer.text, answer.finish_reason) == ("The\nis", "length")


@pytest.mark.parametrize("gap", ["\n", "\n\n"])
def test_a_base_models_own_next_question_ends_the_answer(monkeypatch, gap):
    llm = reader(chat=False)
    ids = llm.tokenizer(f" 417{gap}Question: and", add_special_tokens=False)["input_ids"]
    Writes(monkeypatch, ids)
    sampling = Sampling(max_new_tokens=len(ids))
    answers = [
        llm.generate("The code is 417.", "What is it?", sampling=sampling).text,
        "".join(p.text for p in llm.chat([user("The code.\n\nWhat?")], sampling=sampling)),
    ]
    assert answers == [" 417"] * 2
    assert llm.generate("The code is 417.", sampling=sampling).text.endswith("Question: and")


HONOURED = {
    "suppress_tokens": list(range(3, 200)),
    "begin_suppress_tokens": list(range(3, 200)),
    "bad_words_ids": [[token] for token in range(3, 200)],
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "sequence_bias": [[[9], 6.0], [[10, 11], 4.0]],
    "forced_eos_token_id": 7,
    "min_new_tokens": 6,
    "encoder_repetition_penalty": 1.6,
    "exponential_decay_length_penalty": (3, 1.5),
    "renormalize_logits": True,
}


@pytest.mark.parametrize("decode", [None, Lookahead()], ids=["bare", "drafts"])
@pytest.mark.parametrize("name", HONOURED)
def test_the_models_generation_config_holds_as_in_generate(name, decode):
    llm = reader(decode=decode)
    ids = llm.encode("The code of the red door is 417.").token_ids
    own = llm.model.generation_config
    own.eos_token_id = llm.model.config.eos_token_id = [7, *range(50, 250)]
    llm = LLM(llm.model, tokenizer=llm.tokenizer, prefill=None, decode=decode)
    setattr(own, name, HONOURED[name])
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    expected = llm.model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    answer = llm.generate(ids, sampling=Sampling(max_new_tokens=12))
    assert list(answer.token_ids) == expected[0, len(ids) :].tolist()


def test_a_generation_config_that_samples_does_not_make_an_answer_sample(llm):
    ids = llm.encode("The code").token_ids
    expected = llm.generate(ids, sampling=SHORT).token_ids
    other = reader()
    own = other.model.generation_config
    own.do_sample, own.temperature, own.top_k, own.typical_p = True, 3.0, 3, 0.3
    assert other.generate(ids, sampling=SHORT).token_ids == expected


def test_what_a_sampling_sets_wins_over_the_generation_config():
    llm = reader()
    ids = llm.encode("The code").token_ids
    wanted = Sampling(max_new_tokens=12, repetition_penalty=1.5, bad_words=((3,), (60,)))
    expected = llm.generate(ids, sampling=wanted).token_ids
    own = llm.model.generation_config
    own.repetition_penalty, own.bad_words_ids = 9.0, [[token] for token in range(100, 300)]
    assert llm.generate(ids, sampling=wanted).token_ids == expected


def test_stop_strings_of_the_generation_config_end_the_answer(monkeypatch):
    llm = reader()
    ids = llm.tokenizer("The code of", add_special_tokens=False)["input_ids"]
    Writes(monkeypatch, ids)
    llm.model.generation_config.stop_strings = ["code"]
    answer = llm.generate("a", sampling=Sampling(max_new_tokens=len(ids)))
    assert (answer.text, answer.finish_reason) == ("The ", "stop")


def test_guidance_is_refused_by_name():
    llm = reader()
    llm.model.generation_config.guidance_scale = 2.0
    with pytest.raises(RequestError, match=r"guidance_scale 2\.0"):
        llm.generate("a", sampling=SHORT)


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_that_waits_can_be_cancelled_from_another_thread(monkeypatch):
    llm = LLM(tiny("llama")[0], prefill=KEEP_ALL)
    session = llm.session()
    stream = llm.stream(DOCUMENT, sampling=Sampling(max_new_tokens=150), session=session)
    in_pass, go_on = threading.Event(), threading.Event()
    run = llm.engine.runner.run
    seen = []

    def slow(segments, on_layer=None):
        in_pass.set()
        assert go_on.wait(20)
        return run(segments, on_layer)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", slow)
        reader_thread = threading.Thread(target=lambda: seen.extend(stream))
        reader_thread.start()
        assert in_pass.wait(20)
        stream.cancel()
        go_on.set()
        reader_thread.join(20)
    assert not reader_thread.is_alive()
    assert seen == []
    assert not session.in_use
    assert llm.engine.is_idle
    assert list(stream) == []
    assert llm.generate([*DOCUMENT, 5], sampling=SHORT, session=session).stats.answer_tokens == 8


def test_a_stream_is_cancelled_by_leaving_its_block_and_by_dropping_it():
    llm = LLM(tiny("llama")[0], prefill=None)
    session = llm.session()
    with llm.stream(DOCUMENT, sampling=SHORT, session=session) as stream:
        next(stream)
        assert session.in_use
    assert not session.in_use
    assert next(stream, None) is None
    stream = llm.stream([*DOCUMENT, 5], sampling=SHORT, session=session)
    next(stream)
    del stream
    assert not session.in_use
    assert llm.engine.is_idle


def test_a_stream_that_is_open_when_python_ends_says_nothing():
    program = (
        "from lazyahead import LLM\n"
        "stream = LLM(prefill=None).stream([5, 6, 7, 8] * 20)\n"
        "next(stream)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr


def test_a_stream_that_was_never_asked_takes_nothing():
    llm = LLM(tiny("llama")[0], prefill=None)
    session = llm.session()
    stream = llm.stream(DOCUMENT, sampling=SHORT, session=session)
    stream.close()
    assert list(stream) == []
    assert llm.generate(DOCUMENT, sampling=SHORT, session=session).stats.answer_tokens == 8


@pytest.mark.parametrize("way", ["whole", "together", "left", "failed"])
def test_keys_and_values_are_freed_when_the_answer_ends(way, monkeypatch):
    """Without the cycle collector."""
    llm = LLM(tiny("llama")[0], prefill=LAZY, decode=Lookahead())
    sessions = []
    new_session = llm.engine.new_session

    def noted():
        session = new_session()
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(llm.engine, "new_session", noted)
    gc.collect()
    gc.disable()
    try:
        if way == "whole":
            kept = list(llm.stream(DOCUMENT, sampling=SHORT))
        elif way == "together":
            kept = llm.generate([DOCUMENT, DOCUMENT[:30]], sampling=SHORT)
        elif way == "left":
            kept = llm.stream(DOCUMENT, sampling=SHORT)
            next(kept)
            kept.close()
        else:
            kept = [RequestError, "an error that was caught"]
            with monkeypatch.context() as patch:
                patch.setattr(llm.engine.runner, "run", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    list(llm.stream(DOCUMENT, sampling=SHORT))
            assert llm.generate(DOCUMENT[:5], sampling=SHORT)
        assert kept
        assert [session for session in sessions if session() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("prefill", [None, KEEP_ALL, LAZY], ids=["none", "keep_all", "lazy"])
def test_a_session_begun_in_inference_mode_goes_on_outside_it(prefill):
    model = families.FAMILIES["llama"]()
    with torch.inference_mode():
        llm = LLM(model, prefill=prefill, decode=Lookahead())
        session = llm.session()
        first = llm.generate(DOCUMENT, sampling=SHORT, session=session).token_ids
    text = [*DOCUMENT, *first, 5, 6]
    again = llm.generate(text, sampling=SHORT, session=session)
    assert again.stats.reused_tokens == len(DOCUMENT) + len(first) - 1
    with torch.inference_mode():
        llm.generate([*session.history, 7], sampling=SHORT, session=session)
    if prefill is not LAZY:
        other = LLM(model, prefill=prefill)
        assert again.token_ids == other.generate(text, sampling=SHORT).token_ids
