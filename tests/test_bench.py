"""The measurements: rows keep their contract, ratios are what they say, and memory is seen."""

import json
from dataclasses import replace

import pytest
import torch

from lazyahead.bench.baseline import run_baseline
from lazyahead.bench.memory import Peak, ratio, watched
from lazyahead.bench.methods import Cost
from lazyahead.bench.prefill import Subject, measure_prefill, random_prompt
from lazyahead.bench.shapes import SHAPES, build_shape
from lazyahead.cli import run
from lazyahead.config import LazyPrefill
from lazyahead.errors import ConfigError
from lazyahead.llm import LLM
from lazyahead.sampling import Sampling

CONTRACT = {
    "length",
    "baseline_ttft_s",
    "ttft_s",
    "speedup",
    "ideal_speedup",
    "efficiency",
    "keep_all_ratio",
}
CONTRACT |= {"peak_memory_ratio"}


def test_bench_prefill_fulfils_its_contract(capsys):
    options = ["--shape", "tiny", "--lengths", "300", "--runs", "1", "--json"]
    assert run(["bench", "prefill", *options]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values.keys() >= {"lazyahead", "machine", "model", "config", "seed", "runs"}
    assert (values["model"], values["machine"]["dtype"]) == ("tiny", "bfloat16")
    assert [row["length"] for row in values["rows"]] == [300]
    for row in values["rows"]:
        assert row.keys() >= CONTRACT
        assert all(row[name] > 0 for name in CONTRACT)
        assert row["speedup"] == pytest.approx(row["baseline_ttft_s"] / row["ttft_s"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["ideal_speedup"])


def test_the_table_has_a_row_for_each_length(capsys):
    options = [
        "--shape",
        "tiny",
        "--lengths",
        "300",
        "--runs",
        "1",
        "--no-memory",
        "--prefill",
        "off",
    ]
    assert run(["bench", "prefill", *options]) == 0
    assert "300" in capsys.readouterr().out


def test_with_nothing_deferred_no_speedup_is_ideal():
    _, (row, longer) = measure_prefill(
        Subject(shape="tiny"), None, [300, 280], runs=1, memory=False
    )
    assert (row.length, longer.length) == (280, 300)
    assert row.ideal_speedup == 1.0
    assert row.prompt_tokens_computed == 1.0
    assert row.reviving_step_ratio is None
    assert row.peak_memory_ratio is None


def test_the_ideal_speedup_is_that_of_the_cost_model():
    half = replace(LazyPrefill(), schedule=((0.5, 0.5),))
    subject = Subject(shape="tiny", dtype="float32")
    llm, (row,) = measure_prefill(subject, half, [400], runs=1, memory=False)
    assert row.ideal_speedup == Cost.of(llm, 400).ideal_speedup(half) > 1


def test_a_baseline_run_gives_what_generate_gives():
    model = build_shape("tiny", torch.float32)
    ids = random_prompt(LLM(model, prefill=None), 20)
    given = run_baseline(model, ids, Sampling(max_new_tokens=5))
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert list(given.token_ids) == expected[0, 20:].tolist()
    assert given.ttft_s > 0
    assert given.decode_s > 0


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_described(name, monkeypatch):
    monkeypatch.setattr("lazyahead.bench.shapes.fill", lambda model: None)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda model, device: model)
    model = build_shape(name, max_context=100)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    size = name.partition("-")[2].removesuffix("b")
    if size.replace(".", "").isdigit():
        assert billions == pytest.approx(float(size), rel=0.35)
    assert model.config.max_position_embeddings == 100


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(ConfigError, match="huge"):
        build_shape("huge")


def test_a_random_model_gives_finite_logits_and_different_rows():
    model = build_shape("tiny", torch.float32)
    with torch.inference_mode():
        logits = model(torch.arange(3, 40)[None]).logits
    assert logits.isfinite().all()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight[0], weight[1])


def test_memory_that_is_used_for_a_moment_is_seen():
    with watched(torch.device("cpu")) as peaks:
        block = torch.ones(48 << 20, dtype=torch.uint8)
        block.add_(1)
        del block
    assert peaks[0].working > 40 << 20


def test_memory_ratios_are_ours_over_baseline():
    assert ratio([Peak(30, 20)], [Peak(40, 20)], 0) == (0.75, 0.5)
