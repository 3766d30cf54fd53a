"""The commands: contracts of their JSON, exit codes, and what happens to bad input and impatient
users."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import COMMAND, byte_level, save_model

from lazyahead.cli import run

COMMON = {"lazyahead", "machine", "model", "config", "seed", "runs"}
TEXT = "The code of the red door is 417. "


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def last_json(capsys):
    """Runs a command that must succeed, and reads the last line of its stdout."""

    def call(*arguments: str) -> dict:
        assert run([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def refused(capsys, *arguments: str) -> str:
    """The one line that a user's mistake gets."""
    assert run(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if "built-in reader" not in line]
    assert len(said) == 1, lines
    assert said[0].startswith("lazyahead: ")
    return said[0]


def test_generate_fulfils_its_contract(model, last_json):
    values = last_json(
        "generate", TEXT * 3, "-q", "What?", "-m", model, "--max-new-tokens", "5", "--seed", "3"
    )
    fields = {
        "text",
        "ttft_s",
        "decode_s",
        "prompt_tokens",
        "prompt_tokens_computed",
        "answer_tokens",
    }
    assert values.keys() >= COMMON | fields | {"tokens_per_step", "revived"}
    assert (values["answer_tokens"], values["seed"], values["runs"]) == (5, 3, 1)
    assert values["model"] == model
    assert values["machine"]["dtype"] == "float32"


def test_with_nothing_deferred_both_sides_write_the_same_text(model, last_json):
    values = last_json(
        "generate", TEXT, "-m", model, "--prefill", "off", "--max-new-tokens", "6", "--compare"
    )
    assert values["same_text"] is True
    assert values["text"] == values["baseline"]["text"]
    assert values["baseline"].keys() == {"text", "ttft_s", "decode_s"}
    assert values["speedup"].keys() == {"ttft", "decode", "total"}
    assert all(ratio > 0 for ratio in values["speedup"].values())
    assert values["config"]["prefill"] is None


def test_compare_shows_both_sides(model, capsys):
    assert (
        run(["generate", TEXT, "-m", model, "--max-new-tokens", "3", "--compare", "--runs", "1"])
        == 0
    )
    out = capsys.readouterr().out
    assert "transformers" in out
    assert "speed-up" in out


def test_the_same_seed_draws_the_same_text(model, last_json):
    options = ("generate", TEXT, "-m", model, "--temperature", "1.5", "--max-new-tokens", "8")
    drawn = last_json(*options)
    assert last_json(*options, "--seed", str(drawn["seed"]))["text"] == drawn["text"]


def test_the_answer_ends_before_a_stop_text(model, last_json):
    options = ("generate", TEXT, "-m", model, "--max-new-tokens", "12")
    whole = last_json(*options)["text"]
    stopped = last_json(*options, "--stop", whole[3])
    assert stopped["text"] == whole[: whole.index(whole[3])]
    assert stopped["finish_reason"] == "stop"


