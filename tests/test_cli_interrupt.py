"""Ctrl-C: the answer ends with what it has, and nothing is left half-written."""

import os
import signal
import subprocess

import pytest
from tiny import COMMAND, save_model

TEXT = "The code of the red door is 417. "


@pytest.fixture(scope="session")
def patient_model(tmp_path_factory) -> str:
    """One that can go on for longer than anybody waits."""
    return str(
        save_model(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=400_000)
    )


def test_ctrl_c_ends_an_answer_with_what_it_has_and_writes_nothing(patient_model, tmp_path):
    options = [
        "--max-new-tokens",
        "300000",
        "--session",
        str(tmp_path / "s"),
        "--explain",
        str(tmp_path / "e"),
    ]
    process = subprocess.Popen(
        [*COMMAND, "generate", TEXT, "-m", patient_model, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        seen = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(seen) == 20
    assert rest.endswith(b"\n")
    assert b"Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_ctrl_c_in_a_chat_ends_the_answer_only(patient_model):
    process = subprocess.Popen(
        [*COMMAND, "chat", "-m", patient_model, "--max-new-tokens", "300000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        for question in (b"What?\n", b"Who?\n"):
            process.stdin.write(question)
            process.stdin.flush()
            assert len(process.stdout.read(20)) == 20
            process.send_signal(signal.SIGINT)
            while b"stopped" not in process.stderr.readline():
                pass
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"Traceback" not in errors
