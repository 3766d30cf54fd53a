"""Conversations: what is shared is not read again, what is cut is gone, and what is on disk is
whole and one's own."""

import json
from dataclasses import replace

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import (
    CALM,
    KEEP_ALL,
    LAZY,
    PREFILLS,
    ByHand,
    check_invariants,
    engine_for,
    finish,
    prompts,
    request_for,
    tiny,
)

from lazyahead import LLM, LazyPrefill, Lookahead, Sampling
from lazyahead.cache.session_file import load_session, save_session
from lazyahead.config import PRESETS
from lazyahead.errors import ConfigError, RequestError, SessionFileError

DOCUMENT, FIRST, SECOND = prompts(60, 7, 9)
SHORT = Sampling(max_new_tokens=8)


def llm(prefill=KEEP_ALL, decode=None, family="llama", **options):
    return LLM(tiny(family)[0], prefill=prefill, decode=decode, **options)


def ask(model, text, session=None, sampling=SHORT):
    """The last piece of a stream: its statistics are those of the whole."""
    pieces = list(model.stream(text, sampling=sampling, session=session))
    return [token for piece in pieces for token in piece.token_ids], pieces[-1].stats


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("prefill", [None, KEEP_ALL], ids=["none", "keep_all"])
def test_a_second_question_reads_only_what_is_new_and_gets_the_same_answer(family, prefill):
    model = llm(prefill, family=family)
    session = model.session()
    ask(model, [*DOCUMENT, *FIRST], session)
    again, stats = ask(model, [*DOCUMENT, *SECOND], session)
    fresh, _ = ask(model, [*DOCUMENT, *SECOND])
    assert again == fresh
    assert stats.reused_tokens == len(DOCUMENT)
    assert stats.prompt_tokens == len(DOCUMENT) + len(SECOND)


@pytest.mark.parametrize("name", ["lazy", "calm", "paper", "static_prune"])
def test_a_second_question_brings_back_what_the_first_left_and_loses_nothing(name):
    model = llm(PREFILLS[name])
    session = model.session()
    ask(model, [*DOCUMENT, *FIRST], session)
    _, stats = ask(model, [*DOCUMENT, *SECOND], session)
    check_invariants(session)
    assert stats.reused_tokens == len(DOCUMENT)
    assert (stats.revived > 0) == (name != "static_prune")


def test_a_prompt_that_goes_on_from_the_whole_text_reads_on_from_there():
    model = llm()
    session = model.session()
    first, _ = ask(model, DOCUMENT, session)
    text = [*DOCUMENT, *first, *SECOND]
    again, stats = ask(model, text, session)
    assert again == ask(model, text)[0]
    assert (
        stats.reused_tokens == len(DOCUMENT) + len(first) - 1
    )  # no pass has seen the last token of the answer


def test_the_same_prompt_again_reads_one_token_and_gives_the_same_answer():
    model = llm()
    session = model.session()
    first, _ = ask(model, DOCUMENT, session)
    again, stats = ask(model, DOCUMENT, session)
    assert again == first
    assert stats.reused_tokens == len(DOCUMENT) - 1


def test_a_text_that_shares_nothing_starts_anew():
    model = llm(LAZY)
    session = model.session()
    ask(model, DOCUMENT, session)
    other = [DOCUMENT[0] + 1, *SECOND * 4]
    again, stats = ask(model, other, session)
    assert again == ask(model, other)[0]
    assert stats.reused_tokens == 0
    check_invariants(session)


@pytest.mark.parametrize("name", ["lazy", "random_drop"])
@pytest.mark.parametrize("num_tokens", [0, 1, 30, 59, 60, 64, 500])
def test_what_is_cut_is_gone_and_the_rest_is_untouched(num_tokens, name):
    model = llm(PREFILLS[name])
    session = model.session()
    ask(model, DOCUMENT, session)
    text = session.token_ids
    session.crop(num_tokens)
    check_invariants(session)
    assert session.token_ids == text[:num_tokens]
    assert len(session.prefill_lens) == 4
    reach = model.reach(session)
    assert all(
        shallow <= deep for shallow, deep in zip(reach.prefill_depth, reach.depth, strict=True)
    )


