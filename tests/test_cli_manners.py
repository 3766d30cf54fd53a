"""The command line as its users try it: encodings, pipes, pastes, full disks, impatience."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import COMMAND, save_model

from lazyahead import LLM
from lazyahead.cli import options, run
from lazyahead.cli.input import check_text, parse_path, unescape
from lazyahead.cli.output import SideOutputs, whole_file
from lazyahead.errors import ConfigError, RequestError
from lazyahead.strategies import parse_prefill

TEXT = "The code of the red door is 417. "
HALF = "half \ud83d of a character"
QUICK = ("--max-new-tokens", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


def command(*arguments: str, stdin: bytes | None = None, **environment: str):
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, env={**os.environ, **environment},
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip


def one_line(errors: str) -> str:
    (line,) = [line for line in errors.splitlines() if "built-in reader" not in line]
    assert line.startswith("lazyahead: ")
    return line


# --- encodings ------------------------------------------------------------------------------------


def test_an_encoding_that_lacks_a_character_loses_no_answer(model):
    done = command(
        "generate", TEXT, "-m", model, "--max-new-tokens", "40", PYTHONIOENCODING="cp1252"
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("utf-8")
    assert len(text.strip()) > 3


def test_json_is_ascii_whatever_it_says(model, capsys):
    page = "naïve café, 日本語 😀"
    assert run(["generate", page, "-m", model, *QUICK, "--json"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.isascii()
    assert json.loads(line)["answer_tokens"] == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", HALF),
        ("generate", TEXT, "-q", HALF),
        ("generate", TEXT, "--stop", HALF),
    ],
)
def test_half_a_character_is_refused_in_one_line(model, capsys, arguments):
    assert run([*arguments, "-m", model]) == 2
    assert "UTF-8" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("field", ["prompt", "question"])
def test_half_a_character_in_json_lines_is_refused_by_line(capsys, tmp_path, field):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": TEXT, "question": "What?", field: HALF}))
    assert run(["tune", "--prompts", str(path)]) == 2
    assert "line 1" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [("generate", "-"), ("generate", "-f", "-"), ("chat",)])
def test_stdin_that_is_not_utf8_is_refused_in_one_line(model, arguments):
    done = command(*arguments, "-m", model, *QUICK, stdin=b"caf\xe9\n")
    assert done.returncode == 2
    assert "UTF-8" in one_line(done.stderr.decode())


# --- what is given --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("-",), ("-f", "-"), ("-q", "What?")], ids=" ".join)
def test_a_piped_document_is_read_with_a_dash_and_without(model, arguments):
    done = command("generate", *arguments, "-m", model, *QUICK, "--json", stdin=TEXT.encode())
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["prompt_tokens"] > 10


def test_a_prompt_is_answered_without_reading_what_is_piped(model):
    done = command("generate", "a", "-m", model, *QUICK, "--json", stdin=TEXT.encode())
    assert json.loads(done.stdout.splitlines()[-1])["prompt_tokens"] < 5


def test_nothing_at_all_is_still_refused(model):
    done = command("generate", "-m", model)
    assert done.returncode == 2
    assert "empty" in one_line(done.stderr.decode())


def test_a_stop_text_may_name_a_new_line():
    assert unescape(r"\n") == "\n"
    assert unescape(r"a\\n\tb\d") == "a\\n\tb\\d"
    assert options.make_sampling(stop=[r"\n", "end"]).stop == ("\n", "end")


def test_a_tilde_is_the_home_folder(model, capsys, monkeypatch):
    home = Path(model).parent
    monkeypatch.setenv("HOME", str(home))
    assert parse_path("~/x") == home / "x"
    (home / "text.txt").write_text(TEXT)
    arguments = ["generate", "--file=~/text.txt", "--model=~/tiny", "--session=~/kept.session"]
    assert run([*arguments, *QUICK]) == 0
    assert (home / "kept.session").exists()
    with pytest.raises(ConfigError, match=f"{home}/none.toml"):
        parse_prefill("~/none.toml")


def test_whole_text_is_passed_on():
    assert check_text("it", "naïve 日本語 😀") == "naïve 日本語 😀"
    with pytest.raises(RequestError, match=r"^it "):
        check_text("it", HALF)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("json_too", [True, False])
def test_a_side_output_that_fails_costs_nothing_else(
    model, capsys, monkeypatch, tmp_path, json_too
):
    kept, page = tmp_path / "kept.session", tmp_path / "page.html"

    @contextmanager
    def full_disk(path):
        yield path
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lazyahead.cli.generate.whole_file", full_disk)
    outputs = ("--session", str(kept), "--explain", str(page), *(["--json"] if json_too else []))
    assert run(["generate", TEXT, "-m", model, *QUICK, *outputs]) == 1
    captured = capsys.readouterr()
    assert captured.out.strip()
    said = [line for line in captured.err.splitlines() if line.startswith("lazyahead: ")]
    assert len(said) == 1
    assert str(page) in said[0]
    assert "No space left" in said[0]
    assert kept.exists()


def test_the_result_is_printed_before_side_outputs_are_written(
    model, capsys, monkeypatch, tmp_path
):
    seen: list[str] = []
    monkeypatch.setattr(
        LLM, "save_session", lambda *_: seen.append(capsys.readouterr().out.splitlines()[-1])
    )
    kept = str(tmp_path / "kept.session")
    assert run(["generate", TEXT, "-m", model, *QUICK, "--session", kept, "--json"]) == 0
    assert json.loads(seen[0])["answer_tokens"] == 4


def test_a_failed_side_output_names_its_path_once(capsys):
    outputs = SideOutputs()
    with outputs.writing(Path("here")):
        raise RequestError("cannot write here: full")
    with outputs.writing(Path("there")):
        raise OSError(28, "No space left on device")
    assert outputs.failed
    assert capsys.readouterr().err.splitlines() == [
        "lazyahead: cannot write here: full",
        "lazyahead: there could not be written: No space left on device",
    ]


def test_a_full_disk_behind_stdout_gets_one_line(model):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "generate", TEXT, "-m", model, *QUICK, "--json"],
            stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left" in done.stderr.decode().splitlines()[-1]
    assert b"Traceback" not in done.stderr


# --- waiting --------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported_before_the_progress_line():
    code = """
