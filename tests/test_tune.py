"""Tuning: the search finds the strongest schedule that passes in few trials, and says so when there
is none."""

import json
import os
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_level, chatty, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from lazyahead import LLM, LazyPrefill
from lazyahead.cli import run
from lazyahead.cli.tune import own_tasks, read_tasks
from lazyahead.errors import ConfigError, RequestError
from lazyahead.hf.probe import examine
from lazyahead.prefill.cost import LayerCost, ModelCost, ideal_speedup, kept_counts
from lazyahead.prefill.schedule import boundaries
from lazyahead.prefill.score import LastToken, Random, Window
from lazyahead.reader import CATEGORIES
from lazyahead.tune.answers import Answers, Task
from lazyahead.tune.search import GAIN, RETREAT, Candidate, Search, candidates, strongest
from lazyahead.tune.tuner import scorers, tune

LAYER = LayerCost(num_weights=1000, attention_width=64)
PLAIN = LazyPrefill(scorer=LastToken(), local_window=0)
TEXT = "The code of the red door is 417. The keeper of the tower keeps a lamp. "


@cache
def lattice(num_layers: int = 5, num_tokens: int = 1000) -> list[Candidate]:
    return candidates(PLAIN, ModelCost((LAYER,) * num_layers), num_tokens)


# --- the search -----------------------------------------------------------------------------------


def test_a_candidate_is_what_its_schedule_does_to_a_model():
    sees = (True, False, False, True, False, True)
    model = ModelCost(tuple(LAYER._replace(window=None if full else 100) for full in sees))
    found = candidates(LazyPrefill(), model, 1000)
    assert len({candidate.kept for candidate in found}) == len(found)
    for candidate in found:
        placed = boundaries(candidate.schedule, sees)
        assert all(sees[boundary.layer - 1] for boundary in placed)
        assert len(placed) == len(candidate.schedule) <= 2
        config = LazyPrefill(candidate.schedule)
        assert candidate.kept == kept_counts(config, model, 1000)
        assert candidate.speedup == ideal_speedup(config, model, 1000)


def test_deep_models_have_as_many_depths_as_one_can_try():
    assert len(candidates(PLAIN, ModelCost((LAYER,) * 80), 4096)) < 2000


def test_with_an_oracle_that_always_agrees_the_strongest_wins_without_much_ado():
    tried: list[Candidate] = []
    best = strongest(Search(lattice(), gain=0.0), lambda c: not tried.append(c), lambda c: True)
    assert best is not None
    assert best.speedup == max(candidate.speedup for candidate in lattice())
    assert len(tried) < 12


def test_with_an_oracle_that_never_agrees_nothing_is_safe():
    assert strongest(Search(lattice()), lambda c: False, lambda c: True) is None


needs = st.lists(st.integers(0, 1000), min_size=5, max_size=5)
"""Tokens that an answer needs at each layer."""


@settings(max_examples=40, deadline=None)
@given(st.lists(needs, min_size=1, max_size=4))
def test_with_a_monotone_oracle_the_strongest_that_passes_is_found(wanted):
    def passes(candidate: Candidate) -> bool:  # some demand is met at every layer
        return any(
            all(have >= need for have, need in zip(candidate.kept, one, strict=True))
            for one in wanted
        )

    tried: list[Candidate] = []
    best = strongest(Search(lattice(), gain=0.0), lambda c: (tried.append(c), passes(c))[1], passes)
    passing = [
        candidate.speedup for candidate in lattice() if passes(candidate) and candidate.speedup > 1
    ]
    assert (best and best.speedup) == max(passing, default=None)
    assert len(tried) < len(lattice()) / 3
    assert len(set(tried)) == len(tried)

    nearly = strongest(Search(lattice()), passes, passes)
    assert (nearly is None) == (max(passing, default=1) <= 1 + GAIN)
    if nearly is not None:
        assert passes(nearly)
        assert nearly.speedup * (1 + GAIN) >= max(passing)


@settings(max_examples=40, deadline=None)
@given(needs, needs)
def test_what_does_not_hold_is_given_up_for_something_weaker(wanted, hidden):
    def meets(candidate: Candidate, need: list[int]) -> bool:
        return all(have >= want for have, want in zip(candidate.kept, need, strict=True))

    judged: list[Candidate] = []
    best = strongest(
        Search(lattice(), gain=0.0),
        lambda c: meets(c, wanted),
        lambda c: (judged.append(c), meets(c, hidden))[1],
    )
    if best is not None:
        assert meets(best, wanted)
        assert meets(best, hidden)
    for former, later in pairwise(judged):
        assert later.speedup * (1 + RETREAT) <= former.speedup * (1 + 1e-9)
    if judged and meets(judged[0], hidden):
        assert best == judged[0]


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_with_an_oracle_of_moods_the_search_ends_with_one_that_holds(random):
    moods = {candidate: random.random() < 0.5 for candidate in lattice()}
    best = strongest(Search(lattice()), moods.__getitem__, moods.__getitem__)
    assert best is None or moods[best]


