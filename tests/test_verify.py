"""`lazyahead verify`: nothing parts in float32, and what parts is found, placed and weighed."""

import json
import os
import signal

import families
import pytest
import torch
from support import KEEP_ALL
from tiny import byte_level, save_model

from lazyahead.bench import agreement, baseline
from lazyahead.bench.agreement import Agreement, own_prompts
from lazyahead.cli import run, verify
from lazyahead.config import LazyPrefill
from lazyahead.llm import LLM
from lazyahead.reader import CATEGORIES

FIELDS = {
    *("prompts", "tokens", "diverged", "first_divergence", "first_gap", "dtype", "checks"),
    "tokens_per_step",
}
TEXT = "The code of the red door is 417. "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048))


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{TEXT * 15}\n\nthree\n{TEXT * 12}What?\n")
    return str(path)


def verified(capsys, *arguments: str, code: int = 0) -> dict:
    assert run(["verify", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_nothing_parts_in_float32_however_prompts_are_batched(model, prompts, capsys, monkeypatch):
    options = ("-m", model, "--dtype", "float32", "--prompts", prompts, "--max-new-tokens", "12")
    whole = verified(capsys, *options)
    assert whole.keys() >= FIELDS
    assert (whole["prompts"], whole["diverged"], whole["first_divergence"]) == (3, 0, None)
    assert whole["checks"] == {"keep_all": 0, "drafting": 0, "sampled": 0}
    monkeypatch.setattr(verify, "BATCH", 2)
    assert verified(capsys, *options)["tokens"] == whole["tokens"]


def test_only_the_checks_asked_for_are_made(model, prompts, capsys, monkeypatch):
    monkeypatch.setattr(baseline, "run_baseline", None)  # transformers is not run
    options = ("-m", model, "--dtype", "float32", "--prompts", prompts, "--max-new-tokens", "6")
    values = verified(capsys, *options, "--check", "drafting", "--check", "sampled")
    assert values["checks"] == {"drafting": 0, "sampled": 0}
    assert 0 < values["tokens"] <= 3 * 6


def test_its_own_prompts_take_all_categories_in_turn(model, capsys):
    count = len(CATEGORIES) + 1
    values = verified(
        capsys,
        "-m",
        model,
        "--dtype",
        "float32",
        "--n",
        str(count),
        "--length",
        "256",
        "--max-new-tokens",
        "2",
    )
    assert (values["prompts"], values["diverged"]) == (count, 0)
    llm = LLM(model, prefill=None)
    drawn = own_prompts(llm, count, 256)
    assert len({tuple(token_ids) for token_ids in drawn}) == count
    assert own_prompts(llm, 2, 256) == drawn[:2]


def test_it_tells_where_answers_part_and_how_near_they_were(model, prompts, monkeypatch, capsys):
    real = baseline.run_baseline
    wrong = lambda *args: real(*args)._replace(token_ids=(*real(*args).token_ids[:2], 7))  # noqa: E731
    monkeypatch.setattr(baseline, "run_baseline", wrong)
    monkeypatch.setattr(verify, "BATCH", 2)
    values = verified(capsys, "-m", model, "--prompts", prompts, "--max-new-tokens", "4", code=1)
    first = values["first_divergence"]
    assert (first["check"], first["prompt"], first["token"], first["left"]) == ("keep_all", 0, 2, 7)
    assert first["logit_gap"] == values["first_gap"] < 0
    assert values["checks"] == {"keep_all": 3, "drafting": 0, "sampled": 0}
    assert (values["prompts"], values["diverged"]) == (3, 3)
    assert run(["verify", "-m", model, "--prompts", prompts, "--max-new-tokens", "4"]) == 1
    assert "First at token 2 of prompt 1" in capsys.readouterr().out


def test_a_parting_of_drafts_is_weighed_by_the_logits_of_lazy_reading(model, monkeypatch):
    found = Agreement(LLM(model, prefill=None, dtype="float32"), LazyPrefill(), 5)
    right = found._drafting.generate

    def wrong(prompts, sampling):
        answers = right(prompts, sampling=sampling)
        return [
            a.__class__((a.text), (*a.token_ids[:3], 9, a.token_ids[4]), a.stats, "length")
            for a in answers
        ]

    monkeypatch.setattr(found._drafting, "generate", wrong)
    token_ids = found._llm.encode(TEXT * 15).token_ids
    found.add([token_ids, token_ids])
    first = found.fields()["first_divergence"]
    assert (first["check"], first["prompt"], first["token"], first["right"]) == (
        "drafting",
        0,
        3,
        9,
    )
    assert first["logit_gap"] > 0


def test_real_prompts_come_from_a_data_file(model, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"question_id": i, "category": c, "turns": [TEXT * 9]} for i, c in enumerate("aab")]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = ("-m", model, "--dtype", "bfloat16", "--data", str(path), "--max-new-tokens", "12")
    values = verified(capsys, *options)
    assert (values["prompts"], values["dtype"]) == (3, "bfloat16")
    assert values["checks"]["drafting"] == values["checks"]["sampled"] == 0
    assert verified(capsys, *options, "--n", "1")["prompts"] == 2
    assert run(["verify", "-m", model, "--data", str(path), "--prompts", str(path)]) == 2


def test_prompts_that_part_later_are_counted_from_the_first_batch_on():
    places = agreement.divergences("drafting", [(1, 2), (1,)], [(1, 2), (1, 5)], start=16)
    assert [(p.prompt, p.token, p.left, p.right) for p in places] == [(17, 1, None, 5)]


def test_ctrl_c_ends_it_after_the_batch_with_what_it_has(model, prompts, monkeypatch, capsys):
    monkeypatch.setattr(verify, "BATCH", 1)
    real, done = Agreement.add, []

    def add(self, batch):
        real(self, batch)
        done.append(batch)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Agreement, "add", add)
    values = verified(capsys, "-m", model, "--prompts", prompts, "--max-new-tokens", "3", code=130)
    assert (values["prompts"], values["diverged"]) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--n", "0"], "--n"),
        (["--length", "12"], "--length"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--n", "3", "--prompts", "p"], "--n 3"),
        (["--length", "300", "--prompts", "p"], "--length 300"),
        (["--prompts", "/no/such"], "/no/such"),
        (["--prefill", "eager"], "eager"),
        (["--check", "batching"], "batching"),
        (["--length", "4096"], "2048"),
    ],
    ids=" ".join,
)
def test_a_mistake_gets_one_line_that_names_it(model, capsys, arguments, names):
    assert run(["verify", "-m", model, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert names in line


def test_a_model_that_cannot_draft_says_what_was_not_checked(capsys, tmp_path, prompts):
    sizes = {
        "state_size": 4,
        "conv_kernel": 2,
        "expand": 2,
        "time_step_rank": 2,
        "use_mambapy": False,
    }
    folder = str(save_model(tmp_path / "mamba", "mamba", **sizes))
    capsys.readouterr()
    values = verified(
        capsys, "-m", folder, "--prompts", prompts, "--max-new-tokens", "3", "--dtype", "float32"
    )
    assert values["checks"] == {"keep_all": 0}
    assert values["not_checked"]


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": list(range(3, 200))},
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[token] for token in range(3, 200)]},
        {"stop_strings": ["e", "a", "o"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_generation_config_of_the_models_own_makes_no_difference(settings):
    tokenizer = byte_level()
    model = families.build("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    agreement = Agreement(LLM(model, tokenizer=tokenizer, prefill=None), KEEP_ALL, 24)
    agreement.add([tokenizer(text)["input_ids"] for text in ("The code of", "A question: what")])
    assert agreement.fields()["diverged"] == 0


def test_a_prompt_beyond_the_context_is_named(model, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "xyzw " * 2000 + "\n")
    assert run(["verify", "-m", model, "--prompts", str(path)]) == 2
    assert "lazyahead: prompt 2: the text of" in capsys.readouterr().err
