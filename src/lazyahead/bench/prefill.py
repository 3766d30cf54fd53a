"""Time to the first token, beside the ideal speed-up, and what pruning costs elsewhere.

Every round runs all sides one after the other, so that a machine that slows down slows all of them.
The first round of each length is not counted. Medians of the rest are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch

from lazyahead.bench.baseline import run_baseline
from lazyahead.bench.memory import Peak, give_back, in_own_process, ratio, watched
from lazyahead.bench.methods import Cost
from lazyahead.bench.shapes import build_shape
from lazyahead.cache.session import Session
from lazyahead.config import LazyPrefill
from lazyahead.hf.load import checked_dtype
from lazyahead.llm import LLM
from lazyahead.report import Report, silent
from lazyahead.results import Piece, Stats
from lazyahead.sampling import Sampling

NUM_STEPS = 8
"""Decode steps timed after each first token."""
NUM_QUESTION = 16
"""Tokens of the second question."""
SAMPLING = Sampling(max_new_tokens=1 + NUM_STEPS, ignore_eos=True)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model by path or name, or a random one of a known shape. Pickles, so
    children can load it."""

    model: str | None = None
    shape: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_context: int = 32_768
    """Of a shape; a real model has its own."""

    def load(self, prefill: LazyPrefill | None) -> LLM:
        """The model with our engine, without drafting."""
        given: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "device": self.device}
        if self.shape is None:
            given = {name: value for name, value in given.items() if value is not None}
            return LLM(**given, prefill=prefill, decode=None)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = checked_dtype(self.dtype or "bfloat16")
        weights = torch.bfloat16 if dtype in ("auto", "int8") else getattr(torch, dtype)
        model = build_shape(self.shape, weights, device, self.max_context)
        return LLM(model, dtype=dtype, prefill=prefill, decode=None)


@dataclass(frozen=True)
class PrefillRow:
    """One prompt length. Times are medians in seconds; a `_ratio` is ours over baseline unless it
    says otherwise."""

    length: int
    baseline_ttft_s: float
    """transformers `generate`, from the call to the first token."""
    ttft_s: float
    speedup: float
    ideal_speedup: float
    """FLOPs of the full prefill over FLOPs of what is computed of it: the kept rows, their
    attention and scores."""
    efficiency: float
    """Speed-up over ideal speed-up."""
    keep_all_ratio: float
    """Baseline time over ours with nothing pruned: 1.0 means the engine itself is free."""
    peak_memory_ratio: float | None
    """Highest memory in use during the prefill, weights included."""
    working_memory_ratio: float | None
    """The same above what was in use before: keys, values, stash, scratch."""
    baseline_step_s: float
    step_s: float
    """A decode step after the pruned prefill."""
    decode_step_ratio: float
    second_question_ratio: float
    """First token of another question about the same text, over the baseline's full prefill."""
    reviving_step_ratio: float | None
    """A decode step that revives as much as it may, over one of ours that revives nothing."""
    prompt_tokens_computed: float


class _Timing(NamedTuple):
    """One prefill and a few steps."""

    ttft_s: float
    step_s: float


@dataclass(frozen=True)
class _PrefillRound:
    baseline: _Timing
    ours: _Timing
    keep_all: _Timing
    second_s: float


def measure_prefill(
    subject: Subject,
    prefill: LazyPrefill | None,
    lengths: Sequence[int],
    runs: int = 3,
    *,
    memory: bool = True,
    progress: Report = silent,
) -> tuple[LLM, list[PrefillRow]]:
    """Measures each length, shortest first."""
    lengths = sorted(lengths)
    peaks: tuple[list[Peak], list[Peak]] | None = None
    on_gpu = torch.cuda.is_available() and not (subject.device or "").startswith("cpu")
    if memory and not on_gpu:  # before this process holds the weights too
        progress("peak memory, in processes of their own")
        peaks = tuple(
            in_own_process(_peaks, subject, prefill, plain, lengths) for plain in (False, True)
        )  # type: ignore[assignment]
    llm = subject.load(prefill)
    if memory and on_gpu:
        peaks = _peaks_of(llm, False, lengths), _peaks_of(llm, True, lengths)
    rows = []
    for index, length in enumerate(lengths):
        ratios = ratio(*peaks, index) if peaks else (None, None)
        rows.append(_measure_length(llm, length, runs, ratios, progress))
    return llm, rows


