"""What holds for every session whatever happens to it: nothing computed twice, nothing lost, every
key as by hand."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    BEHAVIOURS,
    LAZY,
    PREFILLS,
    ByHand,
    FakeDrafter,
    answer,
    check_invariants,
    engine_for,
    fake,
    finish,
    prompts,
    request_for,
)

from lazyahead.config import LazyPrefill
from lazyahead.prefill.score import LastToken, Random, Window

FAMILIES = ["llama", "gemma2", "gemma3", "smollm3", "mistral_window"]
few = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def configs(draw):
    """Any schedule, scorer and rule of revival that means something."""
    depths = sorted(
        draw(st.sets(st.sampled_from([0.25, 0.3, 0.5, 0.6, 0.75, 0.9]), min_size=1, max_size=3))
    )
    ratios = sorted(
        draw(st.lists(st.floats(0.05, 1.0), min_size=len(depths), max_size=len(depths))),
        reverse=True,
    )
    scorer = draw(
        st.sampled_from(
            [
                LastToken(),
                Window(4, 3),
                Window(1, 1),
                Window(9, 5),
                Random(3),
            ]
        )
    )
    revive = (
        "never"
        if scorer.window_size == 0
        else draw(st.sampled_from(["demand", "percentile", "never"]))
    )
    if scorer.window_size == 0 and draw(st.booleans()):
        depths[0] = 0.0
    return LazyPrefill(
        schedule=tuple(zip(depths, ratios, strict=True)),
        scorer=scorer,
        revive=revive,
        revive_threshold=draw(st.sampled_from([0.0, 0.05, 0.3, 0.9])),
        revive_limit=draw(st.integers(0, 20)),
        local_window=draw(st.sampled_from([0, 0, 6, 15])),
        local_from=draw(st.sampled_from([0.0, 0.3, 0.6])),
        local_full_rows=draw(st.integers(0, 9)),
        protect_first=draw(st.integers(0, 5)),
        protect_last=draw(st.integers(0, 9)),
        min_tokens=draw(st.sampled_from([0, 0, 15])),
    )


class Life:
    """One session through turns, drafts, parts and cuts, checked after every pass."""

    def __init__(self, family, config, behaviour, stall, seed):
        self.engine = engine_for(family, config, FakeDrafter(behaviour, seed=seed), stall)
        self.rng, self.stall = random.Random(seed), stall
        self.session, self.hand = self.engine.new_session(), ByHand(family)

    def check(self):
        check_invariants(self.session)
        if len(self.session):
            self.hand.follow(self.session)

    def turn(self, num_new, num_tokens):
        """Some more text and an answer to it; beside another answer, so that reading goes in parts."""
        text = [*self.session.history, *(self.rng.randrange(2, 98) for _ in range(num_new))]
        beside = request_for(self.engine, [7, 8, 9], 10**6)
        with self.engine:
            if self.stall < 100:
                self.engine.submit(beside)
                self.engine.step()
            request = request_for(self.engine, text, num_tokens, self.session)
            if request.prefill.prunes:
                self.hand.uses_local_window(self.session, self.engine.prefill, len(text))
            self.engine.submit(request)
            while request.finish_reason is None:
                self.engine.step()
                self.check()
            self.engine.cancel(beside)
        assert len(request.answer) == num_tokens

    def crop(self, num_tokens):
        self.session.crop(num_tokens)
        self.hand.forget(num_tokens)
        self.check()


@few
@given(
    st.sampled_from(FAMILIES),
    configs(),
    st.sampled_from(BEHAVIOURS),
    st.sampled_from([5, 16, 512]),
    st.integers(0, 99),
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 7), st.integers(0, 100)),
        min_size=1,
        max_size=3,
    ),
)
def test_every_key_of_a_session_is_computed_once_and_as_by_hand(
    family, config, behaviour, stall, seed, turns
):
    life = Life(family, config, behaviour, stall, seed)
    for num_new, num_tokens, cut in turns:
        life.turn(num_new, num_tokens)
        if cut < 40:
            life.crop(len(life.session) * cut // 40)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lazy", "paper"])
def test_revived_keys_are_those_of_a_full_computation_from_the_stash(family, name):
    life = Life(family, replace(PREFILLS[name], revive_threshold=0.0), "sometimes", 512, 1)
    life.turn(40, 12)
    assert life.session.num_revived > 0
    assert life.hand.num_checked == sum(len(kv) for kv in life.session.kv)


def test_after_a_prefill_deeper_layers_hold_fewer_tokens_and_the_schedule_says_how_many():
    engine = engine_for("llama", LAZY)
    request = request_for(engine, list(range(2, 42)), 1)
    finish(engine, [request], lambda: check_invariants(request.session))
    assert request.session.kept_by_layer == (40, 20, 12, 12)
    assert request.stats().prompt_tokens_computed == pytest.approx(84 / 160)


def test_a_question_is_never_deferred_and_the_last_token_always_goes_on():
    config = LazyPrefill(
        ((0.25, 0.01),), LastToken(), revive="never", protect_first=2, protect_last=0, min_tokens=0
    )
    engine = engine_for("llama", config)
    request = request_for(engine, list(range(2, 42)), 1, question=(10, 15))
    finish(engine, [request])
    assert sorted(request.session.kv[3].positions.tolist()) == [0, 1, *range(10, 15), 39]


def test_tokens_that_score_alike_are_chosen_by_place_whatever_shares_the_pass():
    """gemma3's window gives most tokens a score of exactly 0, so ties decide."""
    paper = LazyPrefill.paper()
    (prompt,) = prompts(40)
    held = []
    for behaviour in ("never", "always"):
        request = answer(
            "gemma3", prompt, paper, fake(behaviour, "gemma3", paper, [prompt], num_tokens=16), 16
        )
        held.append([sorted(kv.positions.tolist()) for kv in request.session.kv])
    assert held[0] == held[1]
