"""Samples from JSON lines: LongBench, BABILong, Spec-Bench, or any `{prompt, answers}`.

Which one a file is, the fields of each line tell:

| fields | benchmark |
|---|---|
| `input`, `context`, `answers`, `all_classes`, `dataset` | LongBench as published |
| `dataset`, `prompt`, `answers` | LongBench, its template applied |
| `input`, `question`, `target` | BABILong |
| `turns`, `category` | Spec-Bench, whose first turns are asked |
| `prompt`, `answers` | anything else |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lazyahead.bench.data.longbench import NEEDS_WORDS, Task, find_task
from lazyahead.bench.data.sample import Sample
from lazyahead.draft.sources import json_lines
from lazyahead.errors import RequestError

MT_BENCH = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)
"""Spec-Bench's own categories of these are one: mt_bench."""
LINES = ("all", "even", "odd")
LONGEST_QUESTION = 1000  # characters; a longer last paragraph is text to read
BABILONG = (
    "I will give you context with facts hidden in some random text and a question. Answer the "
    "question based only on the facts; where they change, the latest counts. Answer with one word."
    "\n\n{input}\n\nQuestion: {question}\nAnswer:"
)
BABILONG_TOKENS = 20


@dataclass(frozen=True)
class Samples:
    """What a file or a folder holds."""

    samples: tuple[Sample, ...]
    left_out: tuple[str, ...] = ()
    """A line for each dataset that cannot be scored here."""


def read_samples(path: str | Path, lines: str = "all") -> Samples:
    """Samples of a JSONL file, or of all in a folder, in order.

    `lines` takes the even or the odd lines of each file (the first line is line 1); all by default.
    Raises RequestError naming file, line and field for a line that is no sample, for a path
    without samples, and for a single file of a task that cannot be scored here.
    """
    path, samples, left_out = Path(path), list[Sample](), list[str]()
    if lines not in LINES:
        raise RequestError(f"lines must be one of {', '.join(LINES)}, got {lines!r}")
    for file in find_files(path):
        found = list(_file(file))
        refused = sorted({sample.dataset for _, sample in found if sample.metric == ""})
        left_out += [f"{dataset} ({file.name}): {NEEDS_WORDS}" for dataset in refused]
        wanted = [s for number, s in found if s.metric and _is_wanted(number, lines)]
        samples += _with_labels(wanted, [sample for _, sample in found])
    if not samples:
        reason = left_out[0] if left_out else f"no {lines} lines" if lines != "all" else "empty"
        raise RequestError(f"{path} gives no samples ({reason}); name other data")
    return Samples(tuple(samples), tuple(left_out))


def find_files(path: Path) -> list[Path]:
    """The file, or the `.jsonl` files of the folder. Raises RequestError where there are none."""
    if not path.is_dir():
        if not path.is_file():
            raise RequestError(f"no file or folder at {path}; check the path")
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise RequestError(f"{path} holds no .jsonl files; name the folder that does")
    return files


def take(samples: Sequence[Sample], count: int, key: str = "dataset") -> list[Sample]:
    """The first `count` of each dataset (or of each other field `key`), in order."""
    seen: dict[str, int] = {}
    taken = []
    for sample in samples:
        name = str(getattr(sample, key))
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= count:
            taken.append(sample)
    return taken


def _is_wanted(number: int, lines: str) -> bool:
    return lines == "all" or (number % 2 == 0) == (lines == "even")


def _file(path: Path) -> Iterator[tuple[int, Sample]]:
    for number, values in json_lines(path):
        yield number, _sample(_Line(path, number, values))


