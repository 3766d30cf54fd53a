"""A fleet of replicas, simulated pass by pass from measured costs (`scripts/scale_costs.py`):

python scripts/scale_simulation.py costs.json --out docs/benchmarks/scale.json --plot docs/scale.png

Questions about documents arrive at random; documents are as popular as Zipf's law says. A replica
reads one prompt at a time, then takes a decode step for all that it answers, and keeps the
documents that were asked about last. The router is that of the server.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, count
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, NamedTuple

from lazyahead.server.affinity import LOAD_FACTOR, bound, rank

LENGTHS = (1000, 2000, 4000)
ANSWER_TOKENS = 32
ROW_COST = 0.05
"""What each further answer adds to a decode step, as a fraction of it."""


@dataclass(frozen=True)
class Setting:
    """One fleet and what is asked of it."""

    replicas: int = 100
    routing: str = "affinity"
    """`affinity`, or `least loaded`: of two replicas drawn at random."""
    reading: str = "lazy"
    """`full` or `lazy`."""
    cached_documents: int = 8
    """Documents that a replica keeps."""
    documents_per_replica: int = 20
    zipf: float = 1.0
    requests_per_replica: int = 40
    fewest_requests: int = 2000
    rate: float = 0.15
    """Requests a second and replica."""
    load_factor: float = LOAD_FACTOR
    seed: int = 0
    lengths: tuple[int, ...] = LENGTHS
    """Tokens of documents, in turn."""


class Outcome(NamedTuple):
    """What became of the requests; the first fifth, which finds cold caches, is left out."""

    hit_rate: float
    ttft_p50_s: float
    ttft_p99_s: float
    busy_s_per_answer: float
    utilisation: float


@dataclass
class Replica:
    """One process with one model."""

    name: str
    capacity: int
    queue: deque[tuple[float, int, int]] = field(default_factory=deque)
    """Prompts that wait: when they came, their document, their number."""
    running: list[int] = field(default_factory=list)
    """Tokens left of each answer."""
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)
    is_busy: bool = False

    @property
    def load(self) -> int:
        return len(self.queue) + len(self.running)

    def holds(self, document: int) -> bool:
        """Whether the document is kept; it is then the latest."""
        found = document in self.kept
        self.kept[document] = None
        self.kept.move_to_end(document)
        if len(self.kept) > self.capacity:
            self.kept.popitem(last=False)
        return found


class Costs:
    """Seconds of passes, from the measured points."""

    def __init__(self, measured: Mapping[str, Any], reading: str) -> None:
        self._points = {point["length"]: point for point in measured[reading]}

    def read(self, length: int, is_kept: bool) -> float:
        """Seconds to the first token of an answer."""
        return float(self._points[length]["question_s" if is_kept else "cold_s"])

    def step(self, num_answers: int) -> float:
        """Seconds of a decode step."""
        one: float = mean(point["step_s"] for point in self._points.values())
        return one * (1 + ROW_COST * (num_answers - 1))


class Fleet:
    """Runs one setting."""

    def __init__(self, setting: Setting, costs: Costs, ranks: dict[int, list[int]]) -> None:
        self.setting = setting
        self.costs = costs
        self.rng = random.Random(setting.seed)
        self.replicas = [
            Replica(f"replica-{i}", setting.cached_documents) for i in range(setting.replicas)
        ]
        self._ranks = ranks
        self._events: list[tuple[float, int, int]] = []
        self._order = count()
        self._num_open = 0
        self.busy_s = 0.0
        self.ttfts: list[tuple[int, float, bool]] = []

    def run(self) -> Outcome:
        """All requests to their end."""
        setting, now = self.setting, 0.0
        num = max(setting.requests_per_replica * setting.replicas, setting.fewest_requests)
        documents = setting.documents_per_replica * setting.replicas
        weights = list(accumulate((i + 1) ** -setting.zipf for i in range(documents)))
        for number in range(num):
            now += self.rng.expovariate(setting.rate * setting.replicas)
            self._run_until(now)
            document = bisect(weights, self.rng.random() * weights[-1])
            replica = self._route(document)
            self._num_open += 1
            replica.queue.append((now, document, number))
            self._wake(replica, now)
        end = self._run_until(float("inf"))
        counted = [item for item in self.ttfts if item[0] >= num // 5]
        times = quantiles([ttft for _, ttft, _ in counted], n=100)
        return Outcome(
            hit_rate=mean(is_kept for _, _, is_kept in counted),
            ttft_p50_s=times[49],
            ttft_p99_s=times[98],
            busy_s_per_answer=self.busy_s / num,
            utilisation=self.busy_s / (end * setting.replicas),
        )

    def _route(self, document: int) -> Replica:
        if self.setting.routing != "affinity":
            return min(self.rng.choices(self.replicas, k=2), key=lambda replica: replica.load)
        limit = bound(self._num_open + 1, len(self.replicas), self.setting.load_factor)
        order = self._ranks.get(document)
        if order is None:
            places = {replica.name: i for i, replica in enumerate(self.replicas)}
            order = [places[name] for name in rank(str(document), list(places))]
            self._ranks[document] = order
        return next(self.replicas[i] for i in order if self.replicas[i].load < limit)

    def _wake(self, replica: Replica, now: float) -> None:
        if not replica.is_busy:
            replica.is_busy = True
            heapq.heappush(self._events, (now, next(self._order), int(replica.name[8:])))

    def _run_until(self, until: float) -> float:
        """Passes that begin before then; returns when the last began."""
        now = 0.0
        while self._events and self._events[0][0] < until:
            now, _, index = heapq.heappop(self._events)
            replica = self.replicas[index]
            took = self._pass(replica, now)
            if took:
                self.busy_s += took
                heapq.heappush(self._events, (now + took, next(self._order), index))
            else:
                replica.is_busy = False
        return now

    def _pass(self, replica: Replica, now: float) -> float:
        """One prompt, then one decode step for all answers; 0 where there is nothing to do."""
        took = 0.0
        if replica.running:
            took = self.costs.step(len(replica.running))
            left = [tokens - 1 for tokens in replica.running if tokens > 1]
            self._num_open -= len(replica.running) - len(left)
            replica.running = left
        if replica.queue:
            lengths = self.setting.lengths
            came, document, number = replica.queue.popleft()
            is_kept = replica.holds(document)
            took += self.costs.read(lengths[document % len(lengths)], is_kept)
            self.ttfts.append((number, now + took - came, is_kept))
            replica.running.append(ANSWER_TOKENS - 1)
        return took


def sweep(measured: Mapping[str, Any], base: Setting, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Fleets of several sizes, then caches and reading and routing at one size."""
    settings = [
        replace(base, replicas=size, routing=routing, reading=reading)
        for size in sizes
        for routing in ("least loaded", "affinity")
        for reading in ("full", "lazy")
    ]
    settings += [
        replace(base, cached_documents=kept, routing=routing, reading=reading)
        for kept in (1, 2, 4, 16, 32, 64)
        for routing in ("least loaded", "affinity")
        for reading in ("full", "lazy")
    ]
    settings += [replace(base, load_factor=factor) for factor in (1.0, 1.25, 1.5, 3.0, 4.0)]
    settings += [replace(base, zipf=zipf) for zipf in (0.5, 0.8, 1.2)]
    ranks: dict[int, dict[int, list[int]]] = {}
    rows = []
    for setting in settings:
        known = ranks.setdefault(setting.replicas, {})
        fleet = Fleet(setting, Costs(measured, setting.reading), known)
        outcome = {name: round(value, 4) for name, value in fleet.run()._asdict().items()}
        rows.append({**asdict(setting), **outcome})
    return rows


