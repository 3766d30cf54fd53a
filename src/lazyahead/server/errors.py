"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lazyahead.engine.worker import WorkerDeadError
from lazyahead.errors import (
    ConfigError,
    ContextLengthError,
    LazyAheadError,
    OutOfMemoryError,
    RequestError,
)

MAX_MESSAGE = 1000  # characters
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


_TOLD: tuple[tuple[type[LazyAheadError], int, str | None], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (RequestError, 400, None),
    (ConfigError, 400, None),
    (WorkerDeadError, 503, "worker_dead"),
    (OutOfMemoryError, 503, "out_of_memory"),
    (LazyAheadError, 500, "pass_failed"),
)
"""Errors whose message a caller may read, the more special ones first."""


class ApiError(Exception):
    """An answer other than 200: `status`, and what `{"error": ...}` says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message[:MAX_MESSAGE],
                "type": _TYPES.get(self.status, default),
                "param": self.param and self.param[:MAX_MESSAGE],
                "code": self.code,
            }
        }

    def response(self) -> Response:
        content = json.dumps(self.body).encode()  # ASCII: half characters do no harm
        return Response(content, self.status, self.headers, "application/json")


def busy(retry_after_s: int = 1) -> ApiError:
    return ApiError(
        429,
        f"the server is busy and its queue is full; try again in {retry_after_s} s",
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down; ask another, or try again later",
        code="shutting_down",
        headers={"Retry-After": "10"},
    )


def timed_out(timeout_s: float) -> ApiError:
    return ApiError(
        504,
        f"the request took longer than the {timeout_s:g} s that this server allows; "
        "ask for fewer tokens",
        code="request_timeout",
    )


def as_api_error(error: BaseException) -> ApiError:
    """What a caller is told of an exception; of one that is no fault of theirs, its kind only."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code in _TOLD:
        if isinstance(error, kind):
            headers = {"Retry-After": "10"} if status == 503 else None
            return ApiError(status, str(error), code=code, headers=headers)
    return ApiError(500, f"the server failed ({type(error).__name__})", code="internal_error")


def install(app: FastAPI) -> None:
    """Every error of the app gets this shape."""

    def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation(error).response()

    def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    def other(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(HTTPException)(http)
    for kind in (ApiError, LazyAheadError, Exception):
        app.exception_handler(kind)(other)


def _validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, and which field it is."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body" and not _is_kind(part)]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{param!r} is not supported here; leave it out",
            param=param,
            code="unsupported_parameter",
        )
    said = str(first["msg"]).removeprefix("Value error, ")
    message = f"{param!r}: {said}" if param else said
    return ApiError(400, message, param=param, code="invalid_value")


def _is_kind(part: object) -> bool:
    """Whether a part of a location is a name of pydantic's for one type of several."""
    return isinstance(part, str) and (part in ("str", "int", "list") or "[" in part)