def test_a_search_that_must_beat_something_finds_nothing_slower():
    top = max(candidate.speedup for candidate in lattice())
    assert strongest(Search(lattice(), least=top), lambda c: True, lambda c: True) is None


def test_scorers_are_those_that_look_and_the_first_is_ones_own():
    mine = Window(window_size=4)
    found = scorers(mine)
    assert found[0] == mine
    assert LastToken() in found
    assert len(set(found)) == len(found)
    assert not any(isinstance(scorer, Random) for scorer in found)


# --- on a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, dtype="float32", device="cpu")


def tasks(count: int, repeat: int = 2) -> list[Task]:
    return [
        Task(f"prompt {number}", f"{number} {TEXT * repeat}", "What is it?")
        for number in range(count)
    ]


@cache
def forgetful() -> LLM:
    """A model whose attention adds nothing: whatever is deferred, it says the same."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(byte_level()), hidden_size=32, intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=0, eos_token_id=None, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return LLM(model, tokenizer=chatty(byte_level()))


BASE = LazyPrefill(
    min_tokens=16,
    protect_first=2,
    protect_last=4,
    protect_question=False,
    scorer=Window(window_size=4),
)


def test_a_model_that_never_looks_back_is_pruned_as_hard_as_can_be():
    tuned = tune(forgetful(), tasks(8), base=BASE, max_new_tokens=4, runs=1)
    found = tuned.found
    assert found is not None
    rule = found.prefill
    assert replace(rule, schedule=BASE.schedule, scorer=BASE.scorer) == BASE
    cost = ModelCost.of(examine(forgetful().model)[1])
    bases = [replace(BASE, scorer=scorer) for scorer in scorers(BASE.scorer)]
    every = [one for base in bases for one in candidates(base, cost, tuned.prompt_tokens)]
    assert found.ideal_speedup * (1 + GAIN) >= max(one.speedup for one in every)
    assert found.ideal_speedup == ideal_speedup(rule, cost, tuned.prompt_tokens)
    assert (found.search.agreed, found.search.of) == (4, 4)
    assert found.held_out is not None
    assert (found.held_out.agreed, found.held_out.of) == (4, 4)
    assert found.clock.speedup > 0
    assert tuned.num_rejected == 0


def test_what_is_found_agrees_and_keeps_what_it_was_not_asked_to_change(llm):
    tuned = tune(llm, tasks(3), base=BASE, max_new_tokens=2, agree=0.3, runs=1)
    assert tuned.found is not None
    rule = tuned.found.prefill
    assert replace(rule, schedule=BASE.schedule, scorer=BASE.scorer) == BASE
    assert tuned.found.held_out is None
    answers = Answers(
        LLM(llm.model, tokenizer=llm.tokenizer, prefill=None), tasks(3), 2, lambda text, done: None
    )
    assert answers.agreement(rule, range(3)) == tuned.found.search
    assert tuned.found.search.agreed >= 1


def test_answers_that_all_change_leave_nothing_safe(llm, monkeypatch):
    monkeypatch.setattr(Answers, "_compare", lambda self, rule, index: False)
    tuned = tune(llm, tasks(3), base=BASE, max_new_tokens=2, runs=1)
    assert tuned.found is None
    assert tuned.num_tried < 40


def test_what_fails_on_the_prompts_held_out_is_rejected(llm, monkeypatch):
    monkeypatch.setattr(Answers, "_compare", lambda self, rule, index: index % 2 == 0)
    tuned = tune(llm, tasks(8), base=BASE, max_new_tokens=2, runs=1)
    assert tuned.found is None
    assert tuned.num_rejected > 0


def test_short_prompts_are_left_out_by_name(llm):
    given_tasks = [Task("the short one", "Hm."), *tasks(2)]
    assert tune(
        llm, given_tasks, base=replace(BASE, min_tokens=64), max_new_tokens=1, runs=1
    ).skipped == ("the short one (3 tokens)",)
    with pytest.raises(RequestError, match="shorter than min_tokens 5000"):
        tune(llm, given_tasks, base=replace(BASE, min_tokens=5000))


def test_a_prompt_beyond_the_context_is_named(llm):
    with pytest.raises(RequestError, match=r"^prompt 0: .*context of 1024"):
        tune(llm, tasks(1, 60), base=BASE)


@pytest.mark.parametrize("agree", [0, 1.5, float("nan")])
def test_agreement_is_a_fraction(llm, agree):
    with pytest.raises(ConfigError, match="agree"):
        tune(llm, tasks(1), agree=agree)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"{number} {TEXT * 2}", "question": "What?"} for number in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def command(folder, prompts, *options: str) -> int:
    fixed = ("--max-new-tokens", "2", "--min-tokens", "32", "--runs", "1", "--dtype", "float32")
    return run(["tune", "-m", folder, "--prompts", str(prompts), *fixed, *options])


def test_the_profile_that_is_written_is_the_one_that_was_found(folder, prompts, tmp_path, capsys):
    out = tmp_path / "mine.toml"
    assert command(folder, prompts, "--agree", "0.3", "--out", str(out), "--json") == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values.keys() >= {
        "lazyahead",
        "machine",
        "model",
        "config",
        "seed",
        "runs",
        "ttft_speedup",
        "held_out",
    }
    assert LazyPrefill.load(out) == LazyPrefill.from_dict(values["profile"])
    assert values["config"]["prefill"] == values["profile"]
    assert (values["file"], values["search"]["of"]) == (str(out), 3)
    assert sorted(os.listdir(tmp_path)) == ["mine.toml", "prompts.jsonl"]

    said = (
        "generate",
        TEXT * 2,
        "-m",
        folder,
        "--max-new-tokens",
        "2",
        "--prefill",
        str(out),
        "--json",
    )
    assert run(list(said)) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["config"]["prefill"] == values["profile"]
    assert answer["prompt_tokens_computed"] < 1


def test_a_profile_that_was_there_is_replaced_and_that_is_said(folder, prompts, tmp_path, capsys):
    out = tmp_path / "mine.toml"
    out.write_text("old")
    assert command(folder, prompts, "--agree", "0.3", "--out", str(out)) == 0
    captured = capsys.readouterr()
    assert "replaced" in captured.err
    assert "of 3 that guided the search" in captured.out
    assert LazyPrefill.load(out).min_tokens == 32


def test_where_nothing_is_safe_it_says_so_and_writes_nothing(
    folder, prompts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Answers, "_compare", lambda self, rule, index: False)
    out = tmp_path / "mine.toml"
    assert command(folder, prompts, "--out", str(out)) == 0
    assert "Nothing safe was found" in capsys.readouterr().out
    assert command(folder, prompts, "--out", str(out), "--json") == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (values["profile"], values["file"], values["config"]["prefill"]) == (None, None, None)
    assert not out.exists()


def test_prompts_are_lines_json_lines_or_files_of_a_folder(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\ntwo\n")
    assert [task.text for task in read_tasks(lines)] == ["one", "two"]
    assert read_tasks(lines)[1].name == f"{lines}, line 3"
    turns = tmp_path / "turns.jsonl"
    turns.write_text('{"turns": ["first", "second"]}\n{"prompt": "text", "question": "what"}\n')
    assert [(task.text, task.question) for task in read_tasks(turns)] == [
        ("first", None),
        ("text", "what"),
    ]
    inside = tmp_path / "folder"
    inside.mkdir()
    (inside / "a.txt").write_text("one\ntwo\n")
    assert [task.text for task in read_tasks(inside)] == ["one\ntwo\n"]


@pytest.mark.parametrize(
    "content", ["", "{}\n", '{"prompt": ""}\n', '{"prompt": "a", "question": 3}\n', "[1]\n"]
)
def test_a_file_without_prompts_is_refused(content, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"prompts\.jsonl"):
        read_tasks(path)


def test_half_of_its_own_questions_of_each_category_are_held_out():
    found = own_tasks(2, 256, seed=0)
    assert [task.name for task in found[::2]] == [f"{category} 1" for category in CATEGORIES]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("-m", "some/model"), "--prompts"),
        (("--out", "profile.txt"), ".toml"),
        (("--out", "nowhere/profile.toml"), "nowhere"),
        (("--prompts", "p.jsonl", "--length", "512"), "--length 512"),
        (("--prompts", "none.jsonl"), "none.jsonl"),
    ],
)
def test_mistakes_are_refused_before_any_work(options, word, capsys):
    assert run(["tune", *options]) == 2
    assert word in capsys.readouterr().err
