"""`lazyahead bench quality --turns 2`: its contract, and what the second turn computes."""

import json

import pytest
from tiny import save_model

from lazyahead import LLM
from lazyahead.bench.second_turn import FIRST_TURNS, converse
from lazyahead.cli import run
from lazyahead.config import PRESETS
from lazyahead.reader import samples
from lazyahead.reader.prompt import READ_FIRST

SHORT = ("--length", "320", "--n", "1", "--dtype", "float32")
CONTRACT = {
    "category",
    "method",
    "prefill",
    "score",
    "relative",
    "agree",
    "revived",
    "ttft_s",
    "ttft_ratio",
}
METHODS = ["full", "lazy", "lazy_no_revival", "static_prune"]


@pytest.fixture(scope="module")
def reader() -> LLM:
    return LLM(prefill=PRESETS["fast"], dtype="float32")


def test_the_contract_is_fulfilled(capsys):
    options = ("--categories", "few_shot,code", "--prefill", "fast")
    assert run(["bench", "quality", "--turns", "2", *SHORT, *options, "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = values["rows"]
    assert [(row["category"], row["method"]) for row in rows] == [
        (category, method) for category in ("few_shot", "code") for method in METHODS
    ]
    assert [row["method"] for row in values["averages"]] == METHODS
    for row in rows:
        assert row.keys() >= CONTRACT
        assert row["ttft_s"] > 0
        assert row["reread_ttft_s"] > 0
        if row["method"] != "lazy":
            assert row["revived"] == 0
        if row["method"] == "full":
            assert (row["agree"], row["prompt_tokens_computed"], row["first_ttft_speedup"]) == (
                1.0,
                1.0,
                1.0,
            )
            assert row["relative"] == (1.0 if row["score"] else None)
        else:
            assert row["prompt_tokens_computed"] < 1


def test_any_model_is_measured_without_a_chat_template_too(capsys, tmp_path):
    model = str(save_model(tmp_path / "tiny", max_position_embeddings=4096))
    options = ("--model", model, "--categories", "few_shot", "--prefill", "fast")
    assert run(["bench", "quality", "--turns", "2", *SHORT, *options]) == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown
        for name in ("few shot", "full", "lazy, fast", "lazy no revival, fast", "static prune")
    )


@pytest.mark.parametrize("first", FIRST_TURNS)
def test_the_second_turn_reads_only_what_is_new(reader, first):
    sample = samples("code", 320)[0]
    turns, prompt = converse(reader, sample, first)
    asked = {"neutral": READ_FIRST[0], "question": sample.others[0][0]}[first]
    assert asked in reader.tokenizer.decode(prompt[: turns.first.stats.prompt_tokens])
    first, second = turns.first.stats, turns.second.stats
    assert second.prompt_tokens == len(prompt)
    assert second.reused_tokens >= first.prompt_tokens
    assert reader.tokenizer.decode(prompt).count(sample.document.strip()) == 1
    assert sample.question not in reader.tokenizer.decode(prompt[: second.reused_tokens])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--categories", "poetry"), "poetry"),
        (("--prefill", "off"), "off"),
        (("--first", "nothing"), "nothing"),
        (("--first", "question", "--categories", "summarization"), "summarization"),
        (("--turns", "3"), "--turns"),
        (("--turns", "1", "--first", "question"), "--turns 2"),
    ],
)
def test_a_mistake_is_named(capsys, options, named):
    assert run(["bench", "quality", "--turns", "2", *options]) == 2
    assert named in capsys.readouterr().err
