"""Whatever a request says of sampling, HTTP gives the library's answer to it."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import serving, tiny_llm

from lazyahead import Sampling


@pytest.fixture(scope="module")
def server():
    with serving(tiny_llm()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


FIELDS = {
    "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    "top_p": st.sampled_from([0.3, 0.9, 1.0]),
    "top_k": st.sampled_from([-1, 0, 1, 20]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5]),
    "seed": st.integers(0, (1 << 63) - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=4),
    "stop": st.lists(st.sampled_from(["a", " t", "e", "th", "\n"]), max_size=3),
    "min_tokens": st.integers(0, 6),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(6, 16),
}
ASKED = st.fixed_dictionaries({"seed": FIELDS.pop("seed")}, optional=FIELDS)
WAYS = st.fixed_dictionaries({}, optional={"decode": st.sampled_from(["off", "lookahead"])})
TOKENS = st.lists(st.integers(5, 310), min_size=1, max_size=50)


def sampling(asked):
    values = dict(asked)
    values["max_new_tokens"] = values.pop("max_tokens", 16)
    values["min_new_tokens"] = values.pop("min_tokens", 0)
    values["top_k"] = max(0, values.get("top_k", 0))
    values["stop"] = tuple(values.get("stop", ()))
    values["logit_bias"] = {int(t): bias for t, bias in values.get("logit_bias", {}).items()}
    return Sampling(**values)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(asked=ASKED, way=WAYS, ids=TOKENS, n=st.integers(1, 2), stream=st.booleans())
def test_http_gives_the_librarys_answer(server, client, asked, way, ids, n, stream):
    given = server.llm.generate(ids, sampling=sampling(asked), n=n)
    expected = [(one.text, one.finish_reason) for one in (given if n > 1 else [given])]
    body = {**asked, "prompt": ids, "n": n, "lazyahead": way, "stream": stream}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert read(answer, n) == expected


def read(answer, n):
    """Text and finish reason of each choice."""
    if answer.headers["content-type"] == "application/json":
        chunks = [answer.json()]
    else:
        assert answer.text.endswith("data: [DONE]\n\n")
        events = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
        chunks = list(map(json.loads, events))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts, reasons = [""] * n, [None] * n
    for choice in choices:
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    return list(zip(texts, reasons, strict=True))
