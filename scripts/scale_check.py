"""Holds the simulation of a fleet against replicas under Ray Serve on this machine:

python scripts/scale_check.py costs.json [--model MODEL] --out docs/benchmarks/scale-check.json

8 documents of 2,000 tokens, 10 questions each, at random times. What depends on other work on the
machine (seconds on the clock) is given as ratios; compute is processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import psutil
from scale_simulation import ANSWER_TOKENS, Costs, Fleet, Setting

from lazyahead import LLM
from lazyahead.server.ray import RayOptions
from lazyahead.server.ray_run import cluster, deploy
from lazyahead.server.settings import Settings

LENGTH, NUM_DOCUMENTS, NUM_QUESTIONS, NUM_QUESTION_TOKENS = 2000, 8, 10, 32
PORT = 8127
SEEDS = 40


class Case(NamedTuple):
    """One fleet."""

    replicas: int
    routing: str
    cached_documents: int


CASES = (
    Case(1, "affinity", 8),
    Case(2, "least loaded", 8),
    Case(2, "affinity", 8),
    Case(2, "least loaded", 4),
    Case(2, "affinity", 4),
)


class Server:
    """A fleet that answers."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=300)

    def ask(self, prompt: list[int], num_tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
        """The usage of one greedy answer."""
        body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
        answer = self.client.post("/v1/completions", json=body)
        answer.raise_for_status()
        usage: dict[str, Any] = answer.json()["usage"]
        return usage


@contextmanager
def fleet(case: Case, model: str | None, dtype: str, each: int) -> Iterator[Server]:
    """Plain reading and decoding, one core a replica. `each`: bytes of a document."""
    room = int((case.cached_documents + 0.6) * each)
    options = RayOptions(
        model=model,
        dtype=dtype,
        prefill="off",
        decode="off",
        replicas=case.replicas,
        affinity=case.routing == "affinity",
        settings=Settings(cache_bytes=room, drain_s=1),
    )
    with cluster(options, num_cpus=2):
        deploy(options, "127.0.0.1", PORT)
        yield Server(f"http://127.0.0.1:{PORT}")


def document_bytes(model: str | None, dtype: str) -> int:
    """What the prefix cache takes for one document."""
    llm = LLM(model, dtype=dtype, prefill=None, prefix_cache_bytes=1 << 40)
    llm.read_ahead(tokens(random.Random(0), LENGTH))
    assert llm.engine.prefixes is not None
    return llm.engine.prefixes.cache.nbytes


def cpu_s(kind: str) -> float:
    """Processor seconds so far of our Ray processes of a kind."""
    found = 0.0
    for process in psutil.Process().children(recursive=True):
        if "".join(process.cmdline()).startswith(f"ray::{kind}"):
            times = process.cpu_times()
            found += times.user + times.system
    return found


def measure(case: Case, server: Server, rate: float) -> dict[str, float]:
    """Questions in a random order at random times; the first fifth finds cold caches."""
    rng = random.Random(1)
    documents = [tokens(rng, LENGTH) for _ in range(NUM_DOCUMENTS)]
    asked = list(range(NUM_DOCUMENTS)) * NUM_QUESTIONS
    rng.shuffle(asked)
    prompts = [documents[number] + tokens(rng, NUM_QUESTION_TOKENS) for number in asked]
    before, began = cpu_s("ServeReplica:lazyahead:replica"), time.perf_counter()
    with ThreadPoolExecutor(64) as pool:
        answers = []
        for prompt in prompts:
            answers.append(pool.submit(server.ask, prompt))
            time.sleep(rng.expovariate(rate * case.replicas))
        usages = [answer.result() for answer in answers]
    used = cpu_s("ServeReplica:lazyahead:replica") - before
    counted = usages[len(usages) // 5 :]
    return {
        "hit_rate": mean(hit(usage) for usage in counted),
        "ttft_mean_s": mean(usage["lazyahead"]["ttft_ms"] for usage in counted) / 1000,
        "compute_s_per_answer": used / len(prompts),
        "seconds": time.perf_counter() - began,
    }


def tokens(rng: random.Random, num: int) -> list[int]:
    """Of no meaning."""
    return [rng.randrange(5, 2000) for _ in range(num)]


def hit(usage: Mapping[str, Any]) -> bool:
    """Whether the document was found."""
    return bool(usage["prompt_tokens_details"]["cached_tokens"] > LENGTH // 2)


def simulate(
    case: Case, costs: Mapping[str, Any], rate: float, is_even: bool = False
) -> dict[str, float]:
    """What the simulation says of the same, mean over seeds. Which documents prefer which replica
    is drawn, as by a hash of names; `is_even`: as many prefer each."""
    setting = Setting(
        replicas=case.replicas,
        routing=case.routing,
        reading="full",
        cached_documents=case.cached_documents,
        documents_per_replica=NUM_DOCUMENTS // case.replicas,
        zipf=0.0,
        requests_per_replica=1,
        fewest_requests=NUM_DOCUMENTS * NUM_QUESTIONS,
        rate=rate,
        lengths=(LENGTH,),
    )
    found = []
    for seed in range(SEEDS):
        split = random.Random(seed)
        first = [split.randrange(case.replicas) for _ in range(NUM_DOCUMENTS)]
        if is_even:
            first = [number % case.replicas for number in range(NUM_DOCUMENTS)]
        ranks = {
            number: [favourite, *(set(range(case.replicas)) - {favourite})]
            for number, favourite in enumerate(first)
        }
        one = Fleet(replace(setting, seed=seed), Costs(costs, "full"), ranks)
        outcome = one.run()
        counted = one.ttfts[len(one.ttfts) // 5 :]
        found.append((outcome, mean(ttft for _, ttft, _ in counted)))
    return {
        "hit_rate": mean(outcome.hit_rate for outcome, _ in found),
        "ttft_mean_s": mean(ttft for _, ttft in found),
        "compute_s_per_answer": mean(outcome.busy_s_per_answer for outcome, _ in found),
    }


def overhead(server: Server) -> dict[str, float]:
    """Of the proxy and the front: processor milliseconds a request, and an event of a stream."""
    own = "ServeReplica:lazyahead:front"

    def used() -> float:
        return cpu_s(own) + cpu_s("ProxyActor")

    server.ask([5, 6, 7], 1)
    num, before, times = 200, used(), []
    for _ in range(num):
        began = time.perf_counter()
        server.client.get("/version").raise_for_status()
        times.append(time.perf_counter() - began)
    request = (used() - before) / num
    body = {"prompt": [5, 6, 7], "max_tokens": 1000, "ignore_eos": True, "stream": True}
    before = used()
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        num_events = sum(line.startswith("data:") for line in answer.iter_lines())
    event = (used() - before - request) / num_events
    return {
        "request_cpu_ms": 1000 * request,
        "request_ms_fastest": 1000 * min(times),
        "request_ms_median": 1000 * median(times),
        "event_cpu_ms": 1000 * event,
    }


def main() -> None:
    """Prints, and writes, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("costs", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--rate", type=float, default=0.5, help="questions a second and replica")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    costs = json.loads(given.costs.read_text(encoding="utf-8"))
    each = document_bytes(given.model, costs["dtype"])
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"costs": costs, "rate": given.rate, "rows": rows}
    for case in CASES:
        with fleet(case, given.model, costs["dtype"], each) as server:
            measured = measure(case, server, given.rate)
            if case == CASES[-1]:
                result["overhead"] = overhead(server)
        rows.append(
            {
                **case._asdict(),
                "measured": measured,
                "simulated": simulate(case, costs, given.rate),
                "simulated_even": simulate(case, costs, given.rate, is_even=True),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result.get("overhead")))


if __name__ == "__main__":
    main()
