"""Decoding speed: our engine with and without drafts, transformers with and without prompt lookup.

Only what comes after the first token is timed. Every round runs all sides on each prompt, in an
order that rotates; the first round is not counted. Tokens per second are those of all prompts
together, medians over the rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from lazyahead.bench.meter import Meter, metered, row_cost
from lazyahead.bench.sides import Shot, Side, ours, plain_transformers, prompt_lookup
from lazyahead.bench.workloads import Workload
from lazyahead.config import Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.llm import LLM
from lazyahead.report import Report, silent


@dataclass(frozen=True)
class DecodeRow:
    """One workload. Speeds in tokens per second; a speed-up is lookahead over what it is named for;
    None: not measured."""

    workload: str
    num_prompts: int
    batch: int
    """Requests that are answered at the same time."""
    prompt_tokens: float
    """Mean length of the prompts."""
    answer_tokens: float
    """Mean length of the answers."""
    baseline_tok_s: float | None
    """transformers `generate`."""
    plain_tok_s: float
    """Our engine without drafts."""
    lookahead_tok_s: float
    prompt_lookup_tok_s: float | None
    """transformers `generate` with its own prompt lookup."""
    cold_tok_s: float | None
    """Lookahead without memory, where the row measures memory."""
    speedup: float | None
    """Over plain."""
    speedup_vs_baseline: float | None
    speedup_vs_prompt_lookup: float | None
    speedup_vs_cold: float | None
    tokens_per_step: float
    cold_tokens_per_step: float | None
    rows_per_pass: float
    """Rows of a decoding pass, drafts included."""
    ideal_speedup: float
    """Passes through the weights without drafts over passes with them: the speed-up where rows are
    free."""
    modelled_speedup: float | None
    """The speed-up were drafting free, and each pass as long as the best of those with as many rows
    or more."""
    draft_us_per_token: float
    """Microseconds of proposing, learning and indexing for each token generated."""
    index_share: float | None
    """Time to index the prompt, over the time to the first token."""
    identical: bool
    """Whether plain and lookahead generated the same tokens."""
    identical_to_baseline: bool | None
    """The same for transformers; None where tokens are sampled, with other noise."""


@dataclass(frozen=True)
class _DecodeRound:
    """All prompts once: the shots of each side, prompt by prompt."""

    shots: dict[str, list[Shot]]

    def speed(self, side: str) -> float:
        shots = self.shots[side]
        seconds = sum(shot.decode_s for shot in shots)
        return sum(shot.num_timed for shot in shots) / seconds if seconds else 0.0


def measure_decode(
    llm: LLM, work: Workload, runs: int, *, batch: int = 1, progress: Report = silent
) -> DecodeRow:
    """Measures on the model of `llm`, under its prefill and decode settings. With a `batch` of more
    than one, only our two sides."""
    ahead = _with(llm, llm.decode or Lookahead())
    plain = _with(llm, None)
    sides = {"plain": ours(plain, work.sampling), "lookahead": ours(ahead, work.sampling)}
    if batch == 1:
        sides["baseline"] = plain_transformers(llm, work.sampling)
        sides["prompt_lookup"] = prompt_lookup(llm, work.sampling)
    with metered(ahead) as drafted, metered(plain) as undrafted:
        rounds = _rounds(sides, work, batch, runs, (drafted, undrafted), progress)
    return _row(work, batch, rounds, drafted, undrafted)


def measure_memory(
    llm: LLM, work: Workload, runs: int, path: str, *, progress: Report = silent
) -> DecodeRow:
    """The second half of a stream of questions, after the first half was answered and remembered in
    a new `path`.

    Rounds repeat the second half, so its own answers are not remembered.
    """
    decode = llm.decode if isinstance(llm.decode, Lookahead) else Lookahead()
    half = len(work.prompts) // 2
    plain = _with(llm, None)
    cold = _with(llm, decode)
    warm = _with(llm, replace(decode, memory=path))
    sides = {
        "plain": ours(plain, work.sampling),
        "cold": ours(cold, work.sampling),
        "lookahead": ours(warm, work.sampling),
    }
    for number, prompt in enumerate(work.prompts[:half], 1):
        progress(f"{work.name}: remembering answer {number} of {half}")
        sides["lookahead"]([prompt])
    later = work._replace(prompts=work.prompts[half:])
    with metered(warm, remember=False) as drafted, metered(plain) as undrafted:
        rounds = _rounds(sides, later, 1, runs, (drafted, undrafted), progress)
    return _row(later, 1, rounds, drafted, undrafted)


def _with(llm: LLM, decode: Lookahead | Drafter | None) -> LLM:
    return LLM(llm.model, tokenizer=llm.tokenizer, prefill=llm.prefill, decode=decode)


def _rounds(
    sides: dict[str, Side],
    work: Workload,
    batch: int,
    runs: int,
    meters: Sequence[Meter],
    progress: Report,
) -> list[_DecodeRound]:
    groups = [work.prompts[start : start + batch] for start in range(0, len(work.prompts), batch)]
    rounds = []
    for run in range(runs + 1):
        if run == 1:
            for meter in meters:
                meter.reset()
        shots: dict[str, list[Shot]] = {name: [] for name in sides}
        for number, prompts in enumerate(groups, 1):
            progress(
                f"{work.name}: "
                + (f"round {run} of {runs}" if run else "warm-up")
                + f", {number}/{len(groups)}"
            )
            turn = (run + number) % len(sides)
            for name in [*sides, *sides][turn : turn + len(sides)]:
                shots[name].append(sides[name](prompts))
        rounds.append(_DecodeRound(shots))
    return rounds[1:]


def _row(
    work: Workload, batch: int, rounds: Sequence[_DecodeRound], drafted: Meter, undrafted: Meter
) -> DecodeRow:
    speeds = {side: median(r.speed(side) for r in rounds) for side in rounds[0].shots}
    shots = {side: [shot for r in rounds for shot in r.shots[side]] for side in speeds}
    answers = {side: [shot.answers for shot in taken] for side, taken in shots.items()}
    ahead = shots["lookahead"]
    num_timed = sum(shot.num_timed for shot in ahead)
    ttft_s = sum(shot.ttft_s for shot in ahead)
    per_token = num_timed / max(
        1, sum(shot.num_timed for shot in shots["plain"])
    )  # texts may differ in length
    cost = row_cost(drafted, undrafted)
    is_comparable = "baseline" in answers and work.sampling.temperature == 0

    def over(side: str) -> float | None:
        return speeds["lookahead"] / speeds[side] if speeds.get(side) else None

    return DecodeRow(
        workload=work.name,
        num_prompts=len(work.prompts),
        batch=batch,
        prompt_tokens=fmean(map(len, work.prompts)),
        answer_tokens=fmean(len(answer) for shot in ahead for answer in shot.answers),
        baseline_tok_s=speeds.get("baseline"),
        plain_tok_s=speeds["plain"],
        lookahead_tok_s=speeds["lookahead"],
        prompt_lookup_tok_s=speeds.get("prompt_lookup"),
        cold_tok_s=speeds.get("cold"),
        speedup=over("plain"),
        speedup_vs_baseline=over("baseline"),
        speedup_vs_prompt_lookup=over("prompt_lookup"),
        speedup_vs_cold=over("cold"),
        tokens_per_step=_tokens_per_step(ahead),
        cold_tokens_per_step=_tokens_per_step(shots["cold"]) if "cold" in shots else None,
        rows_per_pass=drafted.num_rows / max(1, drafted.num_passes),
        ideal_speedup=per_token * undrafted.num_passes / max(1, drafted.num_passes),
        modelled_speedup=per_token * undrafted.modelled_s(cost) / drafted.modelled_s(cost)
        if cost
        else None,
        draft_us_per_token=1e6 * drafted.draft_s / max(1, num_timed),
        index_share=drafted.index_s / ttft_s if ttft_s else None,
        identical=answers["lookahead"] == answers["plain"],
        identical_to_baseline=answers["lookahead"] == answers["baseline"]
        if is_comparable
        else None,
    )


def _tokens_per_step(shots: Sequence[Shot]) -> float:
    return sum(shot.num_timed for shot in shots) / max(1, sum(shot.num_steps for shot in shots))
