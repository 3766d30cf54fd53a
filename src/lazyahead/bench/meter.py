"""Instruments put into an engine: what its passes and its drafter cost."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lazyahead.draft.budget import RowCost, Step
from lazyahead.draft.drafter import DraftRequest
from lazyahead.draft.tree import Draft, Source
from lazyahead.hf.segment import Segment
from lazyahead.llm import LLM


@dataclass
class Meter:
    """Counts and times since the last `reset`."""

    draft_s: float = 0.0
    """CPU time of proposing, learning and indexing the answer."""
    index_s: float = 0.0
    """CPU time of indexing prompts."""
    passes: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Rows of a decoding pass -> seconds of each such pass."""

    def reset(self) -> None:
        self.draft_s = self.index_s = 0.0
        self.passes.clear()

    @property
    def num_passes(self) -> int:
        return sum(map(len, self.passes.values()))

    @property
    def num_rows(self) -> int:
        return sum(rows * len(seconds) for rows, seconds in self.passes.items())

    def modelled_s(self, cost: RowCost) -> float:
        """The passes, were each to cost what `cost` says."""
        return sum(cost.seconds(rows) * len(seconds) for rows, seconds in self.passes.items())


def row_cost(*meters: Meter) -> RowCost | None:
    """What rows cost, from the passes that were counted; None where there were none.

    Noise only adds, and so do rows: the best pass with as many rows or more is nearest to the
    truth.
    """
    best: dict[int, float] = {}
    for meter in meters:
        for rows, seconds in meter.passes.items():
            best[rows] = min(seconds) if rows not in best else min(best[rows], *seconds)
    points: list[tuple[int, float]] = []
    lowest = float("inf")
    for rows in sorted(best, reverse=True):
        lowest = min(lowest, best[rows])
        points.append((rows, lowest))
    return RowCost(points) if points else None


@contextmanager
def metered(llm: LLM, remember: bool = True) -> Iterator[Meter]:
    """Inside, the engine's passes and drafting are counted. Without `remember` no answer is
    remembered."""
    meter = Meter()
    engine = llm.engine
    runner = engine.runner
    drafter = engine.drafter
    engine.runner = _TimedRunner(runner, meter)  # type: ignore[assignment]
    engine.drafter = _TimedDrafter(drafter, meter, remember)
    try:
        yield meter
    finally:
        engine.runner = runner
        engine.drafter = drafter


class _TimedRunner:
    """A runner, timed."""

    def __init__(self, inner: Any, meter: Meter) -> None:
        self._inner = inner
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, segments: Sequence[Segment], on_layer: Any = None) -> Tensor:
        begin = time.perf_counter()
        logits: Tensor = self._inner.run(segments, on_layer)
        if all(len(part.logits_indices) == len(part.token_ids) for part in segments):
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            rows = sum(len(segment.token_ids) for segment in segments)
            self._meter.passes[rows].append(time.perf_counter() - begin)
        return logits


class _TimedDrafter:
    """A drafter, timed."""

    def __init__(self, inner: Any, meter: Meter, remember: bool) -> None:
        self._inner = inner
        self._meter = meter
        self._remember = remember

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, prompt: Sequence[int] = (), namespace: str = "default") -> DraftRequest:
        begin = time.thread_time()
        request = self._inner.start(prompt, namespace)
        self._meter.index_s += time.thread_time() - begin
        return _TimedRequest(request, self._meter, self._remember)


class _TimedRequest:
    def __init__(self, inner: DraftRequest, meter: Meter, remember: bool) -> None:
        self._inner = inner
        self._meter = meter
        self._remember = remember

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        begin = time.thread_time()
        self._inner.extend(tokens, source)
        self._meter.draft_s += time.thread_time() - begin

    def propose(self, max_nodes: int, step: Step | None = None) -> Draft:
        begin = time.thread_time()
        draft = self._inner.propose(max_nodes, step)
        self._meter.draft_s += time.thread_time() - begin
        return draft

    def feedback(self, draft: Draft, tokens: Sequence[int]) -> None:
        begin = time.thread_time()
        self._inner.feedback(draft, tokens)
        self._meter.draft_s += time.thread_time() - begin

    def stop(self, *, remember: bool = False) -> None:
        begin = time.thread_time()
        self._inner.stop(remember=remember and self._remember)
        self._meter.draft_s += time.thread_time() - begin