def test_how_deep_tokens_got_is_known_at_every_moment():
    model = llm(LAZY)
    session = model.session()
    assert model.reach(session).depth == ()
    ask(model, DOCUMENT, session)
    reach = model.reach(session)
    assert len(reach.token_ids) == len(reach.depth) == len(DOCUMENT)
    assert sum(reach.depth) == sum(session.kept_by_layer)
    assert sum(reach.depth) - sum(reach.prefill_depth) >= 0
    assert len(reach.answer_ids) == 8


def test_a_session_answers_one_question_at_a_time():
    model = llm(LAZY)
    session = model.session()
    running = model.stream(DOCUMENT, sampling=SHORT, session=session)
    next(running)
    with pytest.raises(RequestError, match="another answer is running"):
        ask(model, SECOND, session)
    with pytest.raises(SessionFileError, match="answering"):
        model.save_session(session, "nowhere")
    running.close()
    assert not session.in_use
    assert len(ask(model, [*DOCUMENT, *SECOND], session)[0]) == 8


@pytest.mark.parametrize("name", ["keep_all", "lazy"])
def test_a_stream_that_is_left_early_leaves_a_usable_session(name):
    model = llm(PREFILLS[name], Lookahead())
    session = model.session()
    stream = model.stream(DOCUMENT, sampling=SHORT, session=session)
    emitted = [*next(stream).token_ids, *next(stream).token_ids]
    stream.close()
    check_invariants(session)
    assert session.history == [*DOCUMENT, *emitted]
    assert model.engine.is_idle
    again, stats = ask(model, [*session.history, *SECOND], session)
    assert stats.reused_tokens == len(DOCUMENT) + len(emitted) - 1
    if name == "keep_all":
        assert again == ask(model, [*DOCUMENT, *emitted, *SECOND])[0]


def test_streams_that_take_turns_do_not_disturb_each_other():
    model = llm(LAZY, Lookahead(), prefill_chunk_size=7)
    texts = prompts(40, 50, 30)
    alone = [ask(model, text)[0] for text in texts]
    streams = [model.stream(text, sampling=SHORT) for text in texts]
    emitted = [[] for _ in texts]
    while streams_left := [i for i in range(3) if streams[i] is not None]:
        for i in streams_left:
            piece = next(streams[i], None)
            if piece is None:
                streams[i] = None
            else:
                emitted[i] += piece.token_ids
    assert emitted == alone
    assert [completion.token_ids for completion in model.generate(texts, sampling=SHORT)] == [
        tuple(t) for t in alone
    ]


# --- on disk --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = llm(LAZY)
    session = model.session()
    ask(model, DOCUMENT, session)
    model.save_session(session, tmp_path / "session")
    return model, session, tmp_path / "session"


