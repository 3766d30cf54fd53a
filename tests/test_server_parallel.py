"""A server whose model two processes share: the text of one, and an end when one of them dies."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import families
import httpx
import pytest
import tiny
from serving import serving, wait_for
from support import LAZY

from lazyahead import LLM, Lookahead
from lazyahead.errors import SessionFileError
from lazyahead.parallel.group import Group
from lazyahead.server import Settings, create_app

BODY = {"prompt": "The code of the red door is 417. " * 30, "max_tokens": 12}
CHAT = {"messages": [{"role": "user", "content": BODY["prompt"]}], "max_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = tiny.chatty(tiny.byte_level())
    model = families.build("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """One group for all: a process takes seconds to start."""
    started = Group.start(2)
    yield started
    started.close()


def test_two_ranks_answer_what_one_does(folder: Path, group: Group) -> None:
    found = []
    for tp in (1, group):
        llm = LLM(folder, prefill=LAZY, decode=Lookahead(), tp=tp)
        with serving(llm, max_running=2, cache_bytes=1 << 22) as server:
            bodies = [BODY, BODY, {**BODY, "n": 3, "temperature": 0.8, "seed": 1}]
            answers = [server.post("/v1/completions", body).json() for body in bodies]
            first = server.post("/v1/responses", {"input": "Hello", "max_output_tokens": 4}).json()
            second = {"input": "More", "previous_response_id": first["id"], "max_output_tokens": 4}
            turns = [first, server.post("/v1/responses", second).json()]
            chat = server.post("/v1/chat/completions", CHAT).json()
        found.append(
            (
                [[choice["text"] for choice in answer["choices"]] for answer in answers],
                [answer["usage"]["prompt_tokens_details"] for answer in answers],
                [turn["output"][0]["content"][0]["text"] for turn in turns],
                chat["choices"][0]["message"]["content"],
            )
        )
        llm.close()
    assert found[0] == found[1]
    assert found[0][1][1]["cached_tokens"] > 0


def test_documents_on_disk_are_refused(folder: Path, group: Group, tmp_path: Path) -> None:
    llm = LLM(folder, tp=group)
    with pytest.raises(SessionFileError, match="tp=2"):
        create_app(llm, Settings(documents=tmp_path))
    llm.close()


def test_a_rank_that_dies_ends_an_idle_server(folder: Path, group: Group) -> None:
    """Last of those that share the group."""
    llm = LLM(folder, prefill=LAZY, tp=group)
    with serving(llm) as server:
        assert server.get("/health").status_code == 200
        (process,) = group._processes
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not server.worker.is_alive)
        wait_for(lambda: server.exit_code is not None)
    assert server.exit_code == 1
    llm.close()


def test_a_signal_to_all_lets_the_leader_end_them(folder: Path) -> None:
    arguments = ["serve", "--model", str(folder), "--tp", "2", "--port", "0", "--prefill", "off"]
    server = subprocess.Popen(
        [*tiny.COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        server.stdout.readline()
        os.killpg(server.pid, signal.SIGTERM)
        _, said = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "Traceback" not in said


def test_the_command_ends_with_an_error_when_a_rank_dies_in_mid_answer(folder: Path) -> None:
    arguments = ["serve", "--model", str(folder), "--tp", "2", "--port", "0", "--prefill", "off"]
    server = subprocess.Popen(
        [*tiny.COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[1]
        body = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url.replace("chat/", ""), json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            os.kill(_child_of(server.pid), signal.SIGKILL)
            said = "".join(lines)
        assert "rank 1 ended with status -9" in said
        assert '"code": "worker_dead"' in said
        assert said.endswith("data: [DONE]")
        assert server.wait(60) == 1
    finally:
        server.kill()
        server.communicate()


def _child_of(pid: int) -> int:
    """The process that follows."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [child for child in children if "follow" in Path(f"/proc/{child}/cmdline").read_text()]
    (child,) = found
    return int(child)
