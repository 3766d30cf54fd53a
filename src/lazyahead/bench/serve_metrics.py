"""Figures of a run, named and meant as in `vllm bench serve`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lazyahead.bench.serve_client import Outcome
from lazyahead.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT = ("ttft", "tpot", "e2el")
_SPEC_DECODE = re.compile(
    r"^(?:vllm|lazyahead):spec_decode_num_(?P<name>drafts|draft_tokens|accepted_tokens)_total"
    r"(?:\{[^}]*\})?\s+(?P<value>\S+)",
    re.MULTILINE,
)


def parse_metrics(text: str) -> tuple[str, ...]:
    """`ttft,itl` to names. Raises ConfigError."""
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"--percentile-metrics knows {', '.join(METRICS)}, got {name!r}; leave it out"
            )
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    """`50,99` to numbers. Raises ConfigError."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"--metric-percentiles takes numbers from 0 to 100, got {text!r}")
    return values


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:500`, in milliseconds; several with spaces or commas between. Raises ConfigError."""
    limits = {}
    for pair in " ".join(pairs).replace(",", " ").split():
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in GOODPUT or not limit >= 0:
            raise ConfigError(
                f"--goodput takes ttft:MS, tpot:MS and e2el:MS (milliseconds), got {pair!r}"
            )
        limits[name] = limit
    return limits


def figures(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    metrics: Sequence[str] = METRICS,
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] = {},
) -> dict[str, Any]:
    """All figures of a run of `duration` seconds. Percentiles of nothing are None."""
    done = [one for one in outcomes if one.success]
    known = all(one.prompt_tokens is not None for one in done)
    num_input = sum(one.prompt_tokens or 0 for one in done) if known else None
    num_output = sum(one.output_tokens for one in done)
    values = _values(done)
    total = None if num_input is None else (num_input + num_output) / duration
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": num_input,
        "total_cached_tokens": sum(one.cached_tokens for one in done),
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "request_goodput": _num_good(values, goodput) / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": total,
        "max_concurrent_requests": _most_at_once(done),
        "output_tokens_from": "usage" if all(one.is_counted for one in done) else "chunks",
        "itl_per": "token" if all(one.is_per_token for one in done) else "chunk",
        **_statistics(values, metrics, percentiles),
    }


def detailed(outcomes: Sequence[Outcome], begin: float) -> dict[str, Any]:
    """Each request's own values; times since `begin`."""
    return {
        "input_lens": [one.prompt_tokens for one in outcomes],
        "output_lens": [one.output_tokens for one in outcomes],
        "start_times": [one.started - begin for one in outcomes],
        "ttfts": [one.ttft for one in outcomes],
        "itls": [one.itl for one in outcomes],
        "latencies": [one.latency for one in outcomes],
        "generated_texts": [one.text for one in outcomes],
        "errors": [one.error for one in outcomes],
    }


def spec_decode_counts(metrics: str) -> dict[str, float]:
    """What a server has drafted so far, by its /metrics; empty where it does not say."""
    counts: dict[str, float] = {}
    for found in _SPEC_DECODE.finditer(metrics):
        counts[found["name"]] = counts.get(found["name"], 0.0) + float(found["value"])
    return counts


def spec_decode(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """What was drafted between two readings; empty where nothing was."""
    drafts, tokens, accepted = (
        after.get(name, 0.0) - before.get(name, 0.0)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    if drafts <= 0 or tokens <= 0:
        return {}
    return {
        "spec_decode_acceptance_rate": 100 * accepted / tokens,
        "spec_decode_acceptance_length": 1 + accepted / drafts,
        "spec_decode_num_drafts": int(drafts),
        "spec_decode_draft_tokens": int(tokens),
        "spec_decode_accepted_tokens": int(accepted),
    }


def _values(done: Sequence[Outcome]) -> dict[str, list[float]]:
    """Of each metric, in seconds. All but the times between tokens have one value a request; an
    answer of one token has 0 per output token, which only goodput looks at."""
    return {
        "ttft": [one.ttft for one in done],
        "tpot": [
            (one.latency - one.ttft) / (one.output_tokens - 1) if one.output_tokens > 1 else 0.0
            for one in done
        ],
        "itl": [gap for one in done for gap in one.itl],
        "e2el": [one.latency for one in done],
        "tpot_of_several": [
            (one.latency - one.ttft) / (one.output_tokens - 1)
            for one in done
            if one.output_tokens > 1
        ],
    }


def _num_good(values: Mapping[str, list[float]], limits: Mapping[str, float]) -> int:
    """Requests within all limits."""
    rows = zip(*(values[name] for name in limits), strict=True)
    return sum(
        all(1000 * value <= limit for value, limit in zip(row, limits.values(), strict=True))
        for row in rows
    )


def _statistics(
    values: Mapping[str, list[float]], metrics: Sequence[str], percentiles: Sequence[float]
) -> dict[str, float | None]:
    told: dict[str, float | None] = {}
    for name in metrics:
        of = values["tpot_of_several" if name == "tpot" else name]
        ms = 1000 * np.array(of)
        told[f"mean_{name}_ms"] = float(ms.mean()) if of else None
        told[f"median_{name}_ms"] = float(np.median(ms)) if of else None
        told[f"std_{name}_ms"] = float(ms.std()) if of else None
        for percentile in percentiles:
            value = float(np.percentile(ms, percentile)) if of else None
            told[f"p{percentile:g}_{name}_ms"] = value
    return told


def _most_at_once(done: Sequence[Outcome]) -> int:
    ends = [(one.started + one.latency, -1) for one in done]
    events = sorted([*ends, *((one.started, 1) for one in done)])
    return int(max(np.cumsum([change for _, change in events]), default=0))
