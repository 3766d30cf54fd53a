"""What stands in front of replicas: refusals keep their status, lost replicas are replaced or told
of, and nobody computes for a client that has gone. No Ray here."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from serving import serving, tiny_llm
from starlette.types import Message

from lazyahead.server.affinity import document_key, order, rank
from lazyahead.server.call import Call, answer
from lazyahead.server.fleet_metrics import together
from lazyahead.server.front import Fronting, ReplicaLostError, front_app, unnamed
from lazyahead.server.responses import replica_of, response_id
from lazyahead.server.settings import Settings

BODY = {"prompt": "Hello", "max_tokens": 4, "stream": True}
HEAD: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"own")],
}


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Replicas:
    """Answers each call by the next of some scripts: messages, and exceptions to raise."""

    def __init__(self, *scripts: list[Message | Exception]) -> None:
        self.scripts = list(scripts)
        self.calls: list[Call] = []
        self.num_closed = 0

    async def __call__(self, call: Call) -> AsyncGenerator[Message]:
        self.calls.append(call)
        try:
            for message in self.scripts.pop(0):
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            self.num_closed += 1


async def no_metrics() -> dict[str, bytes]:
    return {}


def post(
    replicas: Any, path: str = "/v1/completions", body: Any = BODY, **settings: Any
) -> httpx.Response:
    fronting = Fronting(Settings(**settings))
    transport = httpx.ASGITransport(front_app(fronting, replicas, no_metrics))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            answer = await client.post(path, json=body)
        assert fronting.admission.num_taken == 0
        return answer

    return asyncio.run(ask())


def last(answer: httpx.Response) -> dict[str, Any]:
    """The last event but [DONE]."""
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    if events[-1] == "[DONE]":
        events.pop()
    found: dict[str, Any] = json.loads(events[-1])
    return found


def test_an_answer_is_passed_on_as_it_comes() -> None:
    replicas = Replicas([HEAD, part(b"data: 1\n\n"), part(b"data: [DONE]\n\n", False)])
    answer = post(replicas)
    assert (answer.status_code, answer.text) == (200, "data: 1\n\ndata: [DONE]\n\n")
    assert replicas.num_closed == 1
    (call,) = replicas.calls
    name = dict(call.scope["headers"])[b"x-request-id"].decode()
    assert answer.headers.get_list("x-request-id") == [name]
    assert json.loads(call.body) == BODY


def test_a_refusal_keeps_its_status() -> None:
    full: Message = {
        "type": "http.response.start",
        "status": 429,
        "headers": [(b"retry-after", b"1")],
    }
    answer = post(Replicas([full, part(b"{}", False)]))
    assert (answer.status_code, answer.headers["retry-after"], answer.text) == (429, "1", "{}")


def test_a_replica_lost_before_its_answer_is_replaced_once() -> None:
    done = part(b"data: 1\n\ndata: [DONE]\n\n", False)
    lost = ReplicaLostError()
    replicas = Replicas([HEAD, part(b": waiting\n\n"), lost], [HEAD, done])
    answer = post(replicas)
    assert answer.text == ": waiting\n\ndata: 1\n\ndata: [DONE]\n\n"
    assert len(replicas.calls) == 2
    answer = post(Replicas([lost], [lost]))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "replica_lost"
    refused: Message = {"type": "http.response.start", "status": 429, "headers": []}
    answer = post(Replicas([HEAD, part(b": waiting\n\n"), lost], [refused, part(b"{}", False)]))
    assert last(answer)["error"]["code"] == "replica_lost"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_replica_lost_in_mid_answer_ends_it_with_an_error(path: str) -> None:
    replicas = Replicas([HEAD, part(b"data: 1\n\n"), ReplicaLostError()])
    answer = post(replicas, path)
    assert answer.text.startswith("data: 1\n\n")
    told = last(answer)
    if path == "/v1/responses":
        assert "event: error\n" in answer.text
        assert (told["type"], told["code"]) == ("error", "replica_lost")
    else:
        assert told["error"]["code"] == "replica_lost"
        assert answer.text.endswith("data: [DONE]\n\n")
    assert len(replicas.calls) == 1


def test_what_comes_from_no_replica_is_refused_at_the_gate() -> None:
    replicas = Replicas()
    assert post(replicas, api_keys=("key",)).status_code == 401
    assert post(replicas, max_body_bytes=10).status_code == 413
    assert post(replicas, allowed_hosts=("other",)).status_code == 403
    assert not replicas.calls


def test_no_replica_within_the_time_is_a_504() -> None:
    async def never(call: Call) -> AsyncGenerator[Message]:
        await asyncio.sleep(1000)
        yield HEAD

    assert post(never, request_timeout_s=0.05).status_code == 504


def drive(app: Any, receive: Callable[[], Awaitable[Message]]) -> list[Message]:
    """Runs one POST to its end."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent


