"""The real `openai` client against a running server: what it gets is what the library gives."""

import openai
import pytest
from serving import serving, tiny_llm

from lazyahead import Sampling

DOCUMENT = "The code of the red door is 417. " * 12 + "\n\nWhat is it?"
MESSAGES = [{"role": "user", "content": DOCUMENT}]


@pytest.fixture(scope="module")
def server():
    with serving(tiny_llm()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def chat(client, model, **options):
    return client.chat.completions.create(
        model=model, messages=MESSAGES, **{"max_tokens": 8, **options}
    )


def expected(server, **options):
    stream = server.llm.chat(MESSAGES, sampling=Sampling(**{"max_new_tokens": 8, **options}))
    return "".join(piece.text for piece in stream)


def test_a_chat_is_answered_as_by_the_library(server, client, model):
    answer = chat(client, model)
    assert answer.choices[0].message.content == expected(server)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    lazy = answer.usage.model_extra["lazyahead"]
    assert 0 < lazy["prompt_tokens_computed"] < 1
    assert lazy["ttft_ms"] > 0


def test_a_stream_folds_to_the_same_answer_and_ends_with_its_usage(server, client, model):
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(server)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_several_answers_are_those_of_consecutive_seeds(server, client, model):
    answer = chat(client, model, n=3, temperature=1.0, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [expected(server, temperature=1.0, seed=5 + place) for place in range(3)]
    assert answer.usage.completion_tokens == 24
    chunks = list(chat(client, model, n=3, temperature=1.0, seed=5, stream=True))
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_completions_go_on_without_a_template(server, client, model):
    ids = server.llm.tokenizer("The code of")["input_ids"]
    text = server.llm.generate(ids, sampling=Sampling(max_new_tokens=6)).text
    for prompt in ("The code of", ids):
        done = client.completions.create(model=model, prompt=prompt, max_tokens=6)
        assert done.choices[0].text == text
    both = client.completions.create(model=model, prompt=["The code of"] * 2, max_tokens=6)
    assert [choice.text for choice in both.choices] == [text] * 2
    assert both.usage.prompt_tokens == 2 * len(ids)
    echoed = client.completions.create(model=model, prompt="The code of", max_tokens=6, echo=True)
    assert echoed.choices[0].text == "The code of" + text
    parts = client.completions.create(
        model=model, prompt="The code of", max_tokens=6, echo=True, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == "The code of" + text


def test_log_probabilities_belong_to_the_tokens_and_the_best_is_the_greedy_one(client, model):
    answer = chat(client, model, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob <= 0
        assert token.top_logprobs[0].token == token.token
    streamed = [
        token
        for chunk in chat(client, model, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in content]
    done = client.completions.create(model=model, prompt="The code", max_tokens=4, logprobs=2)
    found = done.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4
    assert found.text_offset[0] == 0


def test_stop_texts_end_the_answer(server, client, model):
    whole = expected(server, max_new_tokens=20)
    stop = whole[5:8]
    answer = chat(client, model, max_tokens=20, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_client_that_leaves_ends_the_answer(server, client, model):
    stream = chat(client, model, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    server.until_idle()


def test_details_join_to_prompt_and_answer(server, client, model):
    asked = {"lazyahead": {"detail": True}}
    chunks = list(chat(client, model, stream=True, max_tokens=30, extra_body=asked))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    details = [choice.model_extra["lazyahead"] for choice in choices if choice.model_extra]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert "".join(span["text"] for detail in details for span in detail["spans"]) == text
    reading = details[0]["reading"]
    assert DOCUMENT.strip() in "".join(reading["tokens"])
    assert len(reading["tokens"]) == len(reading["depth"]) == details[0]["stats"]["prompt_tokens"]
    depth = list(reading["depth"])
    for detail in details:
        for place, new in zip(*(detail.get("revived") or {"": [], " ": []}).values(), strict=True):
            assert depth[place] < new <= reading["num_layers"]
            depth[place] = new
    share = sum(depth) / len(depth) / reading["num_layers"]
    assert share == pytest.approx(details[-1]["stats"]["prompt_tokens_computed"])
    folded = chat(client, model, max_tokens=30, extra_body=asked).choices[0]
    whole = folded.model_extra["lazyahead"]
    assert "".join(span["text"] for span in whole["spans"]) == text == folded.message.content
    assert whole["reading"] == reading


def test_each_request_may_choose_how_it_is_read_and_drafted(server, client, model):
    for prefill, decode in (("off", "off"), ("paper", "lookahead"), ("off", "lookahead")):
        asked = {"lazyahead": {"prefill": prefill, "decode": decode}}
        answer = chat(client, model, extra_body=asked)
        lazy = answer.usage.model_extra["lazyahead"]
        assert (lazy["prompt_tokens_computed"] == 1) == (prefill == "off")
        if decode == "off":
            assert lazy["tokens_per_step"] == 1


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "at most 0"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"extra_body": {"guided_json": {}}}, "guided_json", "not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"n": 100}, "n", "at most 16"),
        ({"max_tokens": 10**6}, "max_tokens", "at most"),
        ({"stop": ["x"] * 20}, "stop", "at most 16"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "pattern"),
        ({"logit_bias": {"9999": 1}}, None, "below"),
        ({"top_logprobs": 3}, None, "logprobs: true"),
        ({"extra_body": {"lazyahead": {"prefill": "/etc/x.toml"}}}, "lazyahead.prefill", "preset"),
        ({"extra_body": {"lazyahead": {"deep": 1}}}, "lazyahead.deep", "not supported"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_refused_by_name(client, model, options, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as error:
        chat(client, model, **options)
    assert error.value.body["param"] == param
    assert error.value.body["type"] == "invalid_request_error"


def test_nothing_given_as_null_or_as_nothing_is_refused(client, model):
    options = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "seed": None,
    }
    assert chat(client, model, **options, user="me", extra_body={"unknown": None}).choices


def test_other_models_are_not_found(client, model):
    with pytest.raises(openai.NotFoundError, match="'gpt-4'"):
        chat(client, "gpt-4")
    assert client.models.retrieve(model).model_extra["max_model_len"] == 1024


def test_a_prompt_beyond_the_context_is_refused(client, model):
    with pytest.raises(openai.BadRequestError, match="context") as error:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "a red door " * 5000}]
        )
    assert error.value.code == "context_length_exceeded"


def test_parts_of_a_message_are_one_text(client, model):
    parts = [{"type": "text", "text": "The code"}, {"type": "text", "text": "of the door"}]
    for content in (parts, "The code\nof the door"):
        answer = client.chat.completions.create(
            model=model,
            max_tokens=5,
            messages=[{"role": "developer", "content": "a"}, {"role": "user", "content": content}],
        )
        texts = {answer.choices[0].message.content}
    assert len(texts) == 1


# --- responses ------------------------------------------------------------------------------------


def test_a_response_goes_on_where_the_one_before_ended(server, client, model):
    first = client.responses.create(model=model, input=DOCUMENT, max_output_tokens=8)
    assert first.output_text == expected(server)
    assert first.status == "incomplete"
    second = client.responses.create(
        model=model, input="And then?", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.usage.input_tokens_details.cached_tokens > 50
    again = client.responses.create(
        model=model, input="And then?", previous_response_id=first.id, max_output_tokens=8
    )
    assert again.usage.input_tokens_details.cached_tokens == 0  # its session has gone on
    events = list(
        client.responses.create(
            model=model,
            input=[{"role": "user", "content": [{"type": "input_text", "text": "More"}]}],
            previous_response_id=second.id,
            max_output_tokens=8,
            stream=True,
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == text
    assert events[-1].response.usage.input_tokens_details.cached_tokens > 60


def test_responses_that_are_not_kept_cannot_be_continued(server, client, model):
    told = client.responses.create(model=model, input="Hi", max_output_tokens=2, store=False)
    for unknown in (told.id, "resp_none"):
        with pytest.raises(openai.NotFoundError, match=unknown):
            client.responses.create(model=model, input="And?", previous_response_id=unknown)
    server.until_idle()


# --- what the server tells of itself --------------------------------------------------------------


def test_tokens_go_both_ways(server):
    told = server.post("/tokenize", {"prompt": "The code", "return_token_strs": True}).json()
    assert told["tokens"] == server.llm.tokenizer("The code")["input_ids"]
    assert told["count"] == len(told["token_strs"])
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "The code"}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert "<|user|>" in server.llm.tokenizer.decode(chat)
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_health_version_metrics_and_page_are_there(server):
    server.post("/v1/completions", {"prompt": "a a a a a a", "max_tokens": 20})
    assert server.get("/health").json() == server.get("/ready").json() == {"status": "ok"}
    assert "version" in server.get("/version").json()
    metrics = server.get("/metrics").text
    for name in (
        "num_requests_running",
        "time_to_first_token_seconds_bucket",
        "generation_tokens_total",
        'request_success_total{finished_reason="length"',
        "prompt_share_computed_sum",
    ):
        assert f"lazyahead:{name}" in metrics
    assert server.get("/").status_code == 200


def test_a_request_keeps_its_id(server):
    assert (
        server.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    strange = server.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert strange != "a b"
    answer = server.post("/v1/completions", {"prompt": 3}, headers={"X-Request-Id": "abc-2"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, "abc-2")
