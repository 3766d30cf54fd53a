"""What every request passes before an endpoint sees it: its name, the API key, the limits on bodies
and on how many may be inside, the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lazyahead.server import log
from lazyahead.server.admission import Admission
from lazyahead.server.errors import ApiError, shutting_down
from lazyahead.server.metrics import Metrics
from lazyahead.server.service import tenant_name
from lazyahead.server.settings import Settings

OPEN = ("/", "/health", "/ready")
"""Paths that need no key: the page asks for one itself."""
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/documents")
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PORT = re.compile(r":[0-9]*$")
_DISCARD = 64 << 20
"""Bytes of a refused body that are still read, so that its sender sees the answer."""


class Guarded(Protocol):
    """What the gate asks of what is behind it."""

    settings: Settings
    metrics: Metrics
    admission: Admission
    is_draining: bool


class Gate:
    """Middleware around the whole app."""

    def __init__(self, app: ASGIApp, service: Guarded) -> None:
        self._app, self._service = app, service
        self._keys = [_digest(key.encode()) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers.get(b"x-request-id", b""))
        status = 499  # the client left before an answer

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        scope.setdefault("state", {})
        scope["state"]["request_id"] = request_id
        try:
            await self._pass(scope, headers, receive, send_named)
        finally:
            if status >= 400:
                self._service.metrics.refused(status)
            log.write(self._service.settings, scope, status, began, request_id)

    async def _pass(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        is_post = scope["method"] == "POST"
        admission = self._service.admission
        try:
            self._check_host(headers)
            scope["state"]["tenant"] = self._tenant(scope, headers)
            may_generate = is_post and scope["path"] in GENERATES
            if may_generate:
                if self._service.is_draining:
                    raise shutting_down()
                admission.enter()
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        try:
            if is_post:
                body = await self._body(headers, receive)
                receive = _replay(body, receive)
            await self._app(scope, receive, send)
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
        finally:
            if may_generate:
                admission.leave()

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        allowed = self._service.settings.allowed_hosts
        host = _PORT.sub("", headers.get(b"host", b"").decode("latin-1").lower())
        if allowed and host not in allowed:
            raise ApiError(
                403,
                f"this server is not called {host!r}; start it with --allowed-host for that name",
                code="host_not_allowed",
            )

    def _tenant(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Whose key came with it. Raises ApiError (401)."""
        is_open = scope["path"] in OPEN or scope["method"] == "OPTIONS"
        if not self._keys or is_open:
            return tenant_name(None)
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._keys]  # all of them
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "this server asks for an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return tenant_name(key.strip().decode("ascii", "replace"))

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """All of it. Raises ApiError for one that is too large or too slow."""
        most = self._service.settings.max_body_bytes
        told = headers.get(b"content-length", b"0")
        too_large = ApiError(
            413, f"the body is larger than the {most} bytes that this server takes"
        )
        if not told.isdigit() or int(told) > most:
            raise too_large
        timeout_s = self._service.settings.body_timeout_s
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client has closed the connection")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {timeout_s:g} s") from None
        return b"".join(parts)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, after what is left of the body: a connection that is closed before it was sent
        loses the answer."""
        size = 0
        try:
            async with asyncio.timeout(self._service.settings.body_timeout_s):
                while scope["method"] == "POST" and error.status != 408 and size < _DISCARD:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await error.response()(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then what comes after it: the news that the client has left."""
    is_told = False

    async def again() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _request_id(given: bytes) -> str:
    """As the client named it, where that is plain text."""
    text = given.decode("ascii", "replace")
    return text if _ID.fullmatch(text) else uuid.uuid4().hex


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing them tells nothing."""
    return hashlib.sha256(key).digest()
