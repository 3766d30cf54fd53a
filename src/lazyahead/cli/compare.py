"""`generate --compare`: ours and plain transformers, on the same model, in the same run."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from lazyahead.cli.output import seconds, tables
from lazyahead.cli.progress import progress

if TYPE_CHECKING:
    from lazyahead.bench.baseline import BaselineRun
    from lazyahead.llm import LLM
    from lazyahead.results import Completion
    from lazyahead.sampling import Sampling


WARM_UP_TOKENS = 512
"""Tokens of the prompt that both sides answer once before they are timed."""


class Timing(NamedTuple):
    """Medians of one side's runs."""

    ttft_s: float
    decode_s: float
    num_tokens: int

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.decode_s

    @property
    def step_s(self) -> float:
        """Time per token after the first."""
        return self.decode_s / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


class Comparison(NamedTuple):
    """Both sides of one prompt."""

    completion: Completion
    ours: Timing
    baseline: Timing
    baseline_text: str

    @property
    def same_text(self) -> bool:
        return self.completion.text == self.baseline_text

    def speedup(self) -> dict[str, float | None]:
        """Baseline over ours; `decode` per token, as answers may differ in length."""
        steps = (self.baseline.step_s, self.ours.step_s)
        return {
            "ttft": self.baseline.ttft_s / self.ours.ttft_s,
            "decode": steps[0] / steps[1] if all(steps) else None,
            "total": self.baseline.total_s / self.ours.total_s,
        }


def measure(
    llm: LLM, document: str, question: str | None, sampling: Sampling, runs: int
) -> Comparison:
    """An untimed round of both sides over the start of the prompt, then `runs` timed ones over all
    of it; in each one side after the other."""
    from dataclasses import replace

    from lazyahead.bench.baseline import run_baseline

    token_ids = llm.encode(document, question).token_ids
    ours: list[Completion] = []
    theirs: list[BaselineRun] = []
    start = token_ids[:WARM_UP_TOKENS]
    short = replace(sampling, max_new_tokens=4, min_new_tokens=0)
    run_baseline(llm.model, start, short, llm.tokenizer)
    llm.generate([start], sampling=short)
    for _ in range(runs):
        theirs.append(run_baseline(llm.model, token_ids, sampling, llm.tokenizer))
        ours.append(llm.generate(document, question, sampling=sampling))
    stats = [completion.stats for completion in ours]
    return Comparison(
        ours[-1],
        Timing(
            median(s.ttft_s for s in stats),
            median(s.decode_s for s in stats),
            stats[-1].answer_tokens,
        ),
        Timing(
            median(r.ttft_s for r in theirs),
            median(r.decode_s for r in theirs),
            len(theirs[-1].token_ids),
        ),
        _text(llm, theirs[-1], sampling),
    )


def compare_and_show(
    llm: LLM, document: str, question: str | None, sampling: Sampling, runs: int, *, quiet: bool
) -> tuple[Completion, dict[str, Any]]:
    """Measures, prints the table unless `quiet`, and returns the fields that `--json` adds."""
    from lazyahead.cli.options import quiet_transformers

    with quiet_transformers(), progress(f"running both sides {runs} + 1 times"):
        result = measure(llm, document, question, sampling, runs)
    if not quiet:
        _show(llm, result, runs, sampled=sampling.temperature > 0)
    baseline = {
        "text": result.baseline_text,
        "ttft_s": result.baseline.ttft_s,
        "decode_s": result.baseline.decode_s,
    }
    fields = {"ttft_s": result.ours.ttft_s, "decode_s": result.ours.decode_s, "baseline": baseline}
    return result.completion, {**fields, "speedup": result.speedup(), "same_text": result.same_text}


def _text(llm: LLM, run: BaselineRun, sampling: Sampling) -> str:
    """The baseline's text as ours is printed: without special tokens, up to a stop string."""
    from lazyahead.text import Detokenizer, StopStrings

    detokenizer = Detokenizer(llm.tokenizer)
    watch = StopStrings(sampling.stop)
    shown = [watch.add(detokenizer.add(token)) for token in run.token_ids]
    return "".join([*shown, watch.add(detokenizer.flush()), watch.flush()])


def _show(llm: LLM, result: Comparison, runs: int, *, sampled: bool) -> None:
    from lazyahead.cache.session import shared_prefix

    console = tables()
    ours = result.ours
    baseline = result.baseline
    stats = result.completion.stats
    speedup = {name: f"{value:.2f}x" if value else "–" for name, value in result.speedup().items()}
    table = Table(
        title=f"{llm.name}, {stats.prompt_tokens:,} prompt tokens, median of {runs}",
        title_justify="left",
    )
    for header in ("", "lazyahead", "transformers", "speed-up"):
        table.add_column(header, justify="left" if not header else "right")
    table.add_row("first token", seconds(ours.ttft_s), seconds(baseline.ttft_s), speedup["ttft"])
    table.add_row(
        "each token after", seconds(ours.step_s), seconds(baseline.step_s), speedup["decode"]
    )
    table.add_row(
        "whole answer", seconds(ours.total_s), seconds(baseline.total_s), speedup["total"]
    )
    table.add_row("answer tokens", str(ours.num_tokens), str(baseline.num_tokens), "")
    table.add_row("prompt tokens computed", f"{stats.prompt_tokens_computed:.0%}", "100%", "")
    console.print(table)
    if result.same_text:
        console.print("Both wrote the same text:", style="green")
        console.print(result.completion.text, markup=False)
        return
    part = shared_prefix(
        *(list(map(ord, text)) for text in (result.completion.text, result.baseline_text))
    )
    why = "sampled with other noise" if sampled else "deferred tokens can change an answer"
    console.print(f"The texts differ from character {part} on ({why}).", style="yellow")
    for name, text in (
        ("lazyahead", result.completion.text),
        ("transformers", result.baseline_text),
    ):
        console.print(f"{name}:", style="bold")
        console.print(text, markup=False)
