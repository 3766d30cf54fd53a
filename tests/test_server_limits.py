"""Readers that leave, stall or flood, keys, limits, and the end of the server."""

import gc
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import tiny as disk
from serving import serving, tiny_llm, wait_for

from lazyahead import Lookahead
from lazyahead.cache.session import Session
from lazyahead.cli import run
from lazyahead.errors import ConfigError, LazyAheadError
from lazyahead.server.settings import Settings

PROMPT = "The code of the red door is 417. What is the code?"
LONG = {"prompt": PROMPT, "max_tokens": 600, "ignore_eos": True}
SHORT = {"prompt": PROMPT, "max_tokens": 4}


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def server(llm):
    with serving(llm, progress_s=0.02) as server:
        yield server


def send(server, body, buffer=None):
    """A request on a bare socket, whose answer has not been read; at most `buffer` bytes wait."""
    data = json.dumps(body).encode()
    sock = socket.socket()
    sock.settimeout(60)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.connect(("127.0.0.1", server.port))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    sock.sendall(head.encode() + data)
    return sock


def events(text):
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


# --- readers --------------------------------------------------------------------------------------


def test_two_hundred_that_leave_at_any_moment_leave_nothing_behind(server, monkeypatch):
    sessions = weakref.WeakSet()
    made = Session.__init__
    monkeypatch.setattr(
        Session, "__init__", lambda self, *given: (made(self, *given), sessions.add(self))[0]
    )
    assert server.post("/v1/completions", SHORT).status_code == 200
    wait_for(lambda: server.until_idle() is None)
    files, rng = psutil.Process().num_fds(), random.Random(0)
    leave = threading.Event()
    for place in range(200):
        sock = send(server, {**LONG, "stream": place % 2 == 0, "n": 1 + place % 3 // 2})
        leave.wait(rng.choice([0, 0, 0.001, 0.005, 0.02]))
        if rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        sock.close()
    server.until_idle()

    def nothing_is_left():
        gc.collect()
        return not sessions and psutil.Process().num_fds() <= files

    wait_for(nothing_is_left)
    assert server.post("/v1/completions", SHORT).status_code == 200


def test_a_hundred_at_once_are_answered_whole_or_told_to_come_again(llm):
    body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "stream": True}
    with serving(llm, max_running=4, max_queue=8) as server, httpx.Client(timeout=60) as client:
        expected = server.post("/v1/completions", {**body, "stream": False}).json()["choices"][0]

        def ask(_):
            return client.post(f"{server.url}/v1/completions", json=body)

        with ThreadPoolExecutor(100) as threads:
            answers = list(threads.map(ask, range(100)))
        server.until_idle()
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
        else:
            texts = [event["choices"][0]["text"] for event in events(answer.text)]
            assert "".join(texts) == expected["text"]
            assert answer.text.endswith("data: [DONE]\n\n")


def test_answers_to_one_prompt_count_each(llm):
    with serving(llm, max_running=2, max_queue=1) as server:
        assert server.post("/v1/completions", {**SHORT, "n": 3}).status_code == 200
        assert server.post("/v1/completions", {**SHORT, "n": 4}).status_code == 429
        server.until_idle()


def test_a_reader_that_stalls_is_paused_delays_nobody_and_loses_nothing(llm):
    with serving(llm, buffer=4096) as server:
        server.worker.max_pieces = 2
        body = {**LONG, "max_tokens": 300, "stream": True, "logprobs": 5, "n": 2}
        stalled = send(server, body, buffer=4096)
        wait_for(lambda: len(server.worker._jobs) == 2)
        jobs = list(server.worker._jobs.values())

        def advance_while_others_are_answered():
            before = [job.answer.request.num_emitted for job in jobs]
            assert server.post("/v1/completions", SHORT).status_code == 200
            return before != [job.answer.request.num_emitted for job in jobs]

        wait_for(lambda: not advance_while_others_are_answered())
        assert all(job.answer.request.is_paused and len(job._pieces) == 2 for job in jobs)
        assert all(job.answer.request.num_emitted < 300 for job in jobs)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += stalled.recv(1 << 20)
        assert received.count(b'"finish_reason":"length"') == 2
        stalled.close()
        server.until_idle()


def test_progress_is_told_while_a_prompt_is_read(server, monkeypatch):
    step, go_on = server.service.engine.runner.run, threading.Event()

    def wait(*arguments):
        go_on.wait(30)
        return step(*arguments)

    monkeypatch.setattr(server.service.engine.runner, "run", wait)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**SHORT, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        line = next(lines)
        assert line.startswith((": reading", ": waiting"))
        go_on.set()
        assert list(lines)[-2:] == ["data: [DONE]", ""]


# --- limits ---------------------------------------------------------------------------------------


def test_a_body_of_thirty_megabytes_is_refused_and_its_sender_told(server):
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        body = iter([b"x" * (30 << 20)]) if headers else b"x" * (30 << 20)
        answer = httpx.post(f"{server.url}/v1/completions", content=body, timeout=60)
        assert answer.status_code == 413
        assert "16777216 bytes" in answer.json()["error"]["message"]


def test_a_flood_of_headers_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000)
        assert sock.recv(1000).startswith(b"HTTP/1.1 4")
    assert server.get("/health").status_code == 200