@pytest.mark.parametrize("name", ["none", "keep_all", "lazy", "paper", "random_drop"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4"])
def test_a_session_read_back_goes_on_as_the_one_in_memory(tmp_path, name, family):
    model = llm(PREFILLS[name], family=family)
    session = model.session()
    ask(model, DOCUMENT, session)
    model.save_session(session, tmp_path / "a")
    again = model.load_session(tmp_path / "a")
    check_invariants(again)
    assert again.history == session.history
    assert again.kept_by_layer == session.kept_by_layer
    assert model.reach(again) == model.reach(session)
    text = [*session.history, *SECOND]
    assert ask(model, text, again)[0] == ask(model, text, session)[0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_read_back_is_revived_as_by_hand(tmp_path):
    engine, model = engine_for("llama", LAZY), tiny("llama")[0]
    session, hand = engine.new_session(), ByHand("llama")
    finish(engine, [request_for(engine, DOCUMENT, 5, session)], lambda: hand.follow(session))
    save_session(session, tmp_path / "a", model, LAZY)
    again = load_session(tmp_path / "a", model, LAZY, engine.new_session())
    before = again.num_revived
    finish(
        engine,
        [request_for(engine, [*again.history, *SECOND], 9, again)],
        lambda: hand.follow(again),
    )
    assert again.num_revived > before
    assert hand.num_checked == sum(len(kv) for kv in again.kv)


def test_a_model_with_a_state_of_its_own_starts_anew_after_a_pass_that_broke_off(monkeypatch):
    inner = families.build(
        "mamba", state_size=8, hidden_size=32, num_attention_heads=..., head_dim=...
    )
    model = LLM(inner, prefill=None)
    session = model.session()
    first = ask(model, DOCUMENT, session)[0]
    stream = model.stream([*DOCUMENT, *first, *SECOND], sampling=SHORT, session=session)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(inner), "forward", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert not session.in_use
    assert ask(model, DOCUMENT, session)[0] == first


def test_a_session_of_another_model_or_schedule_is_refused(saved):
    _, _, path = saved
    with pytest.raises(SessionFileError, match="another model"):
        llm(LAZY, family="gemma2").load_session(path)
    other = families.FAMILIES["llama"]()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.5)
    with pytest.raises(SessionFileError, match="another model"):
        LLM(other, prefill=LAZY).load_session(path)
    with pytest.raises(SessionFileError, match="another schedule"):
        llm(CALM).load_session(path)
    with pytest.raises(SessionFileError, match="another schedule"):
        llm(None).load_session(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(saved, share):
    model, _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SessionFileError, match="damaged"):
        model.load_session(path)


def test_what_is_no_session_is_refused(saved, tmp_path):
    model = saved[0]
    (tmp_path / "text").write_text("hello, this is some text and no session at all")
    save_file({"a": torch.zeros(3)}, tmp_path / "tensors")
    for name, message in (
        ("text", "damaged"),
        ("tensors", "no lazyahead session"),
        ("none", "no session at"),
    ):
        with pytest.raises(SessionFileError, match=message):
            model.load_session(tmp_path / name)
    with pytest.raises(SessionFileError):
        model.load_session(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", "null"),
        ("token_ids", "[1, 2]"),
        ("pending", "{"),
        ("prompt_len", "x"),
        ("complex_tables", "3"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(saved, field, value):
    model, _, path = saved
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, {**header, field: value})
    with pytest.raises(SessionFileError, match="damaged"):
        model.load_session(path)


@pytest.mark.parametrize("name", ["kv.3.keys", "kv.0.positions", "stash"])
def test_a_missing_part_is_refused(saved, name):
    model, _, path = saved
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors[next(part for part in tensors if part.startswith(name))]
    save_file(tensors, path, header)
    with pytest.raises(SessionFileError, match="damaged"):
        model.load_session(path)


def test_nothing_half_written_is_left_and_the_old_file_stays(saved, monkeypatch):
    model, session, path = saved
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lazyahead.cache.session_file.os.replace", full)
        with pytest.raises(SessionFileError, match="No space left"):
            model.save_session(session, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(SessionFileError, match="cannot write"):
        model.save_session(session, path.parent / "no" / "such" / "folder")
    with pytest.raises(SessionFileError, match="holds nothing"):
        model.save_session(model.session(), path)


# --- settings that name tokens --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"logit_bias": {101: 1.0}}, {"bad_words": ((3, 4000),)}])
def test_tokens_that_do_not_exist_are_refused_before_they_can_break_a_common_pass(options):
    with pytest.raises(RequestError, match="below 101"):
        ask(llm(), DOCUMENT, sampling=Sampling(max_new_tokens=3, **options))


# --- profiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PRESETS, "lazy"])
def test_a_profile_read_back_is_the_config_that_was_saved(tmp_path, name):
    config = PRESETS.get(name, LAZY)
    config.save(tmp_path / "profile.toml")
    assert LazyPrefill.load(tmp_path / "profile.toml") == config
    assert LazyPrefill.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prefill]\nschedule = [[0.5, 0.5]]\nkeep = 3", "keep"),
        ("[prefill]\nschedule = [[0.5, 1.5]]", "1.5"),
        ("[prefill]\nschedule = [[0.5]]", "not a LazyPrefill profile"),
        ("[prefill]\nrevive_limit = 3", "schedule"),
        ('[prefill]\nschedule = [[0.5, 0.5]]\nscorer = "window"', "scorer"),
        ('[prefill]\nschedule = [[0.5, 0.5]]\nscorer = {name = "oracle"}', "oracle"),
        ('[prefill]\nschedule = [[0.5, 0.5]]\nscorer = {name = "window", width = 3}', "width"),
        ("schedule = [[", "not a profile"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(tmp_path, text, message):
    (tmp_path / "profile.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        LazyPrefill.load(tmp_path / "profile.toml")


def test_a_missing_profile_names_the_presets(tmp_path):
    with pytest.raises(ConfigError, match="balanced"):
        LazyPrefill.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is not a profile"):
        LazyPrefill.load(tmp_path)
    assert replace(LazyPrefill.preset("fast"), min_tokens=0).min_tokens == 0
