"""`lazyahead tune`: the strongest pruning that keeps the answers to given prompts."""

from __future__ import annotations

import json as json_
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lazyahead.cli import options
from lazyahead.cli.input import check_text, parse_path
from lazyahead.cli.output import (
    SideOutputs,
    check_folders,
    note,
    print_json,
    record,
    seconds,
    whole_file,
)
from lazyahead.cli.progress import load_torch, progress
from lazyahead.errors import RequestError
from lazyahead.text import read_text

if TYPE_CHECKING:
    from lazyahead.tune.answers import AgreementCount, Task
    from lazyahead.tune.tuner import Found, Tuned

SAMPLES = 2
LENGTH = 2048


def tune(
    model: options.Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            help="JSON lines with `prompt` (and `question`), a folder of text files, or a text "
            "with one prompt a line. Left out: questions of the reader's world.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=parse_path, help="Profile to write (.toml), for --prefill."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How many of its own questions of each category. Left out: {SAMPLES}."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=256, help=f"Their length, in tokens of the reader. Left out: {LENGTH}."),
    ] = None,
    agree: Annotated[
        float, typer.Option(help="Least fraction of answers that must stay the same, above 0.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Compare answers up to this many tokens.")
    ] = 64,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the profile: shorter prompts are not pruned. Left out: the default."
        ),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    seed: Annotated[int, typer.Option(min=0, help="Which of its own questions are drawn.")] = 0,
    runs: options.Runs = 3,
    json: options.Json = False,
) -> None:
    """Finds how much of a prompt can be deferred before answers change, and writes a profile for
    --prefill."""
    _check(model, prompts, out, samples, length)
    load_torch()
    tasks = (
        read_tasks(prompts)
        if prompts is not None
        else own_tasks(samples or SAMPLES, length or LENGTH, seed)
    )
    llm = options.Loading(model, dtype, device).load()
    from lazyahead.config import LazyPrefill
    from lazyahead.tune.answers import under
    from lazyahead.tune.tuner import tune as search

    base = LazyPrefill() if min_tokens is None else replace(LazyPrefill(), min_tokens=min_tokens)
    with options.quiet_transformers(), progress("tune") as report:
        tuned = search(
            llm,
            tasks,
            base=base,
            max_new_tokens=max_new_tokens,
            agree=agree,
            runs=runs,
            progress=report,
        )
    _note_skipped(tuned, base.min_tokens)
    if json:
        rule = tuned.found.prefill if tuned.found else None
        written = str(out) if out is not None and rule is not None else None
        settings = {"agree": agree, "max_new_tokens": max_new_tokens}
        results = fields(tuned, written)
        print_json(record(under(llm, rule), seed=seed, runs=runs, results=results, **settings))
    else:
        _show(tuned, out, agree)
    outputs = SideOutputs()
    if tuned.found is not None and out is not None:
        with outputs.writing(out):
            _write(out, llm.name, tuned.found, tuned, agree)
    if outputs.failed:
        raise typer.Exit(1)


def _check(
    model: str | None,
    prompts: Path | None,
    out: Path | None,
    samples: int | None,
    length: int | None,
) -> None:
    """Before any work."""
    check_folders(out)
    if out is not None and out.suffix != ".toml":
        raise RequestError(
            f"--out {out} must end with .toml, so that --prefill can tell a profile from a preset"
        )
    if prompts is None and model is not None:
        raise RequestError(
            f"give --prompts of your own for {model}: it was not trained on the reader's world"
        )
    for name, value in (("--samples", samples), ("--length", length)):
        if prompts is not None and value is not None:
            raise RequestError(
                f"{name} {value} is for built-in questions and --prompts brings others; "
                "leave one out"
            )


