"""A decode step that is recorded once and replayed gives the tokens of steps that run as written.

There is no GPU here: a step is recorded by torch.fx, as the list of operations that ran, so that
what depends on Python alone is as frozen as in a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from support import (
    PREFILLS,
    FakeDrafter,
    engine_for,
    finish,
    plain_answer,
    prompts,
    request_for,
    tiny,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lazyahead.engine.engine import Engine, Request
from lazyahead.errors import ConfigError
from lazyahead.hf.graphs import MOST_RECORDED, DecodeGraphs, graphs_of
from lazyahead.hf.segment import Segment

NUM_TOKENS = 14
SKIPPED = {
    "mixtral": "its experts are found by asking the device",
    "qwen3_moe": "its experts are found by asking the device",
    "gpt_oss": "its experts are found by asking the device",
    "llama4": "its queries are scaled by position",
    "gpt2": "it looks at the values of its positions",
}


class Recorder:
    """Counts what is recorded and replayed."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded = make_fx(run)()
        self.num_recorded += 1

        def replay() -> Tensor:
            self.num_replayed += 1
            return recorded()

        return replay


def recording(engine: Engine) -> Recorder:
    """Lets the engine record its decode steps."""
    recorder = Recorder()
    engine.runner._graphs = DecodeGraphs(recorder)  # type: ignore[union-attr]
    return recorder


def written(engine: Engine, texts: Sequence[list[int]], turns: int = 1) -> list[list[int]]:
    """The answers to texts, one after the other, each in as many turns of a session."""
    answers = []
    for text in texts:
        session, history = engine.new_session(), list(text)
        for _ in range(turns):
            request: Request = request_for(engine, history, NUM_TOKENS, session)
            finish(engine, [request])
            answers.append(list(request.answer))
            history = [*session.history, *text[:5]]
    return answers


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SKIPPED])
def test_every_family_writes_what_transformers_writes(family: str) -> None:
    (text,) = prompts(40)
    engine = engine_for(family)
    recorder = recording(engine)
    assert written(engine, [text]) == [plain_answer(family, tuple(text), NUM_TOKENS)]
    assert recorder.num_recorded == 1
    assert recorder.num_replayed == NUM_TOKENS - 3, "the first token, then one plain step, one kept"


@pytest.mark.parametrize("behaviour", [None, "sometimes", "adversarial"])
@pytest.mark.parametrize("prefill", ["none", "calm", "local"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drafts_revivals_and_turns_are_as_without(
    family: str, prefill: str, behaviour: str | None
) -> None:
    texts, known = prompts(40), {}
    plain = engine_for(family, PREFILLS[prefill])
    expected = written(plain, texts, turns=2)
    drafter = None
    if behaviour is not None:
        for text, answer in zip(texts, expected[::2], strict=True):
            known[tuple(text)] = answer
        drafter = FakeDrafter(behaviour, known, extra=(0, 5))
    engine = engine_for(family, PREFILLS[prefill], drafter)
    recorder = recording(engine)
    assert written(engine, texts, turns=2) == expected
    if prefill in ("none", "calm"):
        assert recorder.num_replayed


@pytest.mark.parametrize("is_recorded", [True, False])
def test_drafts_of_a_lone_request_fit_a_recorded_step(
    is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = prompts(40)
    plain = engine_for("llama")
    alone = request_for(plain, text, 40)
    finish(plain, [alone])
    engine = engine_for("llama", None, FakeDrafter("always", {tuple(text): list(alone.answer)}))
    if is_recorded:
        recording(engine)
    run, rows = engine.runner.run, []

    def counted(segments: Sequence[Segment], *args: Any) -> Tensor:
        rows.extend(segment.num_rows for segment in segments if segment.num_drafts)
        return run(segments, *args)

    monkeypatch.setattr(engine.runner, "run", counted)
    drafted = request_for(engine, text, 40)
    finish(engine, [drafted])
    assert drafted.answer == alone.answer
    assert max(rows) == (MOST_RECORDED if is_recorded else 39)


def test_a_long_answer_is_recorded_again_where_its_buffers_have_grown() -> None:
    (text,) = prompts(11)
    engine = engine_for("llama")
    request = request_for(engine, text, 300)
    finish(engine, [request])
    known = {tuple(text): list(request.answer)}
    drafted = engine_for("llama", None, FakeDrafter("always", known))
    recording(drafted)
    again = request_for(drafted, text, 300)
    finish(drafted, [again])
    assert again.answer == request.answer
    engine = engine_for("llama")
    recorder = recording(engine)
    alone = request_for(engine, text, 300)
    finish(engine, [alone])
    assert alone.answer == request.answer
    assert recorder.num_recorded == 2
    assert recorder.num_replayed > 290


def test_requests_that_share_passes_and_part_again_are_as_alone() -> None:
    texts = prompts(40, 33)
    expected = written(engine_for("llama"), texts)
    engine = engine_for("llama")
    recorder = recording(engine)
    first, second = (request_for(engine, text, NUM_TOKENS) for text in texts)
    with engine:
        engine.submit(first)
        for _ in range(5):
            engine.step()
        engine.submit(second)
        while not engine.is_idle:
            engine.step()
    assert [list(first.answer), list(second.answer)] == expected
    assert recorder.num_replayed


def test_what_cannot_be_recorded_runs_as_written() -> None:
    def refuse(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    texts = prompts(40, 33)
    engine = engine_for("llama")
    engine.runner._graphs = DecodeGraphs(refuse)  # type: ignore[union-attr]
    assert written(engine, texts) == written(engine_for("llama"), texts)


def test_a_conversation_that_revives_tokens_at_every_step_replays_no_more() -> None:
    (text,) = prompts(60)
    engine = engine_for("llama", replace(PREFILLS["lazy"], revive_threshold=0.0, revive_limit=1))
    recorder = recording(engine)
    request = request_for(engine, text, 30)
    finish(engine, [request])
    assert request.session.num_revived
    assert recorder.num_replayed + recorder.num_recorded <= 6


def test_graphs_are_for_gpus_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny("llama")[1]
    assert graphs_of(spec, has_tuned=False) is None, "the CPU records none"
    monkeypatch.setenv("LAZYAHEAD_CUDA_GRAPHS", "yes")
    with pytest.raises(ConfigError, match="LAZYAHEAD_CUDA_GRAPHS is 0 or 1, got 'yes'"):
        graphs_of(spec, has_tuned=False)


def test_a_recorded_step_reads_nothing_back_from_the_device() -> None:
    """Else a CUDA graph could not hold it. torch.fx refuses such a step by an error."""
    with pytest.raises(RuntimeError):
        make_fx(lambda: torch.ones(2) * bool(torch.zeros(()).any()))()
