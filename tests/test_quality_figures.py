"""scripts/quality_figures.py: its sweep goes from weak to strong, and its figures are drawn."""

import json

import quality_figures
from quality_figures import KEEP_RATIOS, SweepPoint, default_layers, draw_figures, schedules

from lazyahead.bench.methods import Cost
from lazyahead.config import PRESETS
from lazyahead.prefill.cost import LayerCost, ModelCost

COST = Cost(ModelCost((LayerCost(300_000, 192, 70_000),) * 12, 400_000), 4096)


def test_a_sweep_goes_from_weak_to_strong():
    lazy = [method.rule for method in schedules(PRESETS["balanced"], COST) if method.name == "lazy"]
    speeds = [COST.ideal_speedup(rule) for rule in lazy]
    assert speeds == sorted(speeds)
    assert len(set(speeds)) == len(speeds) > 2
    assert default_layers(12) == [2, 4, 6, 8, 10]
    assert default_layers(2) == [1]


def test_a_sweep_is_measured_and_drawn(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(quality_figures, "DEPTH_SCALES", (1.0,))
    folder = tmp_path / "new" / "figures"
    options = ("--categories", "few_shot", "--layers", "6", "--length", "320", "--n", "1")
    assert quality_figures.main([str(folder), *options]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    methods = [point["method"] for point in values["sweep"]]
    assert methods == ["lazy", "random_drop", "static_prune", *["one_boundary"] * 3]
    assert all(point["ttft_speedup"] > 0 for point in values["sweep"])
    assert len(list(folder.iterdir())) == len(values["files"]) == 2


def test_a_layer_that_is_not_there_is_named(capsys, tmp_path):
    options = ("--categories", "few_shot", "--layers", "99", "--length", "320", "--n", "1")
    assert quality_figures.main([str(tmp_path), *options]) == 2
    assert "99" in capsys.readouterr().err


def test_figures_are_small_and_leave_out_missing_scores(tmp_path):
    points = [
        SweepPoint(method, layer, ratio, relative, 0.5, 1 + layer / 4, 1.5)
        for method in ("lazy", "random_drop", "static_prune", "one_boundary")
        for layer, relative in ((2, 0.4), (6, 1.3), (8, None))
        for ratio in KEEP_RATIOS
    ]
    for path in draw_figures(tmp_path, "a model, 384 tokens", points):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 40_000
