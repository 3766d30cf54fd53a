"""`bench serve` against our server and against one that answers as it is told."""

import asyncio
import json
import math
import threading
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from serving import serving, tiny_llm
from starlette.responses import JSONResponse, StreamingResponse

from lazyahead.bench.serve import Load, arrival_times, measure_serve
from lazyahead.bench.serve_client import Arrivals, Outcome, StreamError
from lazyahead.bench.serve_metrics import figures, spec_decode, spec_decode_counts
from lazyahead.bench.serve_prompts import RandomPrompts
from lazyahead.cli import run
from lazyahead.errors import RequestError


def chunk(text, finish_reason=None, usage=None):
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return {"choices": [choice], **({"usage": usage} if usage else {})}


def count(tokens):
    return {"prompt_tokens": 5, "completion_tokens": tokens}


def fold(*timed):
    """Chunks and when they came, of a request sent at 0."""
    outcome = Outcome(0.0)
    arrivals = Arrivals(outcome)
    for at, one in timed:
        arrivals.add(one, at)
    arrivals.end()
    return outcome


# --- chunks to times ------------------------------------------------------------------------------


def test_a_chunk_of_several_tokens_counts_as_several():
    outcome = fold(
        (1.0, chunk("a", usage=count(1))),
        (1.6, chunk("bcd", usage=count(4))),
        (2.0, chunk("e", "length", usage=count(5))),
        (2.5, {"choices": [], "usage": count(5)}),
    )
    assert outcome.itl == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert outcome.is_per_token
    assert outcome.is_counted
    assert (outcome.ttft, outcome.latency) == (1.0, 2.0)
    assert (outcome.output_tokens, outcome.prompt_tokens) == (5, 5)
    assert outcome.text == "abcde"


def test_without_counts_times_are_between_chunks_and_the_end_says_how_many_tokens():
    outcome = fold((1.0, chunk("a")), (1.6, chunk("bcd")), (1.7, chunk("", "stop", usage=count(4))))
    assert outcome.itl == pytest.approx([0.6])
    assert not outcome.is_per_token
    assert outcome.is_counted
    assert outcome.output_tokens == 4
    assert outcome.latency == 1.7


def test_without_any_usage_chunks_are_counted():
    outcome = fold((1.0, chunk("a")), (1.6, chunk("b", "stop")))
    assert not outcome.is_counted
    assert outcome.output_tokens == 2


def test_an_opening_chunk_without_text_is_not_the_first_token():
    role = {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}
    text = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}
    assert fold((0.1, role), (1.0, text)).ttft == 1.0


def test_an_error_in_a_stream_is_no_answer():
    with pytest.raises(StreamError, match="too late"):
        fold((1.0, {"error": {"message": "too late"}}))
    with pytest.raises(StreamError, match="too late"):
        fold((1.0, {"error": "too late"}))
    with pytest.raises(StreamError, match="JSON object"):
        fold((1.0, ["text"]))


# --- figures --------------------------------------------------------------------------------------


def outcome(started, ttft, latency, tokens):
    gaps = [(latency - ttft) / (tokens - 1)] * (tokens - 1) if tokens > 1 else []
    return Outcome(started, True, "", ttft, latency, gaps, True, True, 10, 0, tokens)


def test_figures_are_those_of_vllm():
    outcomes = [outcome(0, 1, 2, 11), outcome(0.5, 2, 2, 1), Outcome(0.1, error="HTTP 429: busy")]
    found = figures(
        outcomes, 4.0, percentiles=(50, 99.5), goodput={"ttft": 1500, "e2el": 3000, "tpot": 100}
    )
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 12)
    assert found["request_throughput"] == 0.5
    assert found["request_goodput"] == 0.25
    assert found["output_throughput"] == 3.0
    assert found["total_token_throughput"] == 8.0
    assert found["mean_ttft_ms"] == found["p50_ttft_ms"] == 1500
    assert found["p99.5_ttft_ms"] == pytest.approx(1995)
    assert found["mean_tpot_ms"] == 100  # an answer of one token has none
    assert len([name for name in found if name.endswith("_itl_ms")]) == 5
    assert found["max_concurrent_requests"] == 2


def test_without_answers_there_are_no_percentiles():
    found = figures([Outcome(0.0, error="x")], 1.0)
    assert found["median_ttft_ms"] is None
    assert found["request_goodput"] is None
    assert found["max_concurrent_requests"] == 0


def test_drafts_are_read_from_metrics_of_either_server():
    ours = 'lazyahead:spec_decode_num_drafts_total{model_name="a"} 3.0\n'
    theirs = "vllm:spec_decode_num_draft_tokens_total 8\n# vllm:spec_decode_num_drafts_total 9\n"
    assert spec_decode_counts(ours + theirs) == {"drafts": 3, "draft_tokens": 8}
    after = {"drafts": 4, "draft_tokens": 10, "accepted_tokens": 5}
    found = spec_decode({"drafts": 2, "draft_tokens": 2, "accepted_tokens": 1}, after)
    assert found["spec_decode_acceptance_rate"] == 50
    assert found["spec_decode_acceptance_length"] == 3
    assert spec_decode(after, after) == {}