def test_a_body_that_does_not_come_is_given_up(llm):
    with serving(llm, body_timeout_s=0.1) as server:
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert sock.recv(1000).startswith(b"HTTP/1.1 408")
        sock.close()
        server.until_idle()


def test_a_prompt_of_too_many_characters_is_refused_before_it_is_tokenised(llm, monkeypatch):
    with serving(llm, max_prompt_chars=100) as server:
        monkeypatch.setattr(server.llm, "tokenizer", None)
        answer = server.post("/v1/completions", {"prompt": "a" * 101})
        assert "101 characters" in answer.json()["error"]["message"]
        chat = {"messages": [{"role": "user", "content": "a" * 101}]}
        assert server.post("/v1/chat/completions", chat).status_code == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 100_000, b'"x"', b"3", b"null", b'{"prompt": "\\ud800"}',
     b'{"prompt": "a", "temperature": NaN}', b'{"\\ud800": 1, "prompt": "a"}',
     b'{"prompt": [' + b"1," * 300_000 + b"1]}", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_strange_bodies_get_a_400_of_moderate_size(server, body):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert len(answer.content) < 4000
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_not_called_json_is_none(server):
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=json.dumps(SHORT),
        headers={"Content-Type": "text/plain"},
    )
    assert answer.status_code == 400


