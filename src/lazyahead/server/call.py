"""A request that one process hands to another, and the answer as it comes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from lazyahead.server.affinity import document_key
from lazyahead.server.responses import replica_of

_log = logging.getLogger(__name__)
_FIELDS = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "client",
    "server",
)
_END_S = 5.0
"""How long an app may take to notice that the client has gone."""


@dataclass(frozen=True)
class Call:
    """One HTTP request, whole."""

    scope: dict[str, Any]
    body: bytes
    document: str
    """Says what it is about: alike for prompts that begin alike."""
    replica: str | None = None
    """Which replica has what it refers to; None: any."""

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Call:
        """From a scope that has passed the gate, whose name for the request it keeps."""
        headers = [pair for pair in scope["headers"] if pair[0].lower() != b"x-request-id"]
        headers.append((b"x-request-id", scope["state"]["request_id"].encode()))
        plain = {name: scope[name] for name in _FIELDS if name in scope}
        asked = _read(body)
        document = document_key(asked).encode(errors="surrogatepass")
        previous = asked.get("previous_response_id")
        return cls(
            {**plain, "headers": headers},
            body,
            hashlib.blake2b(document, digest_size=16).hexdigest(),
            replica_of(previous) if isinstance(previous, str) else None,
        )


def _read(body: bytes) -> dict[str, Any]:
    """What is no JSON object is about nothing; the replica says what is wrong with it."""
    with suppress(ValueError, RecursionError):
        asked = json.loads(body)
        if isinstance(asked, dict):
            return asked
    return {}


async def answer(app: ASGIApp, call: Call) -> AsyncGenerator[Message]:
    """What the app sends in answer. Where the generator is closed early, the app hears that its
    client has gone."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    has_left, is_told = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal is_told
        if not is_told:
            is_told = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(dict(call.scope), receive, sent.put)
        except Exception:
            _log.exception("the app failed")
        finally:
            sent.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
    finally:
        has_left.set()
        await asyncio.shield(_end(running))


async def _end(running: asyncio.Task[None]) -> None:
    _, late = await asyncio.wait({running}, timeout=_END_S)
    for task in late:
        task.cancel()
