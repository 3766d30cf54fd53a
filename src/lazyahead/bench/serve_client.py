"""One request to an OpenAI server, timed while its stream arrives."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from lazyahead.errors import RequestError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DROPPABLE = ("continuous_usage_stats", "stream_options", "ignore_eos")
"""Fields without which a request can be measured still, in the order in which they are left out
where a server refuses them."""
ERROR_CHARS = 300


@dataclass(frozen=True)
class Ask:
    """A prompt, and how long its answer may be."""

    text: str
    max_tokens: int
    prompt_tokens: int | None = None
    """As a tokenizer counts them, where one was asked; what the server says goes before."""


@dataclass
class Outcome:
    """What came of one request. Times are in seconds."""

    started: float
    """By `time.perf_counter`."""
    success: bool = False
    error: str = ""
    ttft: float = 0.0
    """From the request to the first text."""
    latency: float = 0.0
    """From the request to the end of the answer."""
    itl: list[float] = field(default_factory=list)
    """Between tokens where `is_per_token`, else between chunks."""
    is_per_token: bool = False
    """Each chunk said how many tokens the answer has so far."""
    is_counted: bool = False
    """The server said how many tokens the answer has; else its chunks were counted."""
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int = 0
    text: str = ""


class StreamError(Exception):
    """The stream cannot be counted as an answer."""


class Arrivals:
    """Folds the chunks of a stream into an Outcome.

    A chunk of k tokens that comes g seconds after the one before counts as k times g / k. Tokens
    that come with the first one have no time between them, and count for nothing.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.is_finished = False
        self._num_chunks = 0
        self._tokens: int | None = 0
        """So far; None once a chunk with text did not say."""
        self._latest = 0.0
        self._total: int | None = None

    def add(self, chunk: Any, now: float) -> None:
        """A chunk that came at `now`. Raises StreamError where it is an error."""
        if not isinstance(chunk, dict):
            raise StreamError(f"a chunk must be a JSON object, got {chunk!r:.80}")
        if error := chunk.get("error"):
            message = error.get("message", error) if isinstance(error, dict) else error
            raise StreamError(f"the stream ended with an error: {message}"[:ERROR_CHARS])
        count = self._usage(chunk.get("usage"))
        for choice in (chunk.get("choices") or ())[:1]:
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            self.outcome.text += text
            self.outcome.latency = now - self.outcome.started
            self.is_finished |= choice.get("finish_reason") is not None
            grows = count is not None and self._tokens is not None and count > self._tokens
            if text or grows:
                self._arrive(count, now)

    def end(self) -> None:
        """The answer is whole."""
        outcome = self.outcome
        outcome.success = True
        outcome.is_per_token = self._tokens is not None
        outcome.is_counted = self._total is not None
        outcome.output_tokens = self._num_chunks if self._total is None else self._total
        if not self._num_chunks:
            outcome.ttft = outcome.latency

    def _usage(self, usage: dict[str, Any] | None) -> int | None:
        """Answer tokens so far, where the chunk says."""
        if not usage:
            return None
        self.outcome.prompt_tokens = usage.get("prompt_tokens", self.outcome.prompt_tokens)
        details = usage.get("prompt_tokens_details") or {}
        self.outcome.cached_tokens = details.get("cached_tokens") or 0
        self._total = usage.get("completion_tokens", self._total)
        return self._total

    def _arrive(self, count: int | None, now: float) -> None:
        outcome, before = self.outcome, self._tokens
        self._num_chunks += 1
        self._tokens = None if before is None else count
        if self._num_chunks == 1:
            outcome.ttft = now - outcome.started
        else:
            num = 1 if before is None or count is None else count - before
            if num < 1:  # text that belongs to tokens that were counted
                return
            outcome.itl += [(now - self._latest) / num] * num
        self._latest = now


@dataclass(frozen=True)
class Target:
    """Where requests go, and what all of them say."""

    url: str
    """Without a path."""
    path: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of the body."""
    is_chat: bool = False
    ignore_eos: bool = False
    refused: tuple[str, ...] = ()
    """Of `DROPPABLE`, what the server does not take."""

    def body(self, ask: Ask) -> dict[str, Any]:
        what: dict[str, Any] = {"prompt": ask.text}
        if self.is_chat:
            what = {"messages": [{"role": "user", "content": ask.text}]}
        options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}
        if "continuous_usage_stats" in self.refused:
            del options["continuous_usage_stats"]
        fields = {"model": self.model, **what, "max_tokens": ask.max_tokens, "stream": True}
        if "stream_options" not in self.refused:
            fields["stream_options"] = options
        if self.ignore_eos and "ignore_eos" not in self.refused:
            fields["ignore_eos"] = True
        return fields | self.extra


async def send(client: httpx.AsyncClient, target: Target, ask: Ask) -> Outcome:
    """Sends one request and reads its answer. An error is part of the outcome."""
    outcome = Outcome(time.perf_counter(), prompt_tokens=ask.prompt_tokens)
    arrivals = Arrivals(outcome)
    try:
        async with client.stream("POST", target.url + target.path, json=target.body(ask)) as got:
            if got.status_code != 200:
                await got.aread()
                raise StreamError(f"HTTP {got.status_code}: {got.text}"[:ERROR_CHARS])
            async for line in got.aiter_lines():
                if not line.startswith("data:"):
                    continue
                text = line.removeprefix("data:").strip()
                if text == "[DONE]":
                    arrivals.is_finished = True
                    break
                arrivals.add(json.loads(text), time.perf_counter())
        if not arrivals.is_finished:
            raise StreamError("the stream ended before the answer did")
        arrivals.end()
    except (StreamError, httpx.HTTPError, ValueError) as error:
        name = "" if isinstance(error, StreamError) else f"{type(error).__name__}: "
        outcome.error = f"{name}{error}"
    return outcome


async def try_out(client: httpx.AsyncClient, target: Target) -> Target:
    """The target less the fields that its server refuses by name. Raises RequestError where even
    the rest is not answered."""
    while True:
        outcome = await send(client, target, Ask("Hi", 1))
        if outcome.success:
            return target
        named = [
            name
            for name in DROPPABLE
            if name in outcome.error
            and name not in target.refused
            and outcome.error.startswith(("HTTP 400", "HTTP 422"))
        ]
        if not named:
            raise RequestError(
                f"{target.url}{target.path} does not answer a first request: {outcome.error}; "
                "check --url, --model and --backend"
            )
        target = replace(target, refused=(*target.refused, named[0]))