def plot(rows: Sequence[Mapping[str, Any]], base: Setting, path: Path) -> None:
    """TTFT and compute by fleet size, and by cache size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex="col")
    shown = (("ttft_p99_s", "TTFT p99, s"), ("busy_s_per_answer", "compute per answer, s"))
    columns = (("replicas", "replicas"), ("cached_documents", "documents kept by a replica"))
    usual = asdict(base)
    for column, (name, label) in enumerate(columns):
        for line, (value, title) in enumerate(shown):
            axis = axes[line][column]
            for routing in ("least loaded", "affinity"):
                for reading in ("full", "lazy"):
                    own = {**usual, "routing": routing, "reading": reading}
                    same = {key: own[key] for key in own if key != name}
                    points = sorted(
                        (row[name], row[value])
                        for row in rows
                        if all(row[key] == wanted for key, wanted in same.items())
                    )
                    style = "-" if routing == "affinity" else "--"
                    colour = "tab:blue" if reading == "lazy" else "tab:orange"
                    text = f"{routing}, {reading}"
                    axis.plot(
                        *zip(*points, strict=True), style, marker="o", color=colour, label=text
                    )
            axis.set_xscale("log")
            axis.set_ylabel(title)
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes[1][column].set_xlabel(label)
    axes[1][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Simulates, then writes a table and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("costs", type=Path)
    parser.add_argument("--rate", type=float, default=Setting.rate)
    parser.add_argument("--sizes", default="1,3,10,30,100,300,1000")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    measured = json.loads(given.costs.read_text(encoding="utf-8"))
    base = Setting(rate=given.rate)
    rows = sweep(measured, base, [int(size) for size in given.sizes.split(",")])
    result = {"costs": measured, "base": asdict(base), "rows": rows}
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(rows, base, given.plot)
    print(json.dumps({"rows": len(rows), "last": rows[-1]}))


if __name__ == "__main__":
    main()
