"""`lazyahead bench decode` and `bench replay`: the contracts of their JSON, on models too small to
be fast."""

import json

import pytest
import torch
from tiny import save_model

from lazyahead.cli import run

COMMON = {"lazyahead", "machine", "model", "config", "seed", "runs"}
SPEEDS = {"baseline_tok_s", "plain_tok_s", "lookahead_tok_s", "prompt_lookup_tok_s"}
CONTRACT = SPEEDS | {"workload", "speedup", "tokens_per_step", "draft_us_per_token", "identical"}
QUICK = (
    "--runs",
    "1",
    "--answers",
    "1",
    "--max-new-tokens",
    "12",
    "--length",
    "256",
    "--dtype",
    "float32",
)
TEXT = "The code of the red door is 417. The code of the blue door is 418. "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAZYAHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def last_json(capsys):
    def call(*arguments: str) -> dict:
        assert run(["bench", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def refused(capsys):
    def call(*arguments: str) -> str:
        assert run(["bench", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        return next(line for line in lines if line.startswith("lazyahead: "))

    return call


def test_every_workload_fulfils_the_contract(model, last_json):
    values = last_json("decode", "-m", model, *QUICK)
    assert values.keys() >= COMMON
    assert [row["workload"] for row in values["rows"]] == ["rag", "qa", "code", "chat", "random"]
    for row in values["rows"]:
        assert row.keys() >= CONTRACT
        assert row["identical"] is True
        assert row["identical_to_baseline"] is (None if row["workload"] == "random" else True)
        assert all(row[name] > 0 for name in SPEEDS)
        assert row["speedup"] == pytest.approx(row["lookahead_tok_s"] / row["plain_tok_s"])
        assert 1 <= row["tokens_per_step"] <= 12
        assert row["ideal_speedup"] >= 1
        assert row["draft_us_per_token"] > 0


def test_drafts_need_no_more_passes_than_tokens_where_nothing_repeats(model, last_json):
    (row,) = last_json("decode", "-m", model, *QUICK, "--workload", "random")["rows"]
    assert row["ideal_speedup"] == pytest.approx(1.0, abs=0.2)


def test_several_at_once_write_the_same_as_without_drafts(model, last_json):
    (row,) = last_json("decode", "-m", model, *QUICK, "--workload", "qa", "--batch", "3")["rows"]
    assert (row["batch"], row["num_prompts"]) == (3, 3)
    assert row["identical"] is True
    assert row["baseline_tok_s"] is None
    assert row["tokens_per_step"] >= 1


def test_a_memory_is_compared_with_none(model, last_json):
    (row,) = last_json("decode", "-m", model, *QUICK, "--memory", "--answers", "4")["rows"]
    assert (row["workload"], row["num_prompts"]) == ("stream", 2)
    assert row["identical"] is True
    assert row["speedup_vs_cold"] == pytest.approx(row["lookahead_tok_s"] / row["cold_tok_s"])


def test_users_bring_texts_and_spec_bench_files(model, tmp_path, last_json):
    (tmp_path / "a.txt").write_text(TEXT * 10)
    (row,) = last_json("decode", "-m", model, *QUICK, "--text", str(tmp_path / "a.txt"))["rows"]
    assert (row["workload"], row["prompt_tokens"]) == ("text", 256)
    lines = [
        {"question_id": 1, "category": "writing", "turns": [TEXT, "And then?"]},
        {"category": "math", "turns": [TEXT]},
        {"category": "math", "prompt": TEXT * 2},
    ]
    (tmp_path / "spec.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = last_json(
        "decode", "-m", model, *QUICK, "--answers", "2", "--prompts", str(tmp_path / "spec.jsonl")
    )
    assert [(row["workload"], row["num"]) for row in values["rows"]] == [
        ("mt_bench", 2),
        ("math", 1),
        ("all", 3),
    ]
    for row in values["rows"]:
        assert 0 <= row["identical"] <= 1
        assert row["plain_tok_s"] > 0


def test_drafts_leave_a_seeded_draw_as_it_is(model, tmp_path, last_json):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": TEXT}))
    values = last_json(
        *("decode", "-m", model, *QUICK, "--data", str(tmp_path / "own.jsonl")),
        *("--temperature", "1", "--seed", "3"),
    )
    assert (values["seed"], values["config"]["temperature"]) == (3, 1.0)
    assert all(row["identical"] == 1 for row in values["rows"])


def test_people_get_a_table(model, capsys):
    assert run(["bench", "decode", "-m", model, *QUICK, "--workload", "qa"]) == 0
    assert "lookup" in capsys.readouterr().out


def test_replay_compares_drafters_without_a_model(last_json):
    values = last_json("replay", "--answers", "3", "--length", "512")
    assert values.keys() >= COMMON | {"rows", "contexts"}
    rows = {row["drafter"]: row for row in values["rows"]}
    assert rows.keys() == {"trie", "prompt_lookup", "none"}
    assert rows["none"]["tokens_per_step"] == 1
    assert rows["trie"]["tokens_per_step"] > rows["prompt_lookup"]["tokens_per_step"] > 1
    for row in rows.values():
        assert row.keys() >= {
            "acceptance",
            "draft_us_per_token",
            "index_us_per_token",
            "ideal_speedup",
        }


def test_replay_takes_texts_pairs_and_row_costs(tmp_path, last_json):
    (tmp_path / "a.txt").write_text(TEXT * 40)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": TEXT * 3, "answer": TEXT}))
    (tmp_path / "cost.json").write_text('{"row_cost": [[1, 0.01], [2, 0.02]]}')
    text = last_json(
        "replay", "--text", str(tmp_path / "a.txt"), "--answers", "2", "--answer-length", "32"
    )
    assert text["config"]["answers"] == 2
    assert text["rows"][0]["tokens_per_step"] > 4
    options = ("replay", "--text", str(tmp_path / "a.jsonl"))
    assert last_json(*options)["rows"][0]["rows_per_step"] > 2
    assert (
        last_json(*options, "--row-cost", str(tmp_path / "cost.json"))["rows"][0]["rows_per_step"]
        == 1
    )


def test_replay_times_drafting_behind_long_contexts(last_json):
    contexts = last_json("replay", "--answers", "2", "--length", "512", "--lengths", "512,1024")[
        "contexts"
    ]
    assert [(row["length"], row["memory_tokens"] > 0) for row in contexts] == [
        (512, False),
        (1024, False),
        (512, True),
        (1024, True),
    ]
    for row in contexts:
        assert row["draft_us_per_token"] > 0
        assert row["insert_us_per_token"] > 0
        assert 36 <= row["bytes_per_token"] <= 300


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["decode", "--workload", "poetry"], "poetry"),
        (["decode", "--text", "a", "--prompts", "b"], "--prompts"),
        (["decode", "--data", "a", "--batch", "2"], "--batch 2"),
        (["decode", "--memory", "--batch", "2"], "--memory"),
        (["decode", "--length", "20"], "20"),
        (["decode", "--prompts", "/no/such/file"], "/no/such/file"),
        (["decode", "--temperature", "1"], "--data"),
        (["replay", "--text", "/no/such/file"], "/no/such/file"),
        (["replay", "--row-cost", "/no/such/file"], "/no/such/file"),
        (["replay", "--lengths", "long"], "long"),
        (["replay", "-m", "/no/such/model"], "/no/such/model"),
    ],
    ids=" ".join,
)
def test_a_mistake_gets_one_line_that_names_it(model, refused, arguments, names):
    given = ["-m", model] if arguments[0] == "decode" else []
    assert names in refused(*arguments, *given)


def test_a_file_without_prompts_is_refused_by_line(model, tmp_path, refused):
    (tmp_path / "bad.jsonl").write_text('{"turns": []}\n')
    assert "line 1" in refused("decode", "-m", model, "--prompts", str(tmp_path / "bad.jsonl"))
    (tmp_path / "short.txt").write_text("a")
    assert "text" in refused("decode", "-m", model, "--text", str(tmp_path / "short.txt"))
    assert "--answer-length" in refused("replay", "--text", str(tmp_path / "short.txt"))
