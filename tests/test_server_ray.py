"""Ray Serve in front of two replicas, started by the command: documents stay where they were read,
a full fleet says so, a client that leaves is noticed, and a replica that is killed takes nobody
else's answer with it."""

import json
import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import httpx
import psutil
import pytest
import tiny
from serving import wait_for

from lazyahead import LLM, Sampling
from lazyahead.cli import run, serve
from lazyahead.server.settings import KEY_VARIABLE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of pydantic, about Ray's own models
    pytest.importorskip("ray.serve", reason="needs the extra lazyahead[ray]")
    from lazyahead.server.ray import RayOptions, app

PLACES = 3
"""Answers that a replica takes, running or queued."""
LONG = {"max_tokens": 1400, "ignore_eos": True, "stream": True}


def document(number: int) -> str:
    """About 600 tokens, over which one key is taken."""
    return f"Document {number}. " * 170


@dataclass
class Fleet:
    """The command and what it serves."""

    process: subprocess.Popen[str]
    url: str

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def complete(self, text: str, **options: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": text, "max_tokens": 3, **options})

    def samples(self, name: str) -> dict[str, float]:
        """Of each replica, a metric."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith(f"lazyahead:{name}{{") and 'replica="front"' not in line:
                replica = line.split('replica="')[1].split('"')[0]
                found[replica] = found.get(replica, 0) + float(line.split()[-1])
        return found

    def process_of(self, replica: str) -> psutil.Process:
        """By the log that it writes."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if any(replica in file.path for file in process.open_files()):
                return process
        raise AssertionError(f"no process of {replica}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = tiny.chatty(tiny.byte_level())
    model = families.build("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    """One for all: Ray takes long to start."""
    arguments = ["serve", "--ray", "--replicas", "2", "--port", "0", "--model", str(folder)]
    arguments += ["--max-running", "2", "--max-queue", str(PLACES - 2), "--drain-s", "1"]
    process = subprocess.Popen(
        [*tiny.COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    try:
        yield Fleet(process, line.split()[1].removesuffix("/v1/chat/completions"))
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        finally:
            _, left = psutil.wait_procs(children, timeout=10)
            for child in left:
                child.kill()
            process.kill()
        assert process.returncode == 0
        assert not left


class Stream(threading.Thread):
    """A long answer, read in a thread."""

    def __init__(self, fleet: Fleet, text: str) -> None:
        super().__init__()
        self.fleet, self.body = fleet, {"prompt": text, **LONG}
        self.status = 0
        self.events: list[str] = []
        self.leave = False
        self.start()
        wait_for(lambda: self.status != 0)

    def run(self) -> None:
        url = f"{self.fleet.url}/v1/completions"
        with httpx.stream("POST", url, json=self.body, timeout=60) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
                if self.leave:
                    return


def placed(fleet: Fleet) -> dict[str, str]:
    """For each replica, a document that was read there."""
    found: dict[str, str] = {}
    for number in range(100, 140):
        before = fleet.samples("request_success_total")
        fleet.complete(document(number))
        after = fleet.samples("request_success_total")
        (where,) = [name for name in after if after[name] > before.get(name, 0)]
        found.setdefault(where, document(number))
        if len(found) == 2:
            return found
    raise AssertionError(f"all documents went to {list(found)}")


def test_answers_and_refusals_are_the_server_s_own(fleet: Fleet, folder: Path) -> None:
    text = document(0)
    answer = fleet.complete(text, max_tokens=8)
    llm = LLM(folder)
    ids = llm.tokenizer(text)["input_ids"]
    expected = llm.generate(ids, sampling=Sampling(max_new_tokens=8, temperature=0)).text
    assert answer.json()["choices"][0]["text"] == expected
    wrong = fleet.complete(text, odd=1)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "odd")
    assert fleet.complete(text, model="other").status_code == 404
    for path in ("/health", "/ready", "/v1/models"):
        assert httpx.get(fleet.url + path, timeout=60).status_code == 200
    named = httpx.get(f"{fleet.url}/health", headers={"X-Request-Id": "mine"}, timeout=60)
    assert named.headers.get_list("x-request-id") == ["mine"]


def test_questions_go_where_their_document_was_read(fleet: Fleet) -> None:
    cached = []
    for number in range(6):
        for question in ("", "Why?", "Who?"):
            usage = fleet.complete(document(number + 10) + question).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert all(cached[1::3])
    assert all(cached[2::3])
    assert len(fleet.samples("prefix_cache_hits_total")) == 2


def test_what_one_replica_keeps_is_asked_of_it_again(fleet: Fleet) -> None:
    for number in range(4):
        first = fleet.post("/v1/responses", {"input": f"Number {number}", "max_output_tokens": 2})
        body = {"input": "More", "previous_response_id": first.json()["id"]}
        again = fleet.post("/v1/responses", {**body, "max_output_tokens": 2})
        assert again.status_code == 200
    text = "Read ahead. " * 200
    assert fleet.post("/v1/documents", {"text": text}).status_code == 200
    user = {"role": "user", "content": f"{text}\n\nWhy?"}
    asked = fleet.post("/v1/chat/completions", {"messages": [user], "max_tokens": 2})
    assert asked.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_full_fleet_says_so_and_a_client_that_leaves_frees_its_place(fleet: Fleet) -> None:
    streams = [Stream(fleet, document(number)) for number in range(2 * PLACES)]
    assert {stream.status for stream in streams} == {200}
    refused = fleet.complete(document(0))
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    for stream in streams:
        stream.leave = True
    for stream in streams:
        stream.join(60)
    wait_for(lambda: sum(fleet.samples("num_requests_running").values()) == 0)
    assert all(stream.events[-1:] != ["[DONE]"] for stream in streams)
    assert fleet.complete(document(0)).status_code == 200


def test_a_killed_replica_ends_its_own_answers_only(fleet: Fleet) -> None:
    """Last: one of two replicas is then being started again."""
    (doomed_at, first), (safe_at, second) = placed(fleet).items()
    doomed, safe = Stream(fleet, first), Stream(fleet, second)
    wait_for(lambda: bool(doomed.events and safe.events))
    assert fleet.samples("num_requests_running") == {doomed_at: 1, safe_at: 1}
    fleet.process_of(doomed_at).kill()
    assert fleet.complete(first).status_code == 200
    doomed.join(60)
    safe.join(60)
    assert doomed.status == safe.status == 200
    assert json.loads(doomed.events[-2])["error"]["code"] == "replica_lost"
    assert json.loads(safe.events[-2])["choices"][0]["finish_reason"] == "length"
    assert doomed.events[-1] == safe.events[-1] == "[DONE]"


def test_the_application_is_what_was_asked_for() -> None:
    options = RayOptions.model_validate(
        {"replicas": "2", "max_replicas": 5, "settings": {"max_running": 3, "api_keys": ["key"]}}
    )
    assert options.settings.api_keys == ("key",)
    front = app(options)._bound_deployment
    replica = front.init_args[0]._bound_deployment
    scale = replica._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas) == (2, 5)
    assert scale.target_ongoing_requests == 3
    assert replica.max_queued_requests == options.settings.max_connections
    assert app(RayOptions(replicas=3))._bound_deployment.name == "front"


def test_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "key")
    _, options = app(RayOptions())._bound_deployment.init_args
    assert options.settings.api_keys == ("key",)
    assert KEY_VARIABLE == serve.KEY_VARIABLE


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas 2 is less than replicas 3"),
        ({"load_factor": 0.5}, "load_factor"),
        ({"settings": {"max_runing": 3}}, "max_runing"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RayOptions.model_validate(given)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "2"], "go with --ray"),
        (["--ray", "--tp", "2"], "cannot be combined"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "is less than --replicas 3"),
        (["--ray", "--prefill", "odd"], "odd"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", *arguments]) == 2
    assert said in capsys.readouterr().err
