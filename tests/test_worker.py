"""The thread that steps an engine: answers as the library gives them, whoever asks and however they
read."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import answer_of, engine_of, tiny_llm, wait_for
from support import CALM, LAZY, prompts

from lazyahead import LLM, Sampling
from lazyahead.engine.worker import Worker, WorkerDeadError
from lazyahead.errors import ConfigError, LazyAheadError

SHORT = Sampling(max_new_tokens=8, ignore_eos=True)
LONG = Sampling(max_new_tokens=100, ignore_eos=True)
PROMPTS = prompts(40, 60, 25, 33)


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture
def worker(llm):
    with Worker(engine_of(llm), max_pieces=4) as worker:
        yield worker


def tokens(taken):
    return tuple(token for piece, _ in taken for token in piece.token_ids)


def submit(worker, llm, ids, sampling=SHORT, **manner):
    return worker.submit(answer_of(llm, worker.engine, ids, sampling, **manner))


def test_answers_asked_for_in_many_threads_are_those_of_the_library(llm, worker):
    def ask(ids):
        return tokens(submit(worker, llm, ids))

    with ThreadPoolExecutor(4) as threads:
        given = list(threads.map(ask, PROMPTS * 3))
    assert given == [llm.generate(ids, sampling=SHORT).token_ids for ids in PROMPTS] * 3


def test_event_loops_read_side_by_side(llm, worker):
    async def read(ids):
        return tokens([taken async for taken in submit(worker, llm, ids)])

    async def all_of_them():
        return await asyncio.gather(*map(read, PROMPTS))

    expected = [llm.generate(ids, sampling=SHORT).token_ids for ids in PROMPTS]
    assert asyncio.run(all_of_them()) == expected


def test_requests_may_be_read_each_in_their_own_way(llm, worker):
    ways = [LAZY, CALM, None, LAZY]
    jobs = [submit(worker, llm, ids, prefill=way) for ids, way in zip(PROMPTS, ways, strict=True)]
    given = [tokens(job) for job in jobs]
    own = [LLM(llm.model, tokenizer=llm.tokenizer, prefill=way) for way in ways]
    assert given == [
        one.generate(ids, sampling=SHORT).token_ids for one, ids in zip(own, PROMPTS, strict=True)
    ]


def test_who_does_not_read_is_paused_and_delays_nobody(llm, worker):
    slow = submit(worker, llm, PROMPTS[0], LONG)
    wait_for(lambda: slow.answer.request.is_paused)
    num = slow.answer.request.num_emitted
    assert len(slow._pieces) == worker.max_pieces
    for ids in PROMPTS:
        assert tokens(submit(worker, llm, ids)) == llm.generate(ids, sampling=SHORT).token_ids
    assert slow.answer.request.num_emitted == num, "it went on while it was paused"
    assert tokens(slow) == llm.generate(PROMPTS[0], sampling=LONG).token_ids


def test_paused_requests_take_no_place_of_those_that_run(llm):
    with Worker(engine_of(llm, max_running=1), max_pieces=2) as worker:
        slow = [submit(worker, llm, ids, LONG) for ids in PROMPTS[:3]]
        wait_for(lambda: all(job.answer.request.is_paused for job in slow))
        assert len(tokens(submit(worker, llm, PROMPTS[3]))) == 8
        assert [len(tokens(job)) for job in slow] == [100] * 3


def test_cancelling_ends_one_answer_and_no_other(llm, worker):
    cancelled, other = (submit(worker, llm, ids, LONG) for ids in PROMPTS[:2])
    cancelled.wait()
    threading.Thread(target=cancelled.cancel).start()
    num = len(tokens(cancelled))
    assert 0 < num < 100
    assert cancelled.answer.request.finish_reason == "cancelled"
    assert not cancelled.answer.request.session.in_use
    assert tokens(other) == llm.generate(PROMPTS[1], sampling=LONG).token_ids


def test_a_prefill_that_nobody_waits_for_is_broken_off(llm, worker):
    reached = threading.Event()
    job = None

    def cancel_at(layer):
        original(layer)
        if layer == 1 and job is not None:
            job.cancel()
            reached.set()

    original, worker._on_layer = worker._on_layer, cancel_at
    job = submit(worker, llm, PROMPTS[1])
    assert reached.wait(30)
    assert tokens(job) == ()
    assert len(job.answer.request.session) == 0
    worker._on_layer = original
    assert len(tokens(submit(worker, llm, PROMPTS[1]))) == 8


def test_progress_rises_while_a_prompt_is_read(llm, worker):
    seen = []

    def note(layer):
        original(layer)
        seen.append(job.progress)

    original, worker._on_layer = worker._on_layer, note
    job = worker.submit(answer := answer_of(llm, worker.engine, PROMPTS[1], SHORT))
    assert len(tokens(job)) == 8
    assert answer.request.progress == job.progress == 1
    assert seen[:2] == sorted(seen[:2])


def test_a_failing_pass_ends_its_requests_and_the_worker_goes_on(llm, worker, monkeypatch):
    run, is_first = worker.engine.runner.run, [True]

    def fail_once(*arguments):
        if is_first.pop() if is_first else False:
            raise LazyAheadError("no luck")
        return run(*arguments)

    monkeypatch.setattr(worker.engine.runner, "run", fail_once)
    job = submit(worker, llm, PROMPTS[0])
    with pytest.raises(LazyAheadError, match="no luck"):
        list(job)
    assert not job.answer.request.session.in_use
    assert worker.is_alive
    assert len(tokens(submit(worker, llm, PROMPTS[0]))) == 8


@pytest.mark.filterwarnings("default")
def test_a_worker_that_fails_tells_everybody(llm, monkeypatch):
    deaths = []
    worker = Worker(engine_of(llm), on_death=deaths.append)

    def fail():
        raise RuntimeError("broken")

    with worker:
        running = submit(worker, llm, PROMPTS[0], LONG)
        running.wait()
        monkeypatch.setattr(worker, "_drop_cancelled", fail)
        with pytest.raises(WorkerDeadError, match="RuntimeError: broken"):
            list(running)
        wait_for(lambda: bool(deaths))
        assert not worker.is_alive
        assert str(deaths[0]) == "broken"
        with pytest.raises(WorkerDeadError):
            submit(worker, llm, PROMPTS[0])


def test_closing_ends_what_runs_and_what_waits(llm):
    worker = Worker(engine_of(llm, max_running=1))
    worker.start()
    jobs = [submit(worker, llm, ids, LONG) for ids in PROMPTS]
    jobs[0].wait()
    worker.close()
    for job in jobs:
        with pytest.raises(WorkerDeadError, match="shutting down"):
            list(job)
        assert not job.answer.request.session.in_use
    assert worker.engine.is_idle


def test_an_idle_worker_leaves_the_model_as_it_was(llm, worker):
    before = [hook for module in llm.model.modules() for hook in module._forward_pre_hooks]
    list(submit(worker, llm, PROMPTS[0]))
    wait_for(
        lambda: (
            before == [hook for module in llm.model.modules() for hook in module._forward_pre_hooks]
        )
    )


def test_a_bound_below_one_is_refused(llm):
    with pytest.raises(ConfigError, match="max_pieces must be at least 1, got 0"):
        Worker(engine_of(llm), max_pieces=0)