def read_tasks(path: Path) -> list[Task]:
    """The prompts of a file or folder, with names for what may be wrong with them. Raises
    RequestError."""
    from lazyahead.draft.sources import find_sources, json_lines
    from lazyahead.tune.answers import Task

    if path.is_dir():
        tasks = [Task(str(file), read_text(file)) for file in find_sources([path])]
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        tasks = [
            _json_task(f"{path}, line {number}", values) for number, values in json_lines(path)
        ]
    else:
        lines = enumerate(read_text(path).splitlines(), 1)
        tasks = [Task(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    empty = next((task.name for task in tasks if not task.text.strip()), None)
    if empty or not tasks:
        raise RequestError(f"{empty or path} has no prompt; write some text")
    return tasks


def _json_task(name: str, values: dict[str, Any]) -> Task:
    from lazyahead.tune.answers import Task

    turns = values.get("turns")
    question = values.get("question")
    prompt = turns[0] if isinstance(turns, list) and turns else values.get("prompt")
    if not isinstance(prompt, str) or not isinstance(question, str | None):
        raise RequestError(
            f"{name}: needs a text as `prompt`, and one as `question` where there is one"
        )
    return Task(name, check_text(name, prompt), question and check_text(name, question))


def own_tasks(count: int, length: int, seed: int) -> list[Task]:
    """Questions of the reader's world, category by category: every other one is held out."""
    from lazyahead.reader import CATEGORIES, samples
    from lazyahead.tune.answers import Task

    return [
        Task(f"{category} {number}", sample.document, sample.question)
        for category in CATEGORIES
        for number, sample in enumerate(samples(category, length, seed, count), 1)
    ]


def fields(tuned: Tuned, written: str | None) -> dict[str, Any]:
    """What `--json` has of a search: `profile` is null where nothing is safe."""
    values = {name: value for name, value in asdict(tuned).items() if name != "found"}
    found = tuned.found
    if found is None:
        return {"profile": None, "file": None, **values}
    return {
        "profile": found.prefill.to_dict(),
        "file": written,
        "search": asdict(found.search),
        "held_out": found.held_out and asdict(found.held_out),
        "ideal_speedup": found.ideal_speedup,
        "ttft_speedup": found.clock.speedup,
        "full_ttft_s": found.clock.full_ttft_s,
        "ttft_s": found.clock.ttft_s,
        **values,
    }


def _write(path: Path, model: str, found: Found, tuned: Tuned, agree: float) -> None:
    """The profile, and where it comes from."""
    origin = {
        "model": model,
        "prompts": tuned.num_prompts,
        "prompt_tokens": tuned.prompt_tokens,
        "agree": agree,
    }
    origin |= {
        "ideal_speedup": round(found.ideal_speedup, 3),
        "ttft_speedup": round(found.clock.speedup, 3),
    }
    origin |= {"lazyahead": version("lazyahead")}
    lines = [f"{name} = {json_.dumps(value, ensure_ascii=False)}" for name, value in origin.items()]
    verb = "replaced" if path.exists() else "wrote"
    with whole_file(path) as name:
        found.prefill.save(name)
        with name.open("a", encoding="utf-8") as file:
            file.write("\n[tuned]\n" + "\n".join(lines) + "\n")
    note(f"{verb} {path}")


def _note_skipped(tuned: Tuned, min_tokens: int) -> None:
    if tuned.skipped:
        first = ", ".join(tuned.skipped[:5])
        more = len(tuned.skipped) - 5
        others = f" and {more} more" if more > 0 else ""
        note(f"left out, shorter than min_tokens {min_tokens}: {first}{others}")


def _show(tuned: Tuned, out: Path | None, agree: float) -> None:
    from lazyahead.tune.tuner import words

    console = Console(highlight=False, soft_wrap=True)
    effort = (
        f"{tuned.num_tried} settings tried on {tuned.num_prompts} prompts of "
        f"{tuned.prompt_tokens:,} tokens"
    )
    found = tuned.found
    if found is None:
        wanted = "every answer" if agree == 1 else f"{agree:.0%} of the answers"
        console.print(
            f"Nothing safe was found: no pruning leaves {wanted} as it is ({effort}).",
            style="yellow",
        )
        console.print(f"Changed most often: {', '.join(tuned.hardest[:3])}.", markup=False)
        console.print(
            "Keep --prefill off for prompts like these, or allow some to differ with --agree 0.9."
        )
        return
    clock = found.clock
    rule = found.prefill
    console.print(
        f"Keep {words(rule.schedule)}, scored by {rule.scorer} ({effort}).",
        style="green",
        markup=False,
    )
    console.print(
        f"Same answers: {_count(found.search)} that guided the search, {_held_out(found.held_out)}."
    )
    console.print(
        f"First token: {seconds(clock.ttft_s)} instead of {seconds(clock.full_ttft_s)} unpruned, "
        f"{clock.speedup:.2f}x as fast ({found.ideal_speedup:.2f}x by FLOPs)."
    )
    console.print(
        f"Use it with --prefill {out}"
        if out
        else "Nothing was written; keep it with --out profile.toml"
    )


def _count(agreement: AgreementCount) -> str:
    return f"{agreement.agreed} of {agreement.of}"


def _held_out(agreement: AgreementCount | None) -> str:
    return f"{_count(agreement)} held out" if agreement else "none held out (that takes 8 prompts)"
