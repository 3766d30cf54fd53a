"""Drafting changes how fast a text is written, never the text."""

import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BEHAVIOURS,
    PREFILLS,
    FakeDrafter,
    answer,
    check_invariants,
    engine_for,
    finish,
    prompts,
    request_for,
    tiny,
)
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lazyahead.config import Lookahead
from lazyahead.draft.factory import drafter_for
from lazyahead.draft.learned_cost import CPU_BFLOAT16, LearnedRowCost
from lazyahead.engine.engine import Engine
from lazyahead.hf.processors import picker_for
from lazyahead.hf.runner import Runner
from lazyahead.sampling import Picker, Sampling

TEXTS = prompts(40, 33)
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "temperature": {"temperature": 0.5},
    "top_k": {"temperature": 1.2, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.7},
    "no_repeat": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words": tuple((token,) for token in range(2, 60))},
    "logit_bias": {"logit_bias": {7: 5.0, 8: -9.0, 9: 4.0}},
    "min_new_tokens": {"min_new_tokens": 9, "logit_bias": {5: 20.0}},
    "all": {
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
    },
}
EOS = (5, 6)


def write(behaviour, prefill, sampling, known=None, num_tokens=14, family="llama"):
    """Both texts in one batch; with `known` answers, drafted. Ends at EOS."""
    drafter = None if known is None else FakeDrafter(behaviour, known, extra=(0, 5))
    engine = engine_for(family, prefill, drafter)
    requests = [
        request_for(
            engine,
            text,
            num_tokens,
            picker=picker_for(sampling, len(text), EOS),
            accept=lambda token, _: "stop" if token in EOS else None,
        )
        for text in TEXTS
    ]
    finish(engine, requests, lambda: [check_invariants(request.session) for request in requests])
    return requests


@pytest.mark.parametrize("setting", SETTINGS)
def test_whatever_is_drafted_and_however_tokens_are_chosen_the_text_is_the_same(setting):
    sampling = Sampling(seed=11, max_new_tokens=14, **SETTINGS[setting])
    for name in ("none", "calm", "lazy"):
        bare = write(None, PREFILLS[name], sampling)
        known = {tuple(request.prompt): request.answer for request in bare}
        for behaviour in BEHAVIOURS:
            drafted = write(behaviour, PREFILLS[name], sampling, known)
            assert [r.answer for r in drafted] == [r.answer for r in bare], (name, behaviour)
            assert [r.finish_reason for r in drafted] == [r.finish_reason for r in bare]


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "mistral_window"])
def test_it_holds_for_every_way_of_reading(family):
    sampling = Sampling(seed=3, temperature=0.4, max_new_tokens=10)
    for name, prefill in PREFILLS.items():
        bare = write(None, prefill, sampling, num_tokens=10, family=family)
        known = {tuple(request.prompt): request.answer for request in bare}
        for behaviour in ("always", "sometimes"):
            drafted = write(behaviour, prefill, sampling, known, 10, family)
            assert [r.answer for r in drafted] == [r.answer for r in bare], (name, behaviour)


@settings(max_examples=25)
@given(
    st.sampled_from(list(PREFILLS)),
    st.sampled_from(BEHAVIOURS),
    st.sampled_from(list(SETTINGS)),
    st.integers(0, 2**62),
    st.integers(1, 12),
)
def test_it_holds_for_any_seed_and_length(name, behaviour, setting, seed, num_tokens):
    sampling = Sampling(**{"seed": seed, "max_new_tokens": 14, **SETTINGS[setting]})
    bare = write(None, PREFILLS[name], sampling, num_tokens=num_tokens)
    known = {tuple(request.prompt): [*request.answer, 3, 3] for request in bare}
    drafted = write(behaviour, PREFILLS[name], sampling, known, num_tokens)
    assert [r.answer for r in drafted] == [r.answer for r in bare]


def test_a_drafter_that_is_always_right_needs_fewer_steps():
    bare = answer("llama", TEXTS[0], None, num_tokens=40)
    right = answer(
        "llama", TEXTS[0], None, FakeDrafter("always", {tuple(TEXTS[0]): bare.answer}), 40
    )
    wrong = answer(
        "llama", TEXTS[0], None, FakeDrafter("never", {tuple(TEXTS[0]): bare.answer}), 40
    )
    assert right.answer == wrong.answer == bare.answer
    assert bare.stats().num_steps == wrong.stats().num_steps == 39
    assert right.stats().num_steps == 1
    assert right.stats().tokens_per_step == 39


@pytest.mark.parametrize("mode", ["hierarchical", "parallel", "single"])
def test_the_trie_drafter_speeds_up_a_text_that_repeats_itself_and_changes_nothing(mode):
    text = [*TEXTS[0], *TEXTS[0], *TEXTS[0][:9]]
    for name, setting in product(("none", "calm", "lazy"), ("greedy", "top_k", "repetition")):
        sampling = Sampling(seed=1, **SETTINGS[setting])
        bare, drafted = (
            answer(
                "llama",
                text,
                PREFILLS[name],
                drafter_for(Lookahead(mode=mode)) if drafts else None,
                24,
                picker=picker_for(sampling, len(text), ()),
            )
            for drafts in (False, True)
        )
        assert drafted.answer == bare.answer


