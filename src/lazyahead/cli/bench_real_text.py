"""`lazyahead bench quality --data`: what reading lazily does to answers over real text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyahead.cli import options
from lazyahead.cli.output import note, print_json, record, tables
from lazyahead.errors import ConfigError

if TYPE_CHECKING:
    from lazyahead.bench.data.sample import Sample
    from lazyahead.bench.real_text import RealTextRow
    from lazyahead.config import LazyPrefill

LONGEST_ANSWER = 512
HEADERS = (
    "method",
    "score",
    "relative",
    "kept",
    "of",
    "agreement",
    "speed-up",
    "ideal",
    "computed",
)


def refuse_without_data(lines: str, max_new_tokens: int | None) -> None:
    """Raises ConfigError for an option that only `--data` knows."""
    if lines != "all":
        raise ConfigError(f"--lines {lines} is for --data PATH; give both, or leave it out")
    if max_new_tokens is not None:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens} is for --data PATH; give both, or leave it out"
        )


def refuse_with_data(given: Mapping[str, object]) -> None:
    """Raises ConfigError for an option, name to value, that `--data` does not know."""
    for name, value in given.items():
        if value not in (None, False, "off"):
            raise ConfigError(f"{name} {value} is for the built-in samples; leave it out or --data")


def bench_real_text(
    loading: options.Loading,
    path: Path,
    rules: Mapping[str, LazyPrefill],
    *,
    lines: str,
    categories: str | None,
    num_samples: int,
    length: int,
    max_new_tokens: int | None,
    runs: int,
    seed: int,
    json: bool,
) -> None:
    """Reads the samples, then loads the model, measures and prints."""
    from lazyahead.bench.data.encode import encode_sample
    from lazyahead.bench.data.read import read_samples, take
    from lazyahead.bench.methods import methods_at_equal_seconds
    from lazyahead.bench.real_text import by_category, fitting_length, measure_real_text
    from lazyahead.cli.progress import progress

    found = read_samples(path, lines)
    for line in found.left_out:
        note(f"left out {line}")
    work = choose(by_category(take(found.samples, num_samples)), categories)
    llm = loading.load()
    longest = min(max_new_tokens or LONGEST_ANSWER, max(map(_tokens, work.values())))
    length = fitting_length(llm, length, longest)
    firsts = (encode_sample(llm.tokenizer, one[0], length) for one in work.values())
    longest_prompt = max(firsts, key=lambda prompt: len(prompt.token_ids))
    with options.quiet_transformers(), progress("quality") as report:
        methods = methods_at_equal_seconds(llm, rules, longest_prompt)
        rows = measure_real_text(
            llm,
            methods,
            work,
            length=length,
            max_new_tokens=longest,
            num_timed=runs,
            seed=seed,
            progress=report,
        )
    if not json:
        _show(f"{llm.name}, {path.name}, {length:,} tokens at most", rows)
        return
    asked: dict[str, Any] = {
        "data": path.name,
        "lines": lines,
        "n": num_samples,
        "length": length,
        "max_new_tokens": longest,
        "left_out": list(found.left_out),
        "prefill": {
            (one.prefill if one.name == "lazy" else one.name): one.rule.to_dict()
            for one in methods
            if one.rule is not None
        },
    }
    results = {"rows": [asdict(row) for row in rows]}
    print_json(record(llm, seed=seed, runs=runs, results=results, **asked))


def choose(work: dict[str, list[Sample]], categories: str | None) -> dict[str, list[Sample]]:
    """The categories named, commas between; all where none is. Raises ConfigError for another."""
    if categories is None:
        return work
    names = [name.strip() for name in categories.split(",")]
    unknown = [name for name in names if name not in work]
    if unknown:
        raise ConfigError(f"no category is called {unknown[0]!r}; there are {', '.join(work)}")
    return {name: work[name] for name in names}


def _tokens(samples: Sequence[Sample]) -> int:
    return max(sample.max_new_tokens for sample in samples)


def _show(title: str, rows: Sequence[RealTextRow]) -> None:
    """Categories as groups, methods as lines."""
    from lazyahead.cli.bench_quality import grouped

    title += "; speed-ups over transformers, bounds of 95 %"
    tables().print(grouped(title, HEADERS, list(_lines(rows))))


def _lines(rows: Sequence[RealTextRow]) -> Iterator[tuple[str, ...]]:
    from lazyahead.cli.bench_quality import percent

    for row in rows:
        yield (
            f"{row.category} ({row.num})",
            row.prefill if row.method == "lazy" else row.method,
            _bounded(row.score, row.score_low, row.score_high),
            percent(row.relative),
            _bounded(row.kept, row.kept_low, row.kept_high),
            str(row.num_kept),
            percent(row.agreement),
            f"{row.ttft_speedup:.2f}x" if row.ttft_speedup else "–",
            f"{row.ideal_speedup:.2f}x",
            percent(row.prompt_tokens_computed),
        )


def _bounded(value: float | None, low: float | None, high: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ({low:.2f}, {high:.2f})"