def test_a_client_that_leaves_ends_its_answer() -> None:
    closed = False

    async def endless(call: Call) -> AsyncGenerator[Message]:
        nonlocal closed
        try:
            yield HEAD
            yield part(b"data: 1\n\n")
            await asyncio.sleep(1000)
        finally:
            closed = True

    told: list[Message] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        await asyncio.sleep(0.05)
        return told.pop(0)

    fronting = Fronting(Settings())
    drive(front_app(fronting, endless, no_metrics), receive)
    assert closed
    assert fronting.admission.num_taken == 0


def test_an_end_lets_answers_go_on_and_then_says_so() -> None:
    fronting = Fronting(Settings())

    async def endless(call: Call) -> AsyncGenerator[Message]:
        yield HEAD
        yield part(b"data: 1\n\n")
        await fronting.drain(0.1)  # as from outside
        yield part(b"data: 2\n\n")

    told: list[Message] = [{"type": "http.request", "body": b"{}"}]

    async def receive() -> Message:
        if told:
            return told.pop()
        await asyncio.sleep(1000)
        raise AssertionError

    sent = drive(front_app(fronting, endless, no_metrics), receive)
    text = b"".join(message.get("body", b"") for message in sent)
    assert b'"code": "shutting_down"' in text
    assert b"data: 2" not in text
    told.append({"type": "http.request", "body": b"{}"})
    refused = drive(front_app(fronting, endless, no_metrics), receive)
    assert refused[0]["status"] == 503


def test_a_proxy_that_names_answers_has_them_without_a_name() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        await send(part(b"", False))

    assert drive(unnamed(app), lambda: asyncio.sleep(0))[0]["headers"] == HEAD["headers"][:1]


def test_an_app_answers_a_call_as_it_answers_over_http() -> None:
    with serving(tiny_llm()) as server:
        body = {**BODY, "prompt": "abc " * 40, "stream": False}
        expected = server.post("/v1/completions", body).json()["choices"]

        async def ask() -> httpx.Response:
            fronting = Fronting(Settings(model_name="x"))
            front = front_app(fronting, lambda call: answer(server.app, call), no_metrics)
            transport = httpx.ASGITransport(front)
            async with httpx.AsyncClient(transport=transport, base_url="http://f") as client:
                wrong = await client.post("/v1/completions", json={"prompt": "a", "odd": 1})
                assert wrong.status_code == 400
                assert (await client.get("/health")).json() == {"status": "ok"}
                return await client.post("/v1/completions", json=body)

        assert asyncio.run(ask()).json()["choices"] == expected

        async def leave() -> None:
            state = {"request_id": "1"}
            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "headers": [],
                "state": state,
            }
            long = {**BODY, "max_tokens": 900, "ignore_eos": True}
            messages = answer(server.app, Call.of(scope, json.dumps(long).encode()))
            async for message in messages:
                if message.get("body"):
                    break
            await messages.aclose()

        asyncio.run(leave())
        server.until_idle()


def test_pages_of_metrics_become_one() -> None:
    page = b'# HELP a:b_total Some.\n# TYPE a:b_total counter\na:b_total{m="x"} 2.0\n'
    text = together({"one": page, "two": page}).decode()
    assert text.count("# TYPE") == 1
    assert 'a:b_total{m="x",replica="one"} 2.0' in text
    assert 'a:b_total{m="x",replica="two"} 2.0' in text


def test_a_response_s_name_says_where_it_is_kept() -> None:
    assert replica_of(response_id("abc")) == "abc"
    assert replica_of(response_id("")) is None
    state = {"request_id": "1"}
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": state}
    body = {"input": "More", "previous_response_id": response_id("abc")}
    assert Call.of(scope, json.dumps(body).encode()).replica == "abc"
    assert Call.of(scope, b"[").replica is None


def test_a_document_read_ahead_has_the_key_of_its_questions() -> None:
    text, system = "A long document. " * 200, "Answer shortly."
    user = {"role": "user", "content": f"{text}\n\nWhy?"}
    chat = {"messages": [{"role": "system", "content": system}, user]}
    keys = {
        document_key(body)
        for body in (
            chat,
            {"text": text, "system": system},
            {"input": text, "instructions": system},
        )
    }
    assert len(keys) == 1


def test_full_replicas_are_asked_last() -> None:
    names = ["a", "b", "c"]
    best = rank("document", names)
    loads = {name: 2 if name == best[0] else 0 for name in names}
    assert order("document", loads, 4.0) == best
    assert order("document", loads, 4.0, places=2) == [*best[1:], best[0]]
    assert order("document", dict.fromkeys(names, 2), 4.0, places=2) == best
