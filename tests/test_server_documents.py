"""Documents are read before any question, kept on disk, and change no answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from lazyahead import LLM
from lazyahead.cli import run
from lazyahead.server import Settings, create_app

TEXT = " ".join(f"Room {num} holds the number {num * 37 % 101}." for num in range(60))
QUESTION = "What does room 12 hold?"


@contextmanager
def client(llm: LLM, **settings: Any) -> Iterator[TestClient]:
    with TestClient(create_app(llm, Settings(**settings))) as found:
        yield found


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32")


def ask(http: TestClient, text: str = TEXT, **more: Any) -> tuple[str, int]:
    """The answer, and how many prompt tokens came from the cache."""
    content = f"{text}\n\n{QUESTION}"
    messages = [*more.pop("before", []), {"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": 8, **more}
    reply = http.post("/v1/chat/completions", json=body, headers=more.pop("headers", None))
    assert reply.status_code == 200, reply.text
    values = reply.json()
    cached = values["usage"]["prompt_tokens_details"]["cached_tokens"]
    return values["choices"][0]["message"]["content"], cached


def test_a_question_over_a_document_that_was_read_is_answered_as_ever(llm: LLM) -> None:
    with client(llm, cache_bytes=0) as plain:
        expected, cached = ask(plain)
        assert cached == 0
    with client(llm) as http:
        told = http.post("/v1/documents", json={"text": TEXT}).json()
        assert told["object"] == "document"
        assert not told["stored"]
        answer, cached = ask(http)
        assert answer == expected
        assert 128 <= cached <= told["tokens"]


def test_a_second_question_needs_no_document_call(llm: LLM) -> None:
    with client(llm) as http:
        assert ask(http)[1] == 0
        assert ask(http)[1] >= 128


def test_a_request_may_read_afresh_and_then_leaves_nothing(llm: LLM) -> None:
    with client(llm) as http:
        for _ in range(2):
            assert ask(http, lazyahead={"cache": False})[1] == 0
        assert ask(http)[1] == 0
        assert ask(http)[1] >= 128


def test_a_document_belongs_to_its_key_its_prefill_and_its_system_message(llm: LLM) -> None:
    keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    system = [{"role": "system", "content": "Be brief."}]
    with client(llm, api_keys=("one", "two")) as http:
        http.headers.update(keys[0])
        assert http.post("/v1/documents", json={"text": TEXT}).status_code == 200
        assert ask(http)[1] >= 128
        assert ask(http, before=system, max_tokens=1)[1] == 0
        assert ask(http, lazyahead={"prefill": "off"})[1] == 0
        assert ask(http, lazyahead={"namespace": "other"})[1] == 0
        http.headers.update(keys[1])
        assert ask(http)[1] == 0
        body = {"text": TEXT, "system": "Be brief.", "lazyahead": {"prefill": "off"}}
        assert http.post("/v1/documents", json=body).status_code == 200
        assert ask(http, before=system, lazyahead={"prefill": "off"})[1] >= 128


def test_a_stored_document_is_not_read_again_after_a_restart(llm: LLM, tmp_path: Path) -> None:
    with client(llm, documents=tmp_path) as http:
        first = http.post("/v1/documents", json={"text": TEXT}).json()
        expected, _ = ask(http)
    with client(llm, documents=tmp_path) as http:
        again = http.post("/v1/documents", json={"text": TEXT}).json()
        assert (first["stored"], again["stored"], again["read_ms"]) == (True, True, 0.0)
        assert first["read_ms"] > 0
        answer, cached = ask(http)
        assert answer == expected
        assert cached >= 128


def test_documents_of_the_command_line_are_there_from_the_start(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "rooms.txt", tmp_path / "store"
    file.write_text(TEXT)
    command = ["index", str(file), "--out", str(out), "--dtype", "float32", "--json"]
    rows = []
    for _ in range(2):
        assert run(command) == 0
        rows += json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["was_there"] for row in rows] == [False, True]
    (out / "shared-damaged.safetensors").write_bytes(b"no session")
    with client(llm, cache_bytes=0) as plain:
        expected, _ = ask(plain)
    with client(llm, documents=out, api_keys=("one",)) as http:
        http.headers["Authorization"] = "Bearer one"
        for _ in range(2):
            answer, cached = ask(http)
            assert answer == expected
            assert cached >= 128


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": ""}, "text"),
        ({"text": "short"}, "at least 128 tokens"),
        ({"text": TEXT * 200}, "context"),
        ({"text": TEXT, "stream": True}, "'stream' is not supported"),
        ({"text": TEXT, "lazyahead": {"decode": "off"}}, "decode"),
        ({"text": TEXT, "lazyahead": {"prefill": "no"}}, "no preset"),
    ],
)
def test_what_is_no_document_is_refused_by_name(llm: LLM, body: Any, words: str) -> None:
    with client(llm) as http:
        reply = http.post("/v1/documents", json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_without_a_cache_documents_are_refused(llm: LLM, tmp_path: Path) -> None:
    with client(llm, cache_bytes=0) as http:
        reply = http.post("/v1/documents", json={"text": TEXT})
    assert reply.status_code == 400
    assert "--cache-bytes" in reply.json()["error"]["message"]
    assert run(["serve", "--cache-bytes", "0", "--documents", str(tmp_path)]) == 2
    assert run(["index", str(tmp_path / "nothing.txt"), "--out", str(tmp_path)]) == 2