def test_processors_see_each_prefix_once_in_order_and_never_one_that_was_not_written():
    seen = []

    def processor(ids, scores):
        seen.append(ids[0].tolist())
        return scores

    bare = answer("llama", TEXTS[0], None, num_tokens=12)
    drafter = FakeDrafter("sometimes", {tuple(TEXTS[0]): bare.answer})
    drafted = answer("llama", TEXTS[0], None, drafter, 12, picker=Picker(processor))
    assert drafted.answer == bare.answer
    assert seen == [[*TEXTS[0], *bare.answer[:n]] for n in range(12)]


@pytest.mark.parametrize(
    "processor",
    [
        TemperatureLogitsWarper(0.6),
        TopKLogitsWarper(5),
        TopPLogitsWarper(0.7),
        RepetitionPenaltyLogitsProcessor(1.3),
        NoRepeatNGramLogitsProcessor(2),
        NoBadWordsLogitsProcessor([[9, 10], [11]]),
        SequenceBiasLogitsProcessor({(9, 10): 3.0, (12,): 4.0}),
        MinNewTokensLengthLogitsProcessor(40, 6, [5]),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_processors_of_transformers_themselves(processor):
    picker = Picker(LogitsProcessorList([processor]), True, 5)
    bare = answer("llama", TEXTS[0], None, num_tokens=14, picker=picker)
    for behaviour in BEHAVIOURS:
        drafter = FakeDrafter(behaviour, {tuple(TEXTS[0]): bare.answer})
        assert answer("llama", TEXTS[0], None, drafter, 14, picker=picker).answer == bare.answer


@pytest.mark.parametrize("name", ["none", "calm", "lazy"])
@pytest.mark.parametrize("end", [1, 2, 5, 9])
def test_an_answer_ends_at_the_very_token_that_ends_it_and_the_next_turn_does_not_notice(name, end):
    prefill, turns = PREFILLS[name], []
    bare = answer("llama", TEXTS[0], prefill, num_tokens=12)
    for behaviour in (None, "always", "sometimes"):
        drafter = behaviour and FakeDrafter(behaviour, {tuple(TEXTS[0]): bare.answer})
        engine = engine_for("llama", prefill, drafter)
        request = request_for(
            engine, TEXTS[0], 12, accept=lambda _, r: "stop" if len(r.answer) == end else None
        )
        finish(engine, [request])
        assert request.answer == bare.answer[:end]
        assert request.finish_reason == "stop"
        assert request.session.history == [*TEXTS[0], *bare.answer[:end]]
        turn = request_for(engine, [*request.session.history, *TEXTS[1]], 8, request.session)
        finish(engine, [turn], lambda turn=turn: check_invariants(turn.session))
        turns.append(turn.answer)
    assert turns[0] == turns[1] == turns[2]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7])
def test_the_longest_answer_is_as_long_as_asked(num_tokens):
    bare = answer("llama", TEXTS[0], None, num_tokens=20)
    drafter = FakeDrafter("always", {tuple(TEXTS[0]): bare.answer})
    request = answer("llama", TEXTS[0], None, drafter, num_tokens)
    assert request.answer == bare.answer[:num_tokens]
    assert request.finish_reason == "length"


def test_scores_are_those_of_the_answer_and_of_nothing_else():
    kept = []
    for behaviour in (None, "always", "sometimes"):
        drafter = behaviour and FakeDrafter(behaviour, {tuple(TEXTS[0]): kept[0].answer})
        engine = engine_for("llama", None, drafter)
        request = request_for(
            engine, TEXTS[0], 12, accept=lambda _, r: "stop" if len(r.answer) == 7 else None
        )
        request.scores, request.logits = [], []
        finish(engine, [request])
        kept.append(request)
    for request in kept:
        assert len(request.scores) == len(request.logits) == 7
        assert [int(score.argmax()) for score in request.scores] == kept[0].answer


@pytest.mark.parametrize("name", PREFILLS)
def test_drafts_that_are_right_never_take_more_passes_than_none(name):
    """What a draft row wanted back is known to the pass it begins, so that none is begun in vain
    because of drafts."""
    for text in TEXTS:
        bare = answer("llama", text, PREFILLS[name], num_tokens=30)
        right = answer(
            "llama", text, PREFILLS[name], FakeDrafter("always", {tuple(text): bare.answer}), 30
        )
        assert right.answer == bare.answer
        assert right.stats().num_steps <= bare.stats().num_steps


def test_time_that_goes_to_other_processes_is_no_cost_of_rows():
    learned = LearnedRowCost(CPU_BFLOAT16)
    engine = Engine(Runner(*tiny("llama")), None, Lookahead(), row_cost=learned)
    run = engine.runner.run

    def interrupted(segments, on_layer=None):
        time.sleep(0.3)
        return run(segments, on_layer)

    engine.runner.run = interrupted
    finish(engine, [request_for(engine, TEXTS[0], 4)])
    assert learned.curve(len(TEXTS[0])).seconds(1) < 0.3
