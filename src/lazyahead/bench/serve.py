"""Load on an OpenAI server: requests at a rate or so many at once, and what came of them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from lazyahead.bench.serve_client import CHAT, COMPLETIONS, Ask, Outcome, Target, send, try_out
from lazyahead.bench.serve_metrics import spec_decode, spec_decode_counts
from lazyahead.bench.serve_prompts import (
    LocalTokens,
    RandomPrompts,
    ServerTokens,
    Tokens,
    data_prompts,
)
from lazyahead.checks import check_count
from lazyahead.errors import ConfigError, RequestError
from lazyahead.report import Report, silent

BACKENDS = {"openai": COMPLETIONS, "openai-chat": CHAT}
TIMEOUT = httpx.Timeout(6 * 3600.0, connect=30.0)


@dataclass(frozen=True)
class Load:
    """Which requests are sent, where, and how fast. Raises ConfigError."""

    url: str
    backend: str = "openai"
    endpoint: str | None = None
    """Path; None: the backend's own."""
    model: str | None = None
    """None: the first that the server names."""
    tokenizer: str | None = None
    """Counts the tokens of random prompts; None: the server does."""
    headers: dict[str, str] = field(default_factory=dict)
    data: Path | None = None
    """Prompts of a file or folder; None: random ones."""
    random: RandomPrompts = field(default_factory=RandomPrompts)
    output_len: int | None = None
    """Longest answer to a prompt of `data`; None: as the file says."""
    num_prompts: int = 100
    num_warmups: int = 0
    """Requests in front that are not counted, with prompts of their own."""
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ignore_eos: bool = False
    """Random prompts are always answered in full length, where the server can."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ConfigError(f"--backend is one of {known}, got {self.backend!r}")
        if not _is_url(self.url):
            raise ConfigError(f"--url must be like http://127.0.0.1:8000, got {self.url!r}")
        if self.endpoint is not None and not self.endpoint.startswith("/"):
            raise ConfigError(f"--endpoint must be a path like {CHAT}, got {self.endpoint!r}")
        check_count("--num-prompts", self.num_prompts, 1)
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                shown = name.replace("_", "-")
                raise ConfigError(f"--{shown} must be above 0, got {getattr(self, name)}")

    @property
    def base_url(self) -> str:
        """Without the `/v1` that clients want."""
        return self.url.rstrip("/").removesuffix("/v1")


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


class Run(NamedTuple):
    """What came of a load."""

    target: Target
    outcomes: list[Outcome]
    begin: float
    duration: float
    spec_decode: dict[str, Any]
    left_out: list[str]
    """Lines about prompts of the data that were not sent."""


async def measure_serve(load: Load, progress: Report = silent) -> Run:
    """Sends the requests and waits for all answers. Raises RequestError where there is no server,
    or it takes none of them."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=load.headers, timeout=TIMEOUT, limits=limits) as client:
        progress("asking the server")
        target = await _target(client, load)
        asks, left_out = await _asks(client, load, target.model)
        warmups, asks = asks[: load.num_warmups], asks[load.num_warmups :]
        for place, ask in enumerate(warmups):
            progress("warming up", place / len(warmups))
            await send(client, target, ask)
        before = await _counts(client, load)
        begin = time.perf_counter()
        outcomes = await _send_all(client, target, asks, load, progress)
        duration = time.perf_counter() - begin
        drafted = spec_decode(before, await _counts(client, load))
    return Run(target, outcomes, begin, duration, drafted, left_out)


async def _target(client: httpx.AsyncClient, load: Load) -> Target:
    model = load.model or await _first_model(client, load.base_url)
    target = Target(
        load.base_url,
        load.endpoint or BACKENDS[load.backend],
        model,
        load.extra_body,
        is_chat=load.backend == "openai-chat",
        ignore_eos=load.ignore_eos or load.data is None,
    )
    target = await try_out(client, target)
    if load.ignore_eos and "ignore_eos" in target.refused:
        raise RequestError(f"{load.base_url} does not take ignore_eos; leave out --ignore-eos")
    return target


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    try:
        answer = await client.get(f"{url}/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise RequestError(
            f"{url}/v1/models names no model ({type(error).__name__}: {error}); check --url, or "
            "name one with --model"
        ) from None


async def _asks(client: httpx.AsyncClient, load: Load, model: str) -> tuple[list[Ask], list[str]]:
    num = load.num_warmups + load.num_prompts
    if load.data is not None:
        asks, left_out = data_prompts(load.data, num, load.output_len)
        if len(asks) <= load.num_warmups:
            raise RequestError(
                f"{load.data} has {len(asks)} prompts, all of them for --num-warmups "
                f"{load.num_warmups}; ask for fewer"
            )
        return asks, left_out
    tokens: Tokens = (
        LocalTokens(load.tokenizer)
        if load.tokenizer is not None
        else ServerTokens(client, load.base_url, model)
    )
    return await load.random.draw(tokens, num, load.seed), []


async def _send_all(
    client: httpx.AsyncClient, target: Target, asks: Sequence[Ask], load: Load, progress: Report
) -> list[Outcome]:
    places = asyncio.Semaphore(load.max_concurrency or len(asks))
    num_done = 0

    async def send_one(ask: Ask, delay: float) -> Outcome:
        nonlocal num_done
        await asyncio.sleep(delay)
        async with places:
            outcome = await send(client, target, ask)
        num_done += 1
        progress(f"{num_done} of {len(asks)} requests", num_done / len(asks))
        return outcome

    progress(f"0 of {len(asks)} requests", 0.0)
    delays = arrival_times(len(asks), load.request_rate, load.burstiness, load.seed)
    return await asyncio.gather(*map(send_one, asks, delays))


def arrival_times(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When requests are sent: gaps of a gamma distribution (burstiness 1: a Poisson process), so
    stretched that the last is sent after num / rate seconds, as in vLLM."""
    if math.isinf(rate):
        return [0.0] * num
    gaps = np.ones(num)
    if not math.isinf(burstiness):
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, num)
    times = gaps.cumsum()
    return [float(value) for value in times * (num / rate / times[-1])]


async def _counts(client: httpx.AsyncClient, load: Load) -> dict[str, float]:
    with suppress(httpx.HTTPError):
        answer = await client.get(f"{load.base_url}/metrics")
        if answer.status_code == 200:
            return spec_decode_counts(answer.text)
    return {}
