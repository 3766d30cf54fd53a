"""How fast answers to real prompts are written, by category: drafts, none, and transformers' own.

Only what comes after the first token is timed. Every prompt is answered by all sides in an order
that rotates, once a round; speeds are those of all prompts and rounds together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lazyahead.bench.data.encode import encode_sample
from lazyahead.bench.data.sample import Sample
from lazyahead.bench.meter import Meter, metered
from lazyahead.bench.real_text import ALL
from lazyahead.bench.sides import Shot, Side, ours, plain_transformers, prompt_lookup
from lazyahead.config import Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.llm import LLM
from lazyahead.report import Report, silent
from lazyahead.sampling import Sampling


@dataclass(frozen=True)
class DecodeDataRow:
    """One category, or `all`. Speeds in tokens per second; a speed-up is lookahead over the side it
    is named for, and None where an answer was over with its first token everywhere."""

    workload: str
    """The category."""
    num: int
    """Prompts."""
    prompt_tokens: float
    """Mean length of the prompts."""
    answer_tokens: float
    """Mean length of lookahead's answers."""
    baseline_tok_s: float
    """transformers `generate`."""
    plain_tok_s: float
    """Our engine without drafts."""
    lookahead_tok_s: float
    prompt_lookup_tok_s: float
    """transformers `generate` with its own prompt lookup."""
    speedup: float | None
    """Over plain."""
    speedup_vs_baseline: float | None
    speedup_vs_prompt_lookup: float | None
    tokens_per_step: float
    draft_us_per_token: float
    """Microseconds of proposing, learning and indexing for each token written."""
    identical: float
    """Share of lookahead's answers that are those without drafts, token by token."""
    identical_to_baseline: float
    """Share that are transformers'."""


@dataclass(frozen=True)
class _Turn:
    """One prompt, answered once by each side."""

    num_prompt_tokens: int
    shots: Mapping[str, Shot]
    draft_s: float


def measure_decode_data(
    llm: LLM,
    work: Mapping[str, Sequence[Sample]],
    *,
    length: int,
    sampling: Sampling,
    runs: int = 1,
    progress: Report = silent,
) -> list[DecodeDataRow]:
    """One row for each category and one for `all`.

    `llm` brings the model, how it reads, and how it looks ahead. Prompts lose their middle beyond
    `length` tokens; answers are picked by `sampling` and end at the task's length or at its own.
    """
    ahead = _with(llm, llm.decode or Lookahead())
    plain = _with(llm, None)
    total, done = runs * sum(map(len, work.values())), 0
    turns: dict[str, list[_Turn]] = {name: [] for name in work}
    with metered(ahead) as meter:
        for run in range(runs):
            for name, samples in work.items():
                for number, sample in enumerate(samples):
                    progress(f"{name} {number + 1}/{len(samples)}", done / total)
                    sides = _sides(llm, ahead, plain, sample, sampling)
                    token_ids = encode_sample(llm.tokenizer, sample, length).token_ids
                    if not done:
                        _turn(sides, token_ids, 0, meter)  # warm-up, not counted
                    turns[name].append(_turn(sides, token_ids, number + run, meter))
                    done += 1
    groups = {**turns, ALL: [turn for group in turns.values() for turn in group]}
    return [_row(name, group, runs) for name, group in groups.items()]


def _with(llm: LLM, decode: Lookahead | Drafter | None) -> LLM:
    return LLM(llm.model, tokenizer=llm.tokenizer, prefill=llm.prefill, decode=decode)


def _sides(llm: LLM, ahead: LLM, plain: LLM, sample: Sample, sampling: Sampling) -> dict[str, Side]:
    longest = min(sample.max_new_tokens, sampling.max_new_tokens)
    sampling = replace(sampling, max_new_tokens=longest)
    return {
        "plain": ours(plain, sampling),
        "lookahead": ours(ahead, sampling),
        "baseline": plain_transformers(llm, sampling),
        "prompt_lookup": prompt_lookup(llm, sampling),
    }


def _turn(sides: Mapping[str, Side], token_ids: list[int], turn: int, meter: Meter) -> _Turn:
    """All sides, beginning with another one each time."""
    names, shots, draft_s = list(sides), dict[str, Shot](), 0.0
    for step in range(len(names)):
        name = names[(turn + step) % len(names)]
        meter.reset()
        shots[name] = sides[name]([token_ids])
        draft_s += meter.draft_s
    return _Turn(len(token_ids), shots, draft_s)


def _row(name: str, turns: Sequence[_Turn], runs: int) -> DecodeDataRow:
    speeds = {side: _speed([turn.shots[side] for turn in turns]) for side in turns[0].shots}
    ahead = [turn.shots["lookahead"] for turn in turns]
    num_written = sum(shot.num_timed for shot in ahead)

    def over(side: str) -> float | None:
        return speeds["lookahead"] / speeds[side] if speeds[side] else None

    def same(side: str) -> float:
        pairs = ((turn.shots["lookahead"], turn.shots[side]) for turn in turns)
        return fmean(left.answers == right.answers for left, right in pairs)

    return DecodeDataRow(
        workload=name,
        num=len(turns) // runs,
        prompt_tokens=fmean(turn.num_prompt_tokens for turn in turns),
        answer_tokens=fmean(len(shot.answers[0]) for shot in ahead),
        baseline_tok_s=speeds["baseline"],
        plain_tok_s=speeds["plain"],
        lookahead_tok_s=speeds["lookahead"],
        prompt_lookup_tok_s=speeds["prompt_lookup"],
        speedup=over("plain"),
        speedup_vs_baseline=over("baseline"),
        speedup_vs_prompt_lookup=over("prompt_lookup"),
        tokens_per_step=num_written / max(1, sum(shot.num_steps for shot in ahead)),
        draft_us_per_token=1e6 * sum(turn.draft_s for turn in turns) / max(1, num_written),
        identical=same("plain"),
        identical_to_baseline=same("baseline"),
    )


def _speed(shots: Sequence[Shot]) -> float:
    """Tokens per second after the first; 0 where every answer was one token."""
    seconds = sum(shot.decode_s for shot in shots)
    return sum(shot.num_timed for shot in shots) / seconds if seconds else 0.0
