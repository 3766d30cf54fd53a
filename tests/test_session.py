"""Conversations: what is shared is not read again, what is cut is gone, and what is on disk is
whole and one's own."""

import json
from dataclasses import replace

import families
import pytest
from support import (
    KEEP_ALL,
    LAZY,
    PREFILLS,
    check_invariants,
    prompts,
    tiny,
)

from lazyahead import LLM, LazyPrefill, Lookahead, Sampling
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
