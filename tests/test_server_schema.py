"""Requests drawn from the OpenAPI document: none fails the server, every answer is as documented.

A long run: `LAZYAHEAD_EXAMPLES=1000 pytest tests/test_server_schema.py` (examples per endpoint).
"""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import serving, tiny_llm

from lazyahead.server.app import create_app

NUM_EXAMPLES = int(os.environ.get("LAZYAHEAD_EXAMPLES", "8"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
DOCUMENT = create_app(tiny_llm()).openapi()
OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]


@pytest.fixture(scope="module")
def server():
    with serving(tiny_llm(), max_tokens=16) as server:
        yield server


def served(body):
    """The same request, within what this server has and allows, so that most are answered."""
    within = {"n": 2, "max_tokens": 16, "max_completion_tokens": 16, "max_output_tokens": 16}
    least = {name: min(body[name], most) for name, most in within.items() if body.get(name)}
    if "lazyahead" in body:
        least["lazyahead"] = {**(body["lazyahead"] or {}), "prefill": "off", "namespace": None}
    unknown = ("model", "previous_response_id", "logit_bias", "min_tokens")
    return {name: value for name, value in {**body, **least}.items() if name not in unknown}


@pytest.mark.parametrize("mode", GenerationMode, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_every_answer_is_as_documented(server, operation, mode):
    can_be_wrong = any(body.media_type == "application/json" for body in operation.body)
    if not can_be_wrong and mode == GenerationMode.NEGATIVE:
        pytest.skip("nothing can be wrong with it")

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def every_answer_is_as_documented(case):
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = served(case.body)
        case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=300)

    every_answer_is_as_documented()


def test_after_all_that_nothing_is_left(server):
    server.until_idle()
    assert server.get("/health").status_code == 200


def test_the_document_names_every_endpoint():
    paths = DOCUMENT["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"} <= set(paths)
    for path in paths.values():
        for operation in path.values():
            assert "422" not in operation["responses"]
