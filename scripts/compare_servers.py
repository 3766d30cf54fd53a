"""`lazyahead serve` beside `transformers serve`, and beside the library itself, on one model.

Starts the servers, one thread each, and sends them the same prompts in turns, so that only one of
them computes at a time and a machine that slows down slows all of them. The last line of stdout is
one JSON object. Needs the extra `serve`, and for transformers' server its extra `serving`.

    .venv/bin/python scripts/compare_servers.py --concurrency 1 4 16 --input-len 2048
    .venv/bin/python scripts/compare_servers.py --model FOLDER --overhead 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import torch

from lazyahead import LLM, Lookahead, Sampling
from lazyahead.bench.machine import machine
from lazyahead.bench.serve import Load, measure_serve
from lazyahead.bench.serve_client import Ask, Outcome, Target, send, try_out
from lazyahead.bench.serve_metrics import figures
from lazyahead.bench.serve_prompts import LocalTokens, RandomPrompts
from lazyahead.cli.options import BUILT_IN
from lazyahead.reader import reader_path

ENV = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
OURS = "lazyahead serve"
THEIRS = ("transformers serve", "transformers serve, continuous batching")
READY_S = 180


class Server(NamedTuple):
    """A process that serves the model."""

    url: str
    process: psutil.Process


class Side(NamedTuple):
    """What is measured: a server, and what requests to it say besides."""

    name: str
    server: Server
    extra: dict[str, Any]


@contextmanager
def started(command: Sequence[str], port: int) -> Iterator[Server]:
    """A server, for as long as the block runs."""
    url = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(list(command), env=os.environ | ENV, **quiet) as process:  # type: ignore[call-overload]
        try:
            end = time.monotonic() + READY_S
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)} does not start")
                time.sleep(0.5)
            yield Server(url, psutil.Process(process.pid))
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def cpu_of(server: Server) -> float:
    """Seconds of a processor that the server has used."""
    times = server.process.cpu_times()
    return float(times.user + times.system)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def our_server(given: argparse.Namespace) -> Iterator[Server]:
    port = free_port()
    code = "from lazyahead.cli import main; main()"
    options = ("--model", given.model, "--dtype", given.dtype, "--port", str(port))
    with started((sys.executable, "-c", code, "serve", *options), port) as server:
        yield server


@contextmanager
def their_server(given: argparse.Namespace, *more: str) -> Iterator[Server]:
    port = free_port()
    script = str(Path(sys.executable).with_name("transformers"))
    options = ("--port", str(port), "--device", "cpu", "--dtype", given.dtype, *more)
    with started((script, "serve", given.model, *options), port) as server:
        yield server


def sides(stack: ExitStack, given: argparse.Namespace) -> list[Side]:
    """Two ways of reading of ours, two of theirs. Answers are as long as asked on all of them."""
    ours = stack.enter_context(our_server(given))
    length = {"min_new_tokens": given.output_len, "do_sample": False}
    asked = {"generation_config": json.dumps(length)}
    own = [
        Side(f"{OURS}, prefill {name}", ours, {"lazyahead": {"prefill": name}})
        for name in ("off", "balanced")
    ]
    plain = Side(THEIRS[0], stack.enter_context(their_server(given)), asked)
    batching = stack.enter_context(their_server(given, "--continuous-batching"))
    return [plain, Side(THEIRS[1], batching, asked), *own]


async def measure(given: argparse.Namespace, found: Sequence[Side]) -> list[dict[str, Any]]:
    """Each side at each concurrency, in turns. Throughput is the median of the rounds; requests of
    all rounds count for percentiles."""
    rows: list[dict[str, Any]] = []
    for concurrency in given.concurrency:
        outcomes: dict[str, list[Outcome]] = {side.name: [] for side in found}
        speeds: dict[str, list[float]] = {side.name: [] for side in found}
        cpu: dict[str, list[float]] = {side.name: [] for side in found}
        for turn in range(given.runs):
            for side in found:
                load = load_of(given, side, concurrency, seed=turn)
                before = cpu_of(side.server)
                run = await measure_serve(load)
                cpu[side.name].append((cpu_of(side.server) - before) / len(run.outcomes))
                outcomes[side.name] += run.outcomes
                done = sum(one.success for one in run.outcomes)
                speeds[side.name].append(done / run.duration)
        for side in found:
            rows.append(row(side.name, concurrency, outcomes[side.name], speeds, cpu, rows))
    return rows


def load_of(given: argparse.Namespace, side: Side, concurrency: int, seed: int) -> Load:
    is_ours = side.name.startswith(OURS)
    return Load(
        side.server.url,
        model=None if is_ours else given.model,
        tokenizer=given.model,
        random=RandomPrompts(given.input_len, given.output_len),
        num_prompts=max(concurrency, given.num_prompts),
        max_concurrency=concurrency,
        extra_body=side.extra,
        seed=1000 * concurrency + seed,
    )


def row(
    name: str,
    concurrency: int,
    outcomes: Sequence[Outcome],
    speeds: dict[str, list[float]],
    cpu: dict[str, list[float]],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """A side's figures, and its ratios to transformers' plain server."""
    found = figures(outcomes, 1.0, percentiles=(50, 99))
    kept = ("p50_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "completed", "failed")
    told: dict[str, Any] = {"server": name, "concurrency": concurrency}
    told |= {"request_throughput": median(speeds[name]), "cpu_s_per_request": median(cpu[name])}
    told |= {key: found[key] for key in kept}
    base = next(
        (r for r in rows if (r["server"], r["concurrency"]) == (THEIRS[0], concurrency)), told
    )
    paired = zip(speeds[name], speeds[THEIRS[0]], strict=True)
    told["throughput_ratio"] = median(own / other for own, other in paired)
    told["cpu_ratio"] = base["cpu_s_per_request"] / told["cpu_s_per_request"]
    if told["completed"] and base["completed"]:
        told["ttft_ratio"] = base["p50_ttft_ms"] / told["p50_ttft_ms"]
    print(told, file=sys.stderr, flush=True)
    return told


async def overhead(given: argparse.Namespace, ours: Server) -> dict[str, Any]:
    """Requests one by one over HTTP, each beside the same one by the library in this process:
    times by the clock, and by the processor, which a busy machine disturbs less."""
    llm = LLM(given.model, dtype=given.dtype, device="cpu", decode=Lookahead())
    prompts = RandomPrompts(given.input_len, given.output_len)
    asks = await prompts.draw(LocalTokens(given.model), given.overhead + 2, 0)
    wall, cpu = [], []
    async with httpx.AsyncClient(timeout=600) as client:
        name = httpx.get(f"{ours.url}/v1/models").json()["data"][0]["id"]
        target = Target(ours.url, "/v1/completions", name, ignore_eos=True)
        target = await try_out(client, target)
        for place, ask in enumerate(asks):
            pair = []
            for is_http in (place % 2 == 0, place % 2 == 1):
                pair.append((is_http, await _timed(client, target, ask, ours, llm, is_http)))
            (_, http), (_, own) = sorted(pair, reverse=True)
            if place >= 2:  # the first ones warm up
                wall.append(http[0] / own[0])
                cpu.append(http[1] / own[1])
    return {
        "pairs": len(wall),
        "wall_ratio": median(wall),
        "wall_ratio_quartiles": [float(value) for value in np.percentile(wall, (25, 75))],
        "cpu_ratio": median(cpu),
        "cpu_ratio_quartiles": [float(value) for value in np.percentile(cpu, (25, 75))],
    }


async def _timed(
    client: httpx.AsyncClient, target: Target, ask: Ask, ours: Server, llm: LLM, is_http: bool
) -> tuple[float, float]:
    """Seconds by the clock and by the processor."""
    if is_http:
        before = cpu_of(ours)
        outcome = await send(client, target, ask)
        assert outcome.success, outcome.error
        return outcome.latency, cpu_of(ours) - before
    sampling = Sampling(max_new_tokens=ask.max_tokens, ignore_eos=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    llm.generate(llm.tokenizer(ask.text)["input_ids"], sampling=sampling)
    return time.perf_counter() - start, time.process_time() - start_cpu


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default=str(reader_path()), help="folder; left out: the built-in reader"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--input-len", type=int, default=2048)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=4, help="at least; a round")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument(
        "--overhead", type=int, default=0, metavar="N", help="N requests beside the library instead"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    given = arguments(argv)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if given.overhead:
            server = stack.enter_context(our_server(given))
            results = asyncio.run(overhead(given, server))
        else:
            results = {"rows": asyncio.run(measure(given, sides(stack, given)))}
    told = {
        "lazyahead": version("lazyahead"),
        "machine": machine(torch.device("cpu"), getattr(torch, given.dtype)),
        "model": BUILT_IN if given.model == str(reader_path()) else Path(given.model).name,
        "config": {k: v for k, v in vars(given).items() if k not in ("runs", "model")},
        "seed": 0,
        "runs": given.runs,
    }
    print(json.dumps(told | results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
