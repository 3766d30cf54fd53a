"""`lazyahead bench quality`: its contract, and its baselines at equal cost.

Prompts are as short as can be.
"""

import json
from dataclasses import replace

import pytest
from tiny import save_model

from lazyahead.bench.methods import Cost, quality_methods, second_turn_methods
from lazyahead.cli import run
from lazyahead.config import PRESETS, LazyPrefill
from lazyahead.prefill.cost import LayerCost, ModelCost
from lazyahead.prefill.score import LastToken

COMMON = {"lazyahead", "machine", "model", "config", "seed", "runs"}
CONTRACT = {
    "category",
    "method",
    "score",
    "relative",
    "ttft_speedup",
    "prompt_tokens_computed",
    "generation_speedup",
}
SHORT = ("--length", "320", "--runs", "1", "--n", "1", "--dtype", "float32")
COST = Cost(ModelCost((LayerCost(300_000, 192, 70_000),) * 12, 400_000), 4096)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> str:
    """Boundaries at which everything goes on."""
    path = tmp_path_factory.mktemp("profiles") / "keep-all.toml"
    replace(LazyPrefill(), schedule=((0.3, 1.0), (0.6, 1.0))).save(path)
    return str(path)


def measure(capsys, *options: str) -> dict:
    assert run(["bench", "quality", *SHORT, *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys, *options: str) -> str:
    assert run(["bench", "quality", *options]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_contract_is_fulfilled_and_keeping_everything_changes_nothing(capsys, profile):
    values = measure(
        capsys, "--categories", "few_shot,code", "--prefill", profile, "--prefill", "fast"
    )
    assert values.keys() >= COMMON
    methods = [
        ("full", "off"),
        ("lazy", profile),
        ("lazy", "fast"),
        ("random_drop", profile),
        ("static_prune", profile),
    ]
    rows = values["rows"]
    assert [(row["category"], row["method"], row["prefill"]) for row in rows] == [
        (category, *method) for category in ("few_shot", "code") for method in methods
    ]
    assert [(row["category"], row["method"]) for row in values["averages"]] == [
        ("average", m) for m, _ in methods
    ]
    for row in rows:
        assert row.keys() >= CONTRACT
        assert 0 <= row["score"] <= 1
        assert row["ttft_s"] > 0
        assert row["transformers_ttft_s"] > 0
        keeps_all = row["prefill"] in ("off", profile)
        assert (row["prompt_tokens_computed"] == 1.0) == keeps_all
        if keeps_all:
            assert row["agree"] == 1.0
            assert row["relative"] == (1.0 if row["score"] else None)
        if row["method"] == "full":
            assert row["ttft_speedup"] == row["generation_speedup"] == 1.0
    assert [way["ideal_speedup"] for way in values["config"]["prefill"]] == pytest.approx(
        [1, 1.33, 1, 1], abs=0.05
    )


def test_drafting_changes_no_answer(capsys, profile):
    values = measure(
        capsys, "--categories", "few_shot", "--prefill", profile, "--decode", "lookahead"
    )
    assert values["config"]["decode"]["branch_length"] > 0
    assert [row["agree"] for row in values["rows"] if row["method"] == "lazy"] == [1.0]


def test_any_model_is_measured_and_a_score_over_nothing_is_a_dash(capsys, tmp_path):
    model = str(save_model(tmp_path / "tiny", max_position_embeddings=4096))
    options = ("--model", model, "--categories", "few_shot", "--prefill", "balanced")
    assert run(["bench", "quality", *SHORT, *options]) == 0
    shown = capsys.readouterr().out
    names = ("few shot", "full", "transformers", "lazy, balanced", "random drop", "static prune")
    assert all(name in shown for name in (*names, "–"))


@pytest.mark.parametrize("name", ["balanced", "fast", "paper"])
def test_baselines_cost_what_the_preset_costs(name):
    rule = PRESETS[name]
    full = COST.flops(None)
    for twin in (COST.random_drop(rule), COST.static_prune(rule)):
        assert COST.flops(twin) == pytest.approx(COST.flops(rule), rel=2e-3)
        assert twin.revive == "never"
        assert twin.min_tokens == rule.min_tokens
    static = COST.static_prune(rule)
    assert 0 < COST.first_layer(static) <= COST.first_layer(rule)
    assert COST.kept(COST.random_drop(rule))[0] < COST.num_tokens
    assert COST.ideal_speedup(static) == pytest.approx(full / COST.flops(rule), rel=2e-3)


@pytest.mark.parametrize("count", [40, 1000, 4095, 4096])
@pytest.mark.parametrize("layer", [1, 5, 11])
def test_a_baseline_of_known_cost_is_found_again(layer, count):
    rule = LazyPrefill(((layer / 12, count / 4096),), LastToken(), local_window=0)
    assert COST.kept(COST.static_prune(rule)) == COST.kept(rule)


def test_baselines_share_the_cost_of_balanced_where_it_is_measured():
    rules = {name: PRESETS[name] for name in ("fast", "balanced")}
    *_, random, static = quality_methods(rules, COST, seed=7)
    assert (random.prefill, static.prefill) == ("balanced", "balanced")
    assert random.rule == COST.random_drop(PRESETS["balanced"], seed=7)
    del rules["balanced"]
    assert quality_methods(rules, COST)[-1].rule == COST.static_prune(PRESETS["fast"])


def test_without_revival_nothing_else_differs():
    lazy, for_good, static = second_turn_methods({"fast": PRESETS["fast"]}, COST)
    assert for_good.rule == replace(lazy.rule, revive="never")
    assert (lazy.name, for_good.name, static.name) == ("lazy", "lazy_no_revival", "static_prune")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--categories", "poetry"), "poetry"),
        (("--categories", ""), "few_shot"),
        (("--prefill", "swift"), "swift"),
        (("--prefill", "off"), "off"),
        (("--prefill", "random_drop"), "random_drop"),
        (("--prefill", "missing.toml"), "missing.toml"),
        (("--decode", "fast"), "fast"),
        (("--length", "100"), "--length"),
        (("--n", "0"), "--n"),
    ],
)
def test_a_mistake_is_named(capsys, options, named):
    assert named in refusal(capsys, *options)