@dataclass(frozen=True)
class _Line:
    """A JSON object that knows where it stands, for messages."""

    path: Path
    number: int
    values: dict[str, Any]

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)

    def text(self, name: str, default: str | None = None) -> str:
        """A string field that is not blank. Raises RequestError."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or not (value.strip() or value == default):
            raise self.bad(name, "some text")
        return value

    def texts(self, name: str, is_optional: bool = False) -> tuple[str, ...]:
        """A list of strings, or one string; at least one unless optional. Raises RequestError."""
        value = self.values.get(name)
        if value is None and is_optional:
            return ()
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.bad(name, "a list of texts")
        if not value and not is_optional:
            raise self.bad(name, "at least one text")
        return tuple(value)

    def number_of(self, name: str, default: int) -> int:
        """A count of at least 1. Raises RequestError."""
        value = self.values.get(name, default)
        if type(value) is not int or value < 1:
            raise self.bad(name, "a whole number of at least 1")
        return value

    def bad(self, name: str, wanted: str) -> RequestError:
        got = repr(self.values.get(name))
        short = got if len(got) <= 60 else f"{got[:60]}…"
        return RequestError(
            f"{self.path}, line {self.number}: `{name}` must be {wanted}, got {short}"
        )


def _sample(line: _Line) -> Sample:
    if line.has("context"):
        return _longbench(line)
    if line.has("turns"):
        return _spec_bench(line)
    if line.has("target"):
        return _babilong(line)
    if line.has("prompt"):
        return _plain(line)
    fields = ", ".join(sorted(line.values)) or "none"
    raise RequestError(
        f"{line.path}, line {line.number}: needs `prompt` and `answers`, or the fields of "
        f"LongBench, BABILong or Spec-Bench, has {fields}"
    )


def _longbench(line: _Line) -> Sample:
    dataset = line.text("dataset", line.path.stem)
    task = find_task(dataset)
    if task is None:
        raise line.bad("dataset", "one of LongBench's")
    prompt = task.prompt(line.text("context"), line.text("input", ""))
    return _of_task(line, dataset, task, prompt)


def _of_task(line: _Line, dataset: str, task: Task, prompt: str) -> Sample:
    all_classes = line.texts("all_classes", is_optional=True)
    if task.metric == "classification" and not all_classes:
        raise line.bad("all_classes", "the classes that can be named")
    return Sample(
        dataset=dataset,
        category=task.category,
        prompt=prompt,
        answers=line.texts("answers"),
        all_classes=all_classes,
        max_new_tokens=task.max_new_tokens,
        use_chat_template=task.use_chat_template,
        metric=task.metric or "",
        first_line_only=task.first_line_only,
        question=task.asked(prompt) or last_paragraph(prompt),
    )


def _plain(line: _Line) -> Sample:
    dataset, prompt = line.text("dataset", line.path.stem), line.text("prompt")
    task = find_task(dataset)
    if task is not None:
        return _of_task(line, dataset, task, prompt)
    return Sample(
        dataset=dataset,
        category=line.text("category", line.path.stem),
        prompt=prompt,
        answers=line.texts("answers", is_optional=not line.has("answers")),
        max_new_tokens=line.number_of("max_new_tokens", 64),
        question=last_paragraph(prompt),
    )


def _babilong(line: _Line) -> Sample:
    question = line.text("question").strip()
    prompt = BABILONG.replace("{question}", question).replace("{input}", line.text("input").strip())
    return Sample(
        dataset=line.path.stem,
        category=line.path.stem,
        prompt=prompt,
        answers=(line.text("target").strip(),),
        max_new_tokens=BABILONG_TOKENS,
        metric="only_label",
        question=last_paragraph(prompt),
    )


def _spec_bench(line: _Line) -> Sample:
    prompt, *_ = line.texts("turns")
    category = line.text("category", line.path.stem)
    return Sample(
        dataset=line.path.stem,
        category="mt_bench" if category in MT_BENCH else category,
        prompt=prompt,
        max_new_tokens=1024,
    )


def _with_labels(samples: Sequence[Sample], of_file: Sequence[Sample]) -> list[Sample]:
    """BABILong's labels are the answers that its file has."""
    labels = {
        answer for sample in of_file if sample.metric == "only_label" for answer in sample.answers
    }
    classes = tuple(sorted(labels))
    return [replace(s, all_classes=classes) if s.metric == "only_label" else s for s in samples]


def last_paragraph(prompt: str) -> str:
    """The end of a prompt behind its last blank line; empty where that is the prompt or long."""
    head, _, tail = prompt.rstrip().rpartition("\n\n")
    return tail if head and tail.strip() and len(tail) <= LONGEST_QUESTION else ""