import sys
from lazyahead.cli import progress, run
def shown(what):
    print(what, "torch" in sys.modules, "transformers" in sys.modules, file=sys.stderr)
    raise SystemExit(0)
progress.progress = shown
run(["generate", "a"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split()[-2:] == ["False", "False"]


def test_idle_threads_sleep_unless_the_user_says_otherwise():
    code = "import os; from lazyahead.cli import run; run(['--version']); "
    code += "print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **given},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split()[-1] == expected


def test_doctor_tells_library_users_about_idle_threads(model, capsys):
    assert run(["doctor", "-m", model]) == 0
    assert "OMP_WAIT_POLICY=passive" in capsys.readouterr().err


def test_progress_is_silent_where_stderr_is_no_terminal(capsys):
    from lazyahead.cli.progress import progress

    with progress("work") as report:
        report("more", 0.5)
    assert capsys.readouterr().err == ""


# --- chat -----------------------------------------------------------------------------------------


def chat(model: str, *lines: str, more: tuple[str, ...] = ()):
    text = "".join(f"{line}\n" for line in lines)
    return command("chat", "-m", model, *QUICK, *more, stdin=text.encode())


def answers(done) -> list[str]:
    return [line for line in done.stderr.decode().splitlines() if "first token" in line]


def test_chat_ends_at_exit_and_begins_anew_at_reset(model):
    done = chat(model, "What is it?", "/reset", "And now?", "/exit", "Never answered?")
    assert done.returncode == 0
    found = answers(done)
    assert len(found) == 2
    assert "reused" not in found[1]


def test_a_full_context_is_told_with_a_way_on(model):
    done = chat(model, "word " * 190, "zzz qqq " * 100, "/reset", "And now?")
    assert done.returncode == 0
    assert b"/reset" in done.stderr
    assert len(answers(done)) == 2


def test_a_document_from_stdin_is_refused_where_messages_come_from_there(capsys):
    assert run(["chat", "--file", "-"]) == 2
    assert "--file -" in one_line(capsys.readouterr().err)


def test_a_paste_of_several_lines_is_one_message(model):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", "-m", model, *QUICK],
        stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(slave)
    with process:
        assert b"/exit" in process.stderr.readline()
        time.sleep(0.5)
        os.write(master, b"first line\nsecond line\n")
        assert b"first token" in process.stderr.readline()
        os.write(master, b"/exit\n")
        _, errors = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0
    assert b"first token" not in errors


def test_streams_that_are_no_files_are_left_alone():
    from lazyahead.cli import _use_utf8

    _use_utf8(io.StringIO())
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    _use_utf8(narrow)
    assert (narrow.encoding, narrow.errors) == ("utf-8", "replace")


def test_what_is_written_through_a_link_leaves_the_link(model, tmp_path):
    """And what is no file is written to, never replaced by one."""
    target, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(target)
    session, kept = tmp_path / "kept", tmp_path / "link"
    kept.symlink_to(session)
    arguments = ("generate", TEXT, "-m", model, *QUICK, "--explain", str(link))
    assert run([*arguments, "--session", str(kept)]) == 0
    assert link.is_symlink()
    assert kept.is_symlink()
    assert "<html" in target.read_text()
    assert session.stat().st_size
    with whole_file(Path(os.devnull)) as name:
        assert name == Path(os.devnull)
    assert not Path(os.devnull).is_file()


def test_chat_refuses_a_document_that_leaves_no_room_at_once(model, tmp_path, capsys):
    document = tmp_path / "long.txt"
    document.write_text("xyzw " * 250)
    assert run(["chat", "-m", model, "-f", str(document), *QUICK]) == 2
    assert "--file has" in one_line(capsys.readouterr().err)
