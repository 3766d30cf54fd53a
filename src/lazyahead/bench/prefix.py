"""Questions over one document: what the prefix cache saves, and whether any answer can tell.

Each question is asked afresh and with the cache, one after the other; some are asked of
transformers' own `generate` in the same round. The document is read once before the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lazyahead.bench.baseline import run_baseline
from lazyahead.bench.prefill import random_prompt
from lazyahead.llm import LLM
from lazyahead.report import Report, silent
from lazyahead.results import Completion
from lazyahead.sampling import Sampling

CACHE_BYTES = 8 << 30
QUESTION_TOKENS = 32


@dataclass(frozen=True)
class PrefixRow:
    """One length of document. Times are medians in seconds, from the call to the first token."""

    length: int
    baseline_ttft_s: float | None
    """transformers, which reads document and question; None where it was not asked."""
    ttft_s: float
    """Ours without a cache."""
    cached_ttft_s: float
    """Ours with the document in the cache."""
    speedup: float
    """`ttft_s` over `cached_ttft_s`."""
    baseline_speedup: float | None
    """`baseline_ttft_s` over `cached_ttft_s`."""
    cached_tokens: int
    """Prompt tokens taken from the cache."""
    cache_bytes: int
    """Of the document."""
    num: int
    """Questions."""
    identical: float
    """Share of answers that are those of a fresh read, token for token."""


def measure_prefix(
    llm: LLM,
    lengths: Sequence[int],
    num_questions: int,
    runs: int,
    max_new_tokens: int = 16,
    progress: Report = silent,
) -> list[PrefixRow]:
    """Measures each length, shortest first. transformers answers the first `runs` questions."""
    return [
        _measure(llm, length, num_questions, runs, max_new_tokens, progress)
        for length in sorted(lengths)
    ]


def _measure(
    llm: LLM, length: int, num_questions: int, runs: int, max_new_tokens: int, progress: Report
) -> PrefixRow:
    sampling = Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)
    options = {"tokenizer": llm.tokenizer, "prefill": llm.prefill, "decode": None}
    fresh = LLM(llm.model, **options)
    caching = LLM(llm.model, **options, prefix_cache_bytes=CACHE_BYTES)
    document = random_prompt(llm, length)
    progress(f"{length} tokens, reading the document")
    caching.read_ahead(document)
    assert caching.engine.prefixes is not None
    cache_bytes = caching.engine.prefixes.cache.nbytes
    pairs: list[tuple[Completion, Completion]] = []
    baseline: list[float] = []
    for num in range(num_questions):
        progress(f"{length} tokens, question {num + 1} of {num_questions}")
        prompt = [*document, *random_prompt(llm, QUESTION_TOKENS, seed=num + 1)]
        pair = [side.generate(prompt, sampling=sampling) for side in (fresh, caching)]
        pairs.append((pair[0], pair[1]))
        if num < runs:
            once = Sampling(max_new_tokens=1, ignore_eos=True)
            baseline.append(run_baseline(llm.model, prompt, once).ttft_s)
    ttft, cached_ttft = (median(pair[side].stats.ttft_s for pair in pairs) for side in (0, 1))
    plain = median(baseline) if baseline else None
    return PrefixRow(
        length=length,
        baseline_ttft_s=plain,
        ttft_s=ttft,
        cached_ttft_s=cached_ttft,
        speedup=ttft / cached_ttft,
        baseline_speedup=plain and plain / cached_ttft,
        cached_tokens=pairs[-1][1].stats.reused_tokens,
        cache_bytes=cache_bytes,
        num=len(pairs),
        identical=sum(one.token_ids == other.token_ids for one, other in pairs) / len(pairs),
    )