def _measure_length(
    llm: LLM, length: int, runs: int, memory: tuple[float | None, float | None], progress: Report
) -> PrefillRow:
    keep_all = LLM(llm.model, tokenizer=llm.tokenizer, prefill=None, decode=None)
    token_ids = random_prompt(llm, length + NUM_QUESTION)
    rounds: list[_PrefillRound] = []
    stats: Stats | None = None
    for run in range(runs + 1):
        progress(f"{length} tokens, round {run} of {runs}" if run else f"{length} tokens, warm-up")
        baseline = run_baseline(llm.model, token_ids[:length], SAMPLING)
        session = llm.session()
        ours, piece = _shoot(llm, token_ids[:length], session)
        stats = piece.stats
        second, _ = _shoot(llm, [*session.history, *token_ids[length:]], session)
        whole, _ = _shoot(keep_all, token_ids[:length])
        rounds.append(
            _PrefillRound(
                _Timing(baseline.ttft_s, baseline.decode_s / NUM_STEPS), ours, whole, second.ttft_s
            )
        )
    rounds = rounds[1:]
    baseline_ttft, ttft = (
        median(getattr(r, side).ttft_s for r in rounds) for side in ("baseline", "ours")
    )
    baseline_step, step = (
        median(getattr(r, side).step_s for r in rounds) for side in ("baseline", "ours")
    )
    assert stats is not None  # there is one warm-up round at least
    cost = Cost.of(llm, length)
    ideal = cost.ideal_speedup(llm.prefill, stats.kept_by_layer)
    return PrefillRow(
        length=length,
        baseline_ttft_s=baseline_ttft,
        ttft_s=ttft,
        speedup=baseline_ttft / ttft,
        ideal_speedup=ideal,
        efficiency=baseline_ttft / ttft / ideal,
        keep_all_ratio=baseline_ttft / median(r.keep_all.ttft_s for r in rounds),
        peak_memory_ratio=memory[0],
        working_memory_ratio=memory[1],
        baseline_step_s=baseline_step,
        step_s=step,
        decode_step_ratio=step / baseline_step,
        second_question_ratio=median(r.second_s for r in rounds) / baseline_ttft,
        reviving_step_ratio=_reviving_step_ratio(llm, token_ids[:length], runs),
        prompt_tokens_computed=stats.prompt_tokens_computed,
    )


def random_prompt(llm: LLM, length: int, seed: int = 0) -> list[int]:
    """Random tokens: time does not depend on which they are."""
    vocabulary = llm.model.config.get_text_config().vocab_size
    ids: list[int] = torch.randint(
        3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return ids


def _shoot(llm: LLM, token_ids: list[int], session: Session | None = None) -> tuple[_Timing, Piece]:
    """One prompt through our engine."""
    *_, last = llm.stream(token_ids, sampling=SAMPLING, session=session)
    return _Timing(last.stats.ttft_s, last.stats.decode_s / NUM_STEPS), last


def _reviving_step_ratio(llm: LLM, token_ids: list[int], runs: int) -> float | None:
    """Time of steps that revive as many tokens as the limit allows, over that of steps that revive
    none, in alternation."""
    if llm.prefill is None:
        return None
    rules = (
        replace(llm.prefill, revive="demand", revive_threshold=0.0),
        replace(llm.prefill, revive="never"),
    )
    sides = [LLM(llm.model, tokenizer=llm.tokenizer, prefill=rule, decode=None) for rule in rules]
    shots = [[_shoot(side, token_ids)[0].step_s for side in sides] for _ in range(runs)]
    busy, quiet = (float(median(steps)) for steps in zip(*shots, strict=True))
    return busy / quiet


def _peaks(
    subject: Subject, prefill: LazyPrefill | None, plain: bool, lengths: Sequence[int]
) -> list[Peak]:
    """What a child process does."""
    return _peaks_of(subject.load(prefill), plain, lengths)


def _peaks_of(llm: LLM, plain: bool, lengths: Sequence[int]) -> list[Peak]:
    """Peak of one prefill at each length, over what is in use after a short one that pays for what
    is paid once."""
    once = Sampling(max_new_tokens=1, ignore_eos=True)
    found: list[Peak] = []
    for length in (min(64, *lengths), *lengths):
        token_ids = random_prompt(llm, length)
        give_back()
        with watched(llm.model.device) as peaks:
            if plain:
                run_baseline(llm.model, token_ids, once)
            else:
                list(llm.stream(token_ids, sampling=once))
        found += peaks
    before = found[1].before
    return [Peak(peak.peak, before) for peak in found[1:]]