def test_requests_are_sent_at_the_rate_asked_for():
    assert arrival_times(3, math.inf, 1.0, 0) == [0, 0, 0]
    assert arrival_times(4, 2.0, math.inf, 0) == [0.5, 1.0, 1.5, 2.0]
    times = arrival_times(100, 10.0, 0.5, 3)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(10)
    assert times == arrival_times(100, 10.0, 0.5, 3) != arrival_times(100, 10.0, 0.5, 4)


# --- our own server -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with serving(tiny_llm()) as server:
        yield server


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_our_server_is_measured_per_token(server, capsys, backend):
    options = ["--num-prompts", "5", "--input-len", "40", "--output-len", "12", "--json"]
    command = ["bench", "serve", "--url", f"{server.url}/v1", "--backend", backend, *options]
    assert run([*command, "--num-warmups", "1", "--max-concurrency", "2", "--save-detailed"]) == 0
    found = last_line(capsys)
    assert {"lazyahead", "machine", "model", "config", "seed", "runs"} <= found.keys()
    assert (found["completed"], found["failed"]) == (5, 0)
    assert found["total_output_tokens"] == 60
    assert (found["itl_per"], found["output_tokens_from"]) == ("token", "usage")
    assert all(len(gaps) <= 11 for gaps in found["itls"])
    assert found["max_concurrent_requests"] <= 2
    if backend == "openai":
        assert all(abs(num - 40) <= 2 for num in found["input_lens"])
    server.until_idle()


def test_the_same_seed_sends_the_same_prompts(server):
    async def draw(seed):
        load = Load(server.url, num_prompts=2, random=RandomPrompts(20, 2, 0.5, 5), seed=seed)
        return [one.prompt_tokens for one in (await measure_serve(load)).outcomes]

    first, same, other = (asyncio.run(draw(seed)) for seed in (1, 1, 2))
    assert first == same
    assert all(10 + 5 <= num <= 30 + 5 + 3 for num in first + other)


