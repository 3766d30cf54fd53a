"""The loop: the same text alone or in company, nobody waits beyond the bound, and a broken pass
breaks nothing."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    LAZY,
    PREFILLS,
    answer,
    check_invariants,
    engine_for,
    fake,
    finish,
    plain_answer,
    prompts,
    request_for,
    tiny,
)

from lazyahead.draft.drafter import NoDrafter
from lazyahead.engine.engine import Engine
from lazyahead.errors import ConfigError
from lazyahead.hf.runner import Runner
from lazyahead.sampling import Picker

FAMILIES = ["llama", "gemma2", "gemma3", "gpt_oss", "mistral_window", "smollm3", "llama4"]
TEXTS = prompts(40, 57, 23)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["none", "keep_all"])
def test_a_prompt_read_whole_gives_the_answer_of_transformers(family, name):
    for text in TEXTS[:2]:
        plain = plain_answer(family, tuple(text), 8)
        assert answer(family, text, PREFILLS[name]).answer == plain
        drafted = answer(
            family, text, PREFILLS[name], fake("sometimes", family, PREFILLS[name], [text])
        )
        assert drafted.answer == plain


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "llama4"])
@pytest.mark.parametrize("name", PREFILLS)
def test_company_changes_no_text(family, name):
    alone = [answer(family, text, PREFILLS[name]).answer for text in TEXTS]
    for stall in (512, 11):
        engine = engine_for(family, PREFILLS[name], stall=stall)
        requests = [request_for(engine, text) for text in TEXTS]
        finish(engine, requests)
        for request in requests:
            check_invariants(request.session)
        assert [request.answer for request in requests] == alone


@settings(
    max_examples=12, suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow]
)
@given(st.data())
def test_requests_that_join_and_leave_between_steps_change_no_text(data):
    name = data.draw(st.sampled_from(list(PREFILLS)))
    texts = prompts(30, 45, 18, 61)
    alone = [answer("llama", text, PREFILLS[name], num_tokens=6).answer for text in texts]
    drafter = fake(
        data.draw(st.sampled_from(["sometimes", "adversarial"])), "llama", PREFILLS[name], texts
    )
    engine = engine_for("llama", PREFILLS[name], drafter, data.draw(st.integers(1, 40)))
    stay = [request_for(engine, text, 6) for text in texts]
    leave = [request_for(engine, text, 50) for text in texts[:2]]
    queue = data.draw(st.permutations([*stay, *leave]))
    rng = random.Random(data.draw(st.integers(0, 999)))
    with engine:
        while queue or any(request.finish_reason is None for request in stay):
            if queue and rng.random() < 0.5:
                engine.submit(queue.pop())
            if rng.random() < 0.1:
                for request in (request for request in leave if request not in queue):
                    engine.cancel(request)
            engine.step()
        for request in leave:
            engine.cancel(request)
    assert [request.answer for request in stay] == alone
    assert engine.is_idle


def test_more_requests_than_may_run_wait_for_their_turn():
    engine = Engine(Runner(*tiny("llama")), None, None, max_running=1)
    requests = [request_for(engine, text, 3) for text in TEXTS]
    finish(engine, requests)
    assert [request.answer for request in requests] == [
        answer("llama", text, num_tokens=3).answer for text in TEXTS
    ]


class Watch(Runner):
    """Counts the rows that prompts have at each layer."""

    def run(self, segments, on_layer=None):
        prompts = [part for part in segments if len(part.logits_indices) < len(part.token_ids)]
        rows = []

        def count(layer):
            rows.append(sum(segment.num_rows for segment in prompts))

        logits = super().run(segments, count)
        self.seen.append(max(rows, default=0) if prompts else 0)
        return logits


@pytest.mark.parametrize("name", ["none", "keep_all", "lazy", "paper"])
@pytest.mark.parametrize("stall", [8, 24])
def test_long_prompts_beside_a_running_answer_hold_it_up_no_longer_than_the_bound(name, stall):
    runner = Watch(*tiny("llama"))
    runner.seen = []
    engine = Engine(runner, PREFILLS[name], None, prefill_chunk_size=stall)
    first = request_for(engine, [5, 6, 7], 200)
    long = [request_for(engine, text, 2) for text in prompts(150, 90)]
    with engine:
        engine.submit(first)
        engine.step()
        for request in long:
            engine.submit(request)
        runner.seen = []
        while any(request.finish_reason is None for request in long):
            known = len(first.answer)
            engine.step()
            assert len(first.answer) == known + 1
        engine.cancel(first)
    queries = 4 if name in ("keep_all", "lazy") else 1
    assert max(runner.seen) <= stall + queries


class BreakError(Exception):
    """Comes from outside."""


@pytest.mark.parametrize("kind", [BreakError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["none", "lazy", "paper"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_pass_that_breaks_off_is_as_if_it_had_never_begun(kind, name, layer):
    prefill = PREFILLS[name]
    drafter = fake("sometimes", "llama", prefill, TEXTS)
    expected = [answer("llama", text, prefill).answer for text in TEXTS]
    engine = engine_for("llama", prefill, drafter, stall=9)
    requests = [request_for(engine, text) for text in TEXTS]
    rng, model = random.Random(layer), tiny("llama")[0]

    def break_(at):
        if at == layer and rng.random() < 0.4:
            raise kind

    with engine:
        for request in requests:
            engine.submit(request)
        while not engine.is_idle:
            try:
                engine.step(break_)
            except kind:
                for request in requests:
                    check_invariants(request.session)
    assert [request.answer for request in requests] == expected
    assert not any(len(module._forward_pre_hooks) for module in model.modules())
    assert model.config._attn_implementation != "lazyahead"


def step_on(engine):
    while True:
        engine.step()


@pytest.mark.parametrize("where", ["accept", "emit", "processor"])
def test_an_exception_of_the_callers_own_leaves_the_others_running(where):
    count = [0]

    def breaks(*_):
        count[0] += 1
        if count[0] == 4:
            raise BreakError

    engine = engine_for("llama", LAZY, fake("always", "llama", LAZY, TEXTS))
    options = (
        {where: breaks}
        if where != "processor"
        else {"picker": Picker(lambda _, scores: breaks() or scores)}
    )
    bad, good = request_for(engine, TEXTS[0], 8, **options), request_for(engine, TEXTS[1], 8)
    with engine:
        engine.submit(bad)
        engine.submit(good)
        with pytest.raises(BreakError):
            step_on(engine)
        engine.cancel(bad)
        check_invariants(bad.session)
        while not engine.is_idle:
            engine.step()
    assert good.answer == answer("llama", TEXTS[1], LAZY).answer
    assert not bad.session.in_use
    follow = request_for(engine, [*bad.session.history, 5, 6], 4, bad.session)
    finish(engine, [follow], lambda: check_invariants(follow.session))
    assert len(follow.answer) == 4


def test_a_cancelled_reading_leaves_the_session_as_it_was():
    engine = engine_for("llama", LAZY, stall=8)
    session = engine.new_session()
    finish(engine, [request_for(engine, TEXTS[0], 5, session)])
    history, held = session.history, [kv.positions.tolist() for kv in session.kv]
    beside, turn = (
        request_for(engine, [4, 5], 99),
        request_for(engine, [*history, *TEXTS[1]], 5, session),
    )
    with engine:
        engine.submit(beside)
        engine.step()
        engine.submit(turn)
        engine.step()
        engine.step()
        assert turn.is_prefilling
        assert len(session) > len(history)
        engine.cancel(turn)
        engine.cancel(beside)
    assert session.history == history
    assert [
        kv.positions.tolist()[: len(old)] for kv, old in zip(session.kv, held, strict=True)
    ] == held
    check_invariants(session)


def test_stepping_with_nothing_to_do_does_nothing():
    engine = engine_for("llama", LAZY)
    with engine:
        engine.step()
    assert engine.is_idle


def test_bounds_below_one_are_refused_by_name():
    with pytest.raises(ConfigError, match="prefill_chunk_size must be"):
        Engine(Runner(*tiny("llama")), None, None, prefill_chunk_size=0)


def test_drafts_never_stand_beyond_the_last_place_the_answer_may_reach():
    """gpt2 has a table of places and would fail."""
    (text,) = prompts(500)
    known = plain_answer("gpt2", tuple(text), 12)
    drafter = fake("always", "gpt2", None, [])
    drafter.answers[tuple(text)] = [*known, *known, *known]
    assert answer("gpt2", text, None, drafter, 12).answer == known


def test_every_number_of_a_request_is_counted():
    request = answer("llama", TEXTS[0], PREFILLS["calm"], NoDrafter(), 6)
    stats = request.stats()
    assert (stats.prompt_tokens, stats.reused_tokens, stats.answer_tokens, stats.num_steps) == (
        40,
        0,
        6,
        5,
    )
    assert stats.tokens_per_step == 1.0
    assert stats.ttft_s > 0
    assert stats.tokens_per_s == pytest.approx(5 / stats.decode_s)
    assert torch.tensor(stats.kept_by_layer).sum() / 160 == pytest.approx(
        stats.prompt_tokens_computed
    )


def test_a_prompt_joins_before_a_long_one_has_been_read() -> None:
    family, (long, short) = "llama", prompts(90, 10)
    alone = [answer(family, text, LAZY).answer for text in (long, short)]
    engine = Engine(Runner(*tiny(family)), LAZY, None, max_prefill_rows=16)
    first, second = request_for(engine, long), request_for(engine, short)
    with engine:
        engine.submit(first)
        engine.step()
        assert len(first.session) == 16
        engine.submit(second)
        engine.step()
        assert (second.num_emitted, first.num_emitted) == (1, 0)
        while not engine.is_idle:
            engine.step()
    assert [first.answer, second.answer] == alone


def test_short_prompts_that_keep_coming_do_not_stop_a_long_one() -> None:
    (long,) = prompts(90)
    engine = Engine(Runner(*tiny("llama")), None, None, max_prefill_rows=16)
    first = request_for(engine, long)
    with engine:
        engine.submit(first)
        num_steps = 0
        while first.num_emitted == 0:
            engine.submit(request_for(engine, prompts(16, seed=num_steps)[0], 1))
            engine.step()
            num_steps += 1
        assert num_steps <= 4 * 6


def test_requests_wait_while_those_that_run_may_hold_too_many_tokens() -> None:
    texts = prompts(20, 20, 70, 10)
    engine = Engine(Runner(*tiny("llama")), LAZY, None, max_running_tokens=60)
    requests = [request_for(engine, text, 6) for text in texts]
    held: list[list[int]] = []

    def note() -> None:
        running = [
            request for request in requests if request.admitted and not request.finish_reason
        ]
        held.append([request.max_tokens for request in running])

    finish(engine, requests, note)
    assert all(sum(tokens) <= 60 or len(tokens) == 1 for tokens in held)
    assert max(map(len, held)) == 2
    assert [request.answer for request in requests] == [
        answer("llama", text, LAZY, num_tokens=6).answer for text in texts
    ]
    with pytest.raises(ConfigError, match="max_running_tokens"):
        Engine(Runner(*tiny("llama")), LAZY, None, max_running_tokens=0)