def test_text_is_streamed_to_stdout_and_measurements_to_stderr(model, capsys):
    assert run(["generate", TEXT, "-m", model, "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "first token" in captured.err
    assert "first token" not in captured.out


def test_a_saved_session_is_continued(model, last_json, tmp_path):
    document, kept = tmp_path / "text.txt", tmp_path / "kept.session"
    document.write_text(TEXT * 4)
    base = ("generate", "-m", model, "--max-new-tokens", "4", "--session", str(kept))
    first = last_json(*base, "--file", str(document), "-q", "What?")
    again = last_json(*base, "--file", str(document), "-q", "Who?")
    turn = last_json(*base, "-q", "And where?")
    assert first["prompt_tokens_reused"] == 0
    assert again["prompt_tokens_reused"] > 0.5 * first["prompt_tokens"]
    assert turn["prompt_tokens_reused"] >= again["prompt_tokens"]
    assert sorted(os.listdir(tmp_path)) == ["kept.session", "text.txt"]


def test_explain_writes_a_page_with_the_answer(model, capsys, tmp_path):
    page = tmp_path / "page.html"
    code = run(
        ["generate", TEXT * 30, "-m", model, "--max-new-tokens", "4", "--explain", str(page)]
    )
    assert code == 0
    assert "417" in page.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["page.html"]


def test_chat_answers_piped_lines_and_reuses_what_it_read(model, tmp_path):
    document = tmp_path / "text.txt"
    document.write_text(TEXT * 4)
    piped = subprocess.run(
        [*COMMAND, "chat", "-m", model, "-f", str(document), "--max-new-tokens", "4"],
        input="What is it?\n\nAnd then?\n", capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    measured = [line for line in piped.stderr.splitlines() if "first token" in line]
    assert len(measured) == 2
    assert "reused" in measured[1]


def test_doctor_names_the_level_and_the_reason(model, last_json):
    values = last_json("doctor", "-m", model)
    assert values.keys() >= COMMON | {"level", "reason", "model_type", "num_layers"}
    assert (values["level"], values["model_type"], values["num_layers"]) == ("full", "llama", 4)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["generate"], "empty"),
        (["generate", "  \n"], "empty"),
        (["generate", "a", "--file", "b"], "not both"),
        (["generate", "a", "--max-new-tokens", "-1"], "-1"),
        (["generate", "a", "--max-new-tokens", "99999"], "99999"),
        (["generate", "a", "--temperature", "hot"], "temperature"),
        (["generate", "a", "--temperature", "nan"], "nan"),
        (["generate", "a", "--top-p", "0"], "top_p"),
        (["generate", "a", "--prefill", "eager"], "eager"),
        (["generate", "a", "--decode", "often"], "often"),
        (["generate", "a", "--dtype", "int3"], "int3"),
        (["generate", "a", "--device", "abacus"], "abacus"),
        (["generate", "a", "--file-name", "b"], "file-name"),
        (["generate", "a", "--compare", "--session", "s"], "--compare"),
        (["generate", "--file", "/no/such/file"], "/no/such/file"),
        (["generate", "a", "--explain", "/no/such/page.html"], "/no/such"),
        (["generate", "a", "--session", "/"], "folder"),
        (["chat", "--file", "/no/such/file"], "/no/such/file"),
        (["bench", "prefill", "--shape", "huge", "--no-memory"], "huge"),
        (["bench", "prefill", "--shape", "tiny", "--model", "x"], "not both"),
        (["bench", "prefill", "--lengths", "long"], "long"),
        (["bench", "prefill", "--lengths", "-4"], "-4"),
        (["fly"], "fly"),
    ],
    ids=" ".join,
)
def test_a_mistake_gets_one_line_that_names_it(model, capsys, arguments, names):
    with_model = arguments[0] == "generate" and "--compare" not in arguments
    assert names in refused(capsys, *arguments, *(["-m", model] if with_model else []))


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        ("[[0.5, 0]]", "keep ratio"),
        ("[[0.5, 1.5]]", "1.5"),
        ("[[0.5, nan]]", "nan"),
        ("[[0.3, 0.2], [0.6, 0.4]]", "grow"),
        ("[[0.6, 0.4], [0.3, 0.2]]", "rise"),
        ("[]", "empty"),
        ("3", "profile"),
    ],
)
def test_a_profile_that_cannot_mean_anything_is_refused(model, capsys, tmp_path, schedule, names):
    profile = tmp_path / "mine.toml"
    profile.write_text(f"[prefill]\nschedule = {schedule}\n")
    assert names in refused(capsys, "generate", TEXT, "-m", model, "--prefill", str(profile))


@pytest.mark.parametrize(
    "field", ["revive_limit = -1", "protect_first = -2", "min_tokens = 1.5", "unheard = 1"]
)
def test_a_profile_field_out_of_range_is_refused(model, capsys, tmp_path, field):
    profile = tmp_path / "mine.toml"
    profile.write_text(f"[prefill]\nschedule = [[0.5, 0.5]]\n{field}\n")
    assert field.split()[0] in refused(
        capsys, "generate", TEXT, "-m", model, "--prefill", str(profile)
    )


def test_a_file_that_is_not_utf8_is_refused(capsys, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    assert "latin.txt" in refused(capsys, "generate", "--file", str(path))


def test_a_prompt_longer_than_the_context_is_refused(model, capsys):
    assert "context" in refused(capsys, "generate", "word " * 2000, "-m", model)


def test_a_prompt_of_one_token_is_answered(model, last_json):
    values = last_json("generate", "a", "-m", model, "--max-new-tokens", "2")
    assert (values["prompt_tokens"], values["answer_tokens"]) == (1, 2)


def test_a_model_that_is_not_there_gets_one_line(capsys, tmp_path):
    assert "no-such" in refused(capsys, "generate", "a", "-m", str(tmp_path / "no-such"))
    (tmp_path / "hollow").mkdir()
    assert "config.json" in refused(capsys, "generate", "a", "-m", str(tmp_path / "hollow"))


def test_a_hub_name_without_network_gets_one_line():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*COMMAND, "generate", "a", "-m", "someone/some-model"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "someone/some-model" in done.stderr


def test_weights_that_can_run_code_are_refused(capsys, model, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    torch.save({}, folder / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, "generate", "a", "-m", str(folder))


def test_a_recurrent_model_is_told_how_to_run_and_runs_so(capsys, tmp_path):
    sizes = {
        "state_size": 4,
        "conv_kernel": 2,
        "expand": 2,
        "time_step_rank": 2,
        "use_mambapy": False,
    }
    folder = str(save_model(tmp_path / "mamba", "mamba", **sizes))
    capsys.readouterr()
    assert "--prefill off" in refused(capsys, "generate", TEXT, "-m", folder)
    assert (
        run(
            [
                "generate",
                TEXT,
                "-m",
                folder,
                "--prefill",
                "off",
                "--decode",
                "off",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    assert run(["doctor", "-m", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["level"] == "decode-only"


def test_an_unknown_family_is_refused_and_doctor_says_why(capsys, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "abacus"}')
    (folder / "model.safetensors").write_bytes(b"")
    byte_level().save_pretrained(folder)
    assert "abacus" in refused(capsys, "generate", "a", "-m", str(folder))
    assert run(["doctor", "-m", str(folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["level"] == "none"
    assert "abacus" in values["reason"]
