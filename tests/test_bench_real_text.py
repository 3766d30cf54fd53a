"""`lazyahead bench quality --data`: its contract, what its measures mean, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model

from lazyahead import LLM, LazyPrefill
from lazyahead.bench import methods
from lazyahead.bench.data.encode import encode_sample
from lazyahead.bench.data.sample import Sample
from lazyahead.bench.kept import (
    LEAST_GAIN,
    Likelihood,
    kept_interval,
    measure_likelihood,
)
from lazyahead.bench.methods import Method, methods_at_equal_seconds
from lazyahead.bench.real_text import agreement, by_category, fitting_length, measure_real_text
from lazyahead.cli import run
from lazyahead.errors import ConfigError, RequestError
from lazyahead.reader import samples
from lazyahead.text import Prompt

COMMON = {"lazyahead", "machine", "model", "config", "seed", "runs"}
CONTRACT = {
    *("category", "method", "prefill", "num", "score", "score_low", "score_high", "relative"),
    *("kept", "kept_low", "kept_high", "num_kept", "agreement", "ttft_speedup"),
    "prompt_tokens_computed",
}
NOTHING_READ = LazyPrefill(min_tokens=0, schedule=((0.3, 0.02),), revive="never")


def page_samples(category: str, count: int) -> list[Sample]:
    """Samples of the built-in reader's world, as a user's file has them."""
    return [
        Sample(
            dataset=category,
            category=category,
            prompt=f"{one.document}\n\n{one.question}",
            answers=(one.answer,),
            max_new_tokens=8,
            question=one.question,
        )
        for one in samples(category, 512, n=count)
    ]


@pytest.fixture(scope="module")
def reader() -> LLM:
    return LLM(prefill=None, dtype="float32")


@pytest.fixture(scope="module")
def rows(reader: LLM) -> list[Any]:
    keep_all = LazyPrefill(min_tokens=0, schedule=((0.3, 1.0), (0.6, 1.0)))
    methods = [Method("lazy", "keep_all", keep_all), Method("lazy", "nothing", NOTHING_READ)]
    work = {name: page_samples(name, 2) for name in ("single_doc_qa", "few_shot")}
    return measure_real_text(
        reader, methods, work, length=600, max_new_tokens=8, num_timed=1, seed=3
    )


def test_there_is_a_row_for_each_category_and_way_and_for_all(rows: list[Any]) -> None:
    ways = ("off", "keep_all", "nothing")
    assert [(row.category, row.prefill) for row in rows] == [
        (category, way) for category in ("single_doc_qa", "few_shot", "all") for way in ways
    ]
    assert [row.num for row in rows[::3]] == [2, 2, 4]
    assert [row.num_timed for row in rows[::3]] == [1, 1, 2]
    assert all(row.ttft_speedup > 0 for row in rows)
    assert all(row.score_low <= row.score <= row.score_high for row in rows)


def test_keeping_everything_loses_nothing(rows: list[Any]) -> None:
    for full, kept in zip(rows[::3], rows[1::3], strict=True):
        assert (kept.score, kept.agreement) == (full.score, 1.0)
        assert full.kept is None or full.kept == pytest.approx(1, abs=1e-3)
        assert kept.kept is None or kept.kept == pytest.approx(1, abs=1e-3)
    assert rows[-3].num_kept > 0


def test_reading_next_to_nothing_loses(rows: list[Any]) -> None:
    assert rows[-1].prompt_tokens_computed < 0.6
    assert rows[-1].kept < 0.9
    assert rows[-1].kept_low <= rows[-1].kept <= rows[-1].kept_high


def test_what_is_skipped_counts_as_saved(rows: list[Any]) -> None:
    full, keep_all, nothing = rows[-3:]
    assert full.ideal_speedup == 1
    assert keep_all.ideal_speedup < 1.01
    assert nothing.ideal_speedup > 1.5


def test_a_baseline_keeps_what_takes_as_long_as_the_preset(
    reader: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "_ttft_s", lambda llm, rule, prompt: rule.schedule[0][1])
    rules = {"random_drop": LazyPrefill.random_drop(), "balanced": LazyPrefill(((0.8, 0.3),))}
    lazy, baseline = methods_at_equal_seconds(reader, rules, Prompt([1] * 8))
    assert (lazy.prefill, baseline.name, baseline.prefill) == (
        "balanced",
        "random_drop",
        "balanced",
    )
    ((depth, ratio),) = baseline.rule.schedule
    assert depth == 0
    assert ratio == pytest.approx(0.3, abs=0.04)


def test_a_baseline_without_a_preset_is_refused(reader: LLM) -> None:
    with pytest.raises(ConfigError, match=r"random_drop.*--prefill balanced"):
        methods_at_equal_seconds(
            reader, {"random_drop": LazyPrefill.random_drop()}, Prompt([1] * 8)
        )


def test_likelihoods_are_those_of_the_plain_model(reader: LLM) -> None:
    (sample,) = page_samples("single_doc_qa", 1)
    prompt = encode_sample(reader.tokenizer, sample)
    twin = LLM(reader.model, tokenizer=reader.tokenizer, prefill=None)
    found = measure_likelihood([reader, twin], sample, prompt)
    answer = reader.tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = reader.model(torch.tensor([[*prompt.token_ids, *answer]])).logits[0].float()
    places = range(len(prompt.token_ids) - 1, len(prompt.token_ids) + len(answer) - 1)
    expected = sum(
        float(logits[place].log_softmax(-1)[token])
        for place, token in zip(places, answer, strict=True)
    )
    assert found.full == pytest.approx(expected, abs=1e-3)
    assert found.counts
    assert found.ways == pytest.approx((expected, expected), abs=1e-3)
    assert prompt.question is not None


def test_samples_whose_context_adds_little_are_left_out(reader: LLM) -> None:
    sample = replace(page_samples("single_doc_qa", 1)[0], answers=("zebra " * 9,))
    prompt = encode_sample(reader.tokenizer, sample)
    found = measure_likelihood([reader], sample, prompt)
    assert not found.counts
    assert found.ways == ()
    assert kept_interval([found], 1) is None


def test_kept_is_pooled_over_tokens() -> None:
    small = Likelihood(1, -2.0, -1.0, (-1.0, -2.0))  # keeps 0 of 1 nat
    large = Likelihood(9, -18.0, -9.0, (-9.0, -9.0))  # keeps 9 of 9
    useless = Likelihood(10, -10.0, -10.0 + 9 * LEAST_GAIN, ())
    found = kept_interval([small, large, useless], 1)
    assert found is not None
    assert found.value == pytest.approx(0.9)
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("full", "own", "expected"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4), 1.0),
        ((1, 2, 3, 4), (1, 2, 9, 4), 0.5),
        ((1, 2), (1, 2, 3, 4), 0.5),
        ((1, 2, 3, 4), (1,), 0.25),
        ((1,), (2,), 0.0),
        ((), (), 1.0),
        ((), (1,), 0.0),
    ],
)
def test_agreement_ends_at_the_first_token_that_differs(
    full: tuple[int, ...], own: tuple[int, ...], expected: float
) -> None:
    assert agreement(full, own) == expected


def test_prompts_leave_room_for_the_answer(reader: LLM) -> None:
    assert fitting_length(reader, 1000, 100) == 1000
    assert fitting_length(reader, 1 << 40, 100) < reader.max_context - 100
    with pytest.raises(RequestError, match="max-new-tokens"):
        fitting_length(reader, 1000, reader.max_context)


def test_samples_without_answers_are_for_decoding() -> None:
    with pytest.raises(RequestError, match="bench decode --data"):
        by_category([Sample("d", "c", "p")])


def test_longbenchs_categories_come_first_and_in_its_order() -> None:
    found = by_category(
        [Sample("d", name, "p", ("a",)) for name in ("own", "code", "single_doc_qa", "own")]
    )
    assert list(found) == ["single_doc_qa", "code", "own"]
    assert len(found["own"]) == 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [
        {"prompt": f"The code of the red door is {n}.\n\nWhat is it?", "answers": [str(n)]}
        for n in range(4)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


def test_the_contract_is_fulfilled(
    data: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--n", "2", "--lines", "odd", "--max-new-tokens", "4", "--prefill", "paper")
    assert run(["bench", "quality", "-m", model, "--data", str(data), *options, "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values.keys() >= COMMON
    assert values["config"]["lines"] == "odd"
    assert [(row["category"], row["prefill"]) for row in values["rows"]] == [
        (category, way) for category in ("own", "all") for way in ("off", "paper")
    ]
    for row in values["rows"]:
        assert row.keys() >= CONTRACT
        assert row["num"] == 2
    assert run(["bench", "quality", "-m", model, "--data", str(data), *options]) == 0
    assert "agreement" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "/no/such/file"], "/no/such/file"),
        (["--lines", "odd"], "--lines odd is for --data"),
        (["--max-new-tokens", "5"], "--max-new-tokens 5 is for --data"),
        (["--data", "x", "--heldout"], "--heldout"),
        (["--data", "x", "--decode", "lookahead"], "--decode lookahead"),
        (["--data", "x", "--turns", "2"], "--turns 2"),
        (["--data", "x", "--lines", "third"], "lines must be one of"),
    ],
    ids=str,
)
def test_a_mistake_gets_one_line_that_names_it(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "quality", *options]) == 2
    assert named in capsys.readouterr().err


def test_an_unknown_category_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "quality", "--data", str(data), "--categories", "code"]) == 2
    assert "'code'; there are own" in capsys.readouterr().err