def test_unknown_paths_and_methods_have_errors_of_the_same_form(server):
    for answer in (server.get("/v1/no"), server.get("/v1/completions")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"]


def test_a_request_that_takes_too_long_ends_with_an_error(llm):
    with serving(llm, request_timeout_s=0.2) as server:
        answer = server.post("/v1/completions", LONG)
        assert answer.status_code == 504
        streamed = server.post("/v1/completions", {**LONG, "stream": True})
        assert events(streamed.text)[-1]["error"]["code"] == "request_timeout"
        assert streamed.text.endswith("data: [DONE]\n\n")
        server.until_idle()


@pytest.mark.parametrize(
    "values", [{"max_running": 0}, {"max_body_bytes": -1}, {"drain_s": -1}, {"progress_s": 0},
               {"api_keys": ("",)}, {"api_keys": ("a b",)}, {"log_prompts": True}],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(values):
    with pytest.raises(ConfigError):
        Settings(**values)


# --- keys -----------------------------------------------------------------------------------------


def bearer(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


def test_every_route_but_health_asks_for_the_key(llm):
    with serving(llm, api_keys=("first", "second")) as server:
        for path in ("/", "/health", "/ready"):
            assert server.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/no"):
            assert server.get(path).status_code == 401
            assert server.get(path, **bearer("third")).status_code == 401
        for headers in ({"Authorization": "Basic first"}, {"Authorization": "first"}):
            assert server.get("/v1/models", headers=headers).status_code == 401
        for key in ("first", "second"):
            assert server.get("/v1/models", **bearer(key)).status_code == 200
        refused = server.post("/v1/completions", SHORT)
        assert refused.json()["error"]["code"] == "invalid_api_key"


def test_keys_never_share_drafts_or_responses_unless_a_namespace_is_shared(tmp_path):
    llm = tiny_llm(decode=Lookahead(memory=str(tmp_path / "answers.db")))
    llm.engine.row_cost = None  # every draft is verified
    with serving(llm, api_keys=("a", "b"), shared_namespaces=("all",)) as server:

        def sources(key, namespace=None):
            asked = {"detail": True, "namespace": namespace}
            body = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "lazyahead": asked}
            choice = server.post("/v1/completions", body, **bearer(key)).json()["choices"][0]
            return {span["source"] for span in choice["lazyahead"]["spans"]}

        assert "memory" not in sources("a")
        assert "memory" in sources("a")
        assert "memory" not in sources("b")
        for key in "ab":
            assert "memory" not in sources(key, "own")  # named alike, yet each key's own
        assert "memory" not in sources("a", "all")
        assert "memory" in sources("b", "all")
        told = server.post("/v1/responses", {"input": "Hi", "max_output_tokens": 2}, **bearer("a"))
        body = {"input": "And?", "previous_response_id": told.json()["id"], "max_output_tokens": 2}
        assert server.post("/v1/responses", body, **bearer("b")).status_code == 404
        assert server.post("/v1/responses", body, **bearer("a")).status_code == 200


def test_namespaces_are_counted(llm):
    with serving(llm, max_namespaces=2) as server:
        codes = [
            server.post("/v1/completions", {**SHORT, "lazyahead": {"namespace": name}}).status_code
            for name in ("x", "y", "z", "x")
        ]
        assert codes == [200, 200, 429, 200]


def test_other_origins_are_told_nothing_unless_named(llm):
    asked = {"headers": {"Origin": "http://page.example"}}
    with serving(llm) as server:
        assert "access-control-allow-origin" not in server.get("/health", **asked).headers
    with serving(llm, cors_origins=("http://page.example",)) as server:
        allowed = server.get("/health", **asked).headers["access-control-allow-origin"]
        assert allowed == "http://page.example"


def test_a_host_that_the_server_does_not_go_by_is_refused(llm):
    with serving(llm, allowed_hosts=("127.0.0.1",)) as server:
        assert server.get("/health").status_code == 200
        refused = server.get("/v1/models", headers={"Host": "evil.example:80"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")


def test_logs_hold_prompts_only_where_asked_for(llm, capfd):
    for log_prompts in (False, True):
        with serving(llm, log_requests=True, log_prompts=log_prompts) as server:
            server.post("/v1/completions", SHORT, headers={"X-Request-Id": "me"})
            wait_for(lambda server=server: server.until_idle() is None)
        (line,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "me" in line]
        assert line["request_id"] == "me"
        assert line["completion_tokens"] == 4
        assert (line.get("prompt") == PROMPT) == ("answer" in line) == log_prompts


# --- failures and the end -------------------------------------------------------------------------


def test_a_failing_pass_is_an_error_and_the_server_goes_on(llm, monkeypatch):
    with serving(llm) as server:
        step, failures = server.service.engine.runner.run, [True, True]

        def fail(*arguments):
            if failures:
                failures.pop()
                raise LazyAheadError("no luck")
            return step(*arguments)

        monkeypatch.setattr(server.service.engine.runner, "run", fail)
        answer = server.post("/v1/completions", SHORT)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "no luck")
        streamed = server.post("/v1/completions", {**SHORT, "stream": True})
        assert events(streamed.text)[-1]["error"]["code"] == "pass_failed"
        assert server.post("/v1/completions", SHORT).status_code == 200
        assert server.get("/health").status_code == 200


def test_a_worker_that_fails_makes_health_say_so_and_ends_the_process(llm, monkeypatch):
    with serving(llm) as server:
        monkeypatch.setattr(server.service, "on_death", lambda: None)
        monkeypatch.setattr(server.worker, "_drop_cancelled", lambda: 1 / 0)
        assert server.post("/v1/completions", SHORT).status_code == 503
        assert server.get("/health").status_code == 503
        assert server.post("/v1/completions", SHORT).status_code == 503
        monkeypatch.undo()
        server.service.on_death()
        server._thread.join(30)
        assert server.exit_code == 1


def test_draining_lets_answers_end_and_takes_no_new_ones(llm):
    with serving(llm, drain_s=60) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({**LONG, "max_tokens": 150, "stream": True})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        server.server._handle(signal.SIGTERM, None)
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        refused = server.post("/v1/completions", SHORT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        text = answer.read().decode()
        assert events(text)[-1]["choices"][0]["finish_reason"] == "length"
        connection.close()
        server._thread.join(30)
        assert server.exit_code == 0


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded(server, capsys):
    assert run(["serve", "--port", str(server.port), "--model", "/no/such/model"]) == 2
    assert f"port {server.port}" in capsys.readouterr().err


def test_a_second_signal_ends_at_once(llm):
    with serving(llm, drain_s=60) as server:
        sock = send(server, {**LONG, "max_tokens": 900, "stream": True})
        assert sock.recv(12) == b"HTTP/1.1 200"
        server.server._handle(signal.SIGINT, None)
        server.server._handle(signal.SIGINT, None)
        server._thread.join(30)
        assert server.exit_code == 130
        server.service.stop()
        assert not server.worker.is_alive
        sock.close()


def test_sigterm_in_mid_stream_ends_it_with_a_last_event(tmp_path):
    disk.save_model(tmp_path, max_position_embeddings=8192)
    command = [*disk.COMMAND, "serve", "--port", "0", "--model", str(tmp_path), "--drain-s", "0.2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        curl = process.stdout.readline()
        url = curl.split()[1].removesuffix("/v1/chat/completions")
        body = {**LONG, "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            parts = answer.iter_text()
            text = next(parts)
            process.send_signal(signal.SIGTERM)
            text += "".join(parts)
        assert events(text)[-1]["error"]["code"] == "shutting_down"
        assert text.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