def test_prompts_of_a_file_are_answered_as_long_as_it_says(server, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": "The code is", "max_new_tokens": 3}, {"prompt": "The door", "answers": "x"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    command = ["bench", "serve", "--url", server.url, "--data", str(path), "--json"]
    assert run([*command, "--ignore-eos", "--num-prompts", "1", "--save-detailed"]) == 0
    assert last_line(capsys)["output_lens"] == [3]
    assert run([*command, "--ignore-eos", "--output-len", "2", "--save-detailed"]) == 0
    assert last_line(capsys)["output_lens"] == [2, 2]


def test_the_result_is_written_to_a_file(server, tmp_path, capsys):
    options = ["--num-prompts", "1", "--input-len", "8", "--output-len", "1", "--save-result"]
    command = ["bench", "serve", "--url", server.url, *options, "--result-dir", str(tmp_path)]
    assert run(command) == 0
    assert "requests answered" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("openai-infqps-")
    assert json.loads(file.read_text())["completed"] == 1


# --- other servers --------------------------------------------------------------------------------


def sse(*chunks, done=True):
    lines = [f"data: {json.dumps(one)}\n\n" for one in chunks]
    return "".join([": reading\n\n", *lines, "data: [DONE]\n\n" if done else ""])


class Fake:
    """Answers completions with what `reply(body, number)` gives: text of a stream, or a response.
    Refuses the fields named."""

    def __init__(self, reply, refuses=()):
        self.bodies = []
        self.app = FastAPI()

        @self.app.get("/v1/models")
        async def models():
            return {"data": [{"id": "fake"}]}

        @self.app.post("/v1/completions")
        async def completions(request: Request):
            body = await request.json()
            for name in refuses:
                if name in json.dumps(body):
                    return JSONResponse({"error": f"unknown field {name}"}, 422)
            self.bodies.append(body)
            made = reply(body, len(self.bodies))
            if not isinstance(made, str):
                return made
            return StreamingResponse(iter([made]), media_type="text/event-stream")


@contextmanager
def running(fake):
    config = uvicorn.Config(fake.app, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Hello {n}"}) for n in range(4)))
    return path


def measure(url, data, **options):
    return asyncio.run(measure_serve(Load(url, data=data, **options)))


def whole(body, number):
    return sse(chunk("ab"), chunk("cd", "stop"))


def test_a_server_that_counts_nothing_is_measured_by_chunks(data):
    with running(Fake(whole)) as url:
        run = measure(url, data)
    found = figures(run.outcomes, run.duration)
    assert (found["itl_per"], found["output_tokens_from"]) == ("chunk", "chunks")
    assert found["completed"] == 4
    assert found["total_input_tokens"] is None
    assert found["total_output_tokens"] == 8


def test_fields_that_a_server_refuses_are_left_out_and_told(data):
    fake = Fake(whole, refuses=["continuous_usage_stats", "stream_options"])
    with running(fake) as url:
        assert measure(url, data).target.refused == ("continuous_usage_stats", "stream_options")
    assert all("stream_options" not in body for body in fake.bodies)


def test_a_field_that_was_asked_for_is_not_left_out(data):
    with (
        running(Fake(whole, refuses=["ignore_eos"])) as url,
        pytest.raises(RequestError, match="--ignore-eos"),
    ):
        measure(url, data, ignore_eos=True)


def test_requests_that_fail_are_counted_with_their_reasons(data):
    def reply(body, number):
        if number == 2:
            return JSONResponse({"error": {"message": "full"}}, 429, {"Retry-After": "1"})
        if number == 3:
            return sse(chunk("ab"), {"error": {"message": "shutting down"}})
        if number == 4:
            return sse(chunk("ab"), done=False)
        return whole(body, number)

    with running(Fake(reply)) as url:
        run = measure(url, data, max_concurrency=1)
    full, failed, cut, good = run.outcomes
    assert full.error.startswith("HTTP 429")
    assert "shutting down" in failed.error
    assert "before the answer did" in cut.error
    assert good.success


def test_a_connection_that_breaks_is_a_failed_request(data):
    def reply(body, number):
        async def broken():
            yield sse(chunk("ab"), done=False)
            raise OSError

        return StreamingResponse(broken()) if number > 1 else whole(body, number)

    with running(Fake(reply)) as url:
        run = measure(url, data)
    assert not any(one.success for one in run.outcomes)
    assert all("RemoteProtocolError" in one.error for one in run.outcomes)


def test_where_no_request_is_answered_the_command_fails(data, capsys):
    def reply(body, number):
        return JSONResponse({}, 503) if number > 1 else whole(body, number)

    with running(Fake(reply)) as url:
        assert run(["bench", "serve", "--url", url, "--data", str(data), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["failed"] == 4
    assert "HTTP 503" in err


def test_extra_fields_and_headers_are_sent_and_keys_are_not_told(data, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    fake = Fake(whole)
    with running(fake) as url:
        options = ["--extra-body", '{"top_k": 3}', "--temperature", "0.5", "--header", "X-A=b"]
        assert run(["bench", "serve", "--url", url, "--data", str(data), "--json", *options]) == 0
    assert fake.bodies[-1]["top_k"] == 3
    assert fake.bodies[-1]["temperature"] == 0.5
    out = capsys.readouterr().out
    assert "very-secret" not in out
    assert json.loads(out.splitlines()[-1])["config"]["headers"] == ["Authorization", "X-A"]


def test_random_prompts_need_something_that_counts_tokens():
    with running(Fake(whole)) as url, pytest.raises(RequestError, match="--tokenizer FOLDER"):
        asyncio.run(measure_serve(Load(url)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--url", "127.0.0.1:8000"], "127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["--url", "http://[::1"], "http://[::1"),
        (["--url", "http://"], "'http://'"),
        (["--endpoint", "completions"], "completions"),
        (["--backend", "tgi"], "tgi"),
        (["--dataset-name", "sharegpt"], "sharegpt"),
        (["--dataset-name", "custom"], "--data PATH"),
        (["--data", "x", "--dataset-name", "random"], "leave it out"),
        (["--data", "x", "--input-len", "9"], "--random-input-len 9"),
        (["--request-rate", "0"], "--request-rate"),
        (["--burstiness", "-1"], "--burstiness"),
        (["--goodput", "itl:5"], "itl:5"),
        (["--goodput", "ttft:soon"], "ttft:soon"),
        (["--percentile-metrics", "ttft,tbt"], "tbt"),
        (["--metric-percentiles", "101"], "101"),
        (["--random-range-ratio", "1"], "--random-range-ratio"),
        (["--extra-body", "[1]"], "--extra-body"),
        (["--header", "nothing"], "nothing"),
        (["--result-dir", "x"], "--save-result"),
        (["--save-detailed"], "--save-detailed"),
        (["--save-result", "--result-dir", "/no/such"], "/no/such"),
        (["--use-beam-search"], "--use-beam-search"),
    ],
)
def test_bad_options_are_named(capsys, options, named):
    assert run(["bench", "serve", *options]) == 2
    err = capsys.readouterr().err
    assert named in err
    assert len(err.splitlines()) == 1


def test_usage_in_every_chunk_goes_with_usage_at_the_end(server):
    body = {"prompt": "Hi", "stream": True, "stream_options": {"continuous_usage_stats": True}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "include_usage" in answer.json()["error"]["message"]
