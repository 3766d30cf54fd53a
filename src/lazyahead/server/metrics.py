"""Prometheus metrics: vLLM's names and meanings, our prefix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lazyahead.engine.request import Request
from lazyahead.results import Stats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """What `/metrics` tells. One object a server; nothing is global."""

    def __init__(self, model: str, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._gauge("num_requests_running", "Requests in passes.", running)
        self._gauge("num_requests_waiting", "Requests that wait for their first pass.", waiting)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests.")
        self._tokens = self._counter("generation_tokens", "Answer tokens.")
        self._done = self._counter("request_success", "Answers, by their end.", "finished_reason")
        self._queried = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens that were not read again.")
        self._drafts = self._counter("spec_decode_num_drafts", "Passes that verified a draft.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._revived = self._counter("revived_tokens", "Prompt tokens brought back by answers.")
        self._errors = self._counter("request_errors", "Answers other than 200.", "status")
        self._ttft = self._histogram("time_to_first_token_seconds", "Waiting included.", _SECONDS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "To the last token.", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "To the first pass.", _SECONDS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean after the first.", _TOKEN_SECONDS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between tokens of an answer.", _TOKEN_SECONDS
        )
        self._prompt_len = self._histogram("request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self._answer_len = self._histogram("request_generation_tokens", "Answer tokens.", _TOKENS)
        self._computed = self._histogram(
            "prompt_share_computed",
            "Mean over layers of the share of prompt tokens computed.",
            _SHARES,
        )

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    def started(self, prompt_tokens: int) -> None:
        """A request was queued."""
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_len.observe(prompt_tokens)

    def step(self, num_tokens: int, seconds: float) -> None:
        """A pass gave an answer so many tokens, so long after the one before."""
        for _ in range(num_tokens):
            self._itl.observe(seconds / num_tokens)

    def drafted(self, num_drafts: int, num_tokens: int, num_accepted: int) -> None:
        """What an answer's passes verified and accepted."""
        self._drafts.inc(num_drafts)
        self._drafted.inc(num_tokens)
        self._accepted.inc(num_accepted)

    def ended(self, request: Request, stats: Stats | None, reason: str) -> None:
        """An answer has ended; `stats` None: before its first token."""
        self._done.labels(model_name=self._model, finished_reason=reason).inc()
        if request.admitted is not None:
            self._queue.observe(request.admitted - request.submitted)
        if stats is None:
            return
        self._queried.inc(stats.prompt_tokens)
        self._hits.inc(stats.reused_tokens)
        self._tokens.inc(stats.answer_tokens)
        self._revived.inc(stats.revived)
        self._answer_len.observe(stats.answer_tokens)
        self._ttft.observe(stats.ttft_s)
        self._e2e.observe(stats.ttft_s + stats.decode_s)
        self._computed.observe(stats.prompt_tokens_computed)
        if stats.answer_tokens > 1:
            self._tpot.observe(stats.decode_s / (stats.answer_tokens - 1))

    def refused(self, status: int) -> None:
        """An answer other than 200."""
        self._errors.labels(model_name=self._model, status=str(status)).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(
            f"lazyahead:{name}", text, ["model_name", *labels], registry=self.registry
        )
        return counter if labels else counter.labels(model_name=self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"lazyahead:{name}", text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(model_name=self._model)

    def _gauge(self, name: str, text: str, value: Callable[[], int]) -> None:
        gauge = Gauge(f"lazyahead:{name}", text, ["model_name"], registry=self.registry)
        gauge.labels(model_name=self._model).set_function(value)
