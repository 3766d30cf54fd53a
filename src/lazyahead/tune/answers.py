"""Answers after a full prefill, and whether a pruned prefill gives the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import NamedTuple

from lazyahead.config import LazyPrefill
from lazyahead.errors import RequestError
from lazyahead.llm import LLM
from lazyahead.report import Report
from lazyahead.sampling import Sampling


class Task(NamedTuple):
    """One prompt: its name for error messages, a text, and a question if there is one."""

    name: str
    text: str
    question: str | None = None


@dataclass(frozen=True)
class AgreementCount:
    """How many answers are the same, of how many."""

    agreed: int
    of: int


class Answers:
    """A model's answers after a full prefill, and whether a pruned one gives the same."""

    def __init__(
        self, llm: LLM, tasks: Sequence[Task], max_new_tokens: int, progress: Report
    ) -> None:
        """`llm` prunes nothing. Raises RequestError, ContextLengthError naming a task that cannot
        be answered."""
        self._llm = llm
        self._lazy = llm
        self._tasks = tasks
        self._sampling = Sampling(max_new_tokens=max_new_tokens)
        self._expected: list[tuple[int, ...]] = []
        self._known: dict[tuple[LazyPrefill, int], bool] = {}
        self._hardness: Counter[int] = Counter()
        for number, task in enumerate(tasks):
            progress(f"full prefill, prompt {number + 1} of {len(tasks)}", number / len(tasks))
            try:
                pieces = llm.stream(task.text, task.question, sampling=self._sampling)
                self._expected.append(tuple(token for piece in pieces for token in piece.token_ids))
            except RequestError as error:
                raise RequestError(f"{task.name}: {error}") from None

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)

    @property
    def num_answered(self) -> int:
        """Answers that were compared."""
        return len(self._known)

    @property
    def num_tried(self) -> int:
        """Strategies that were tried."""
        return len({rule for rule, _ in self._known})

    @property
    def hardest(self) -> tuple[str, ...]:
        """The tasks whose answers changed, most often changed first, with how often of how many
        tries."""
        tries = Counter(index for _, index in self._known)
        changed = [(index, num) for index, num in self._hardness.most_common() if num]
        return tuple(
            f"{self._tasks[index].name} ({num} of {tries[index]})" for index, num in changed
        )

    def same(self, rule: LazyPrefill, index: int) -> bool:
        """Whether the task's answer is the same by `rule`, token by token."""
        key = rule, index
        if key not in self._known:
            self._known[key] = self._compare(rule, index)
            self._hardness[index] += not self._known[key]
        return self._known[key]

    def agree(self, rule: LazyPrefill, which: Sequence[int], least: float) -> bool:
        """Whether at least the fraction `least` of these answers is the same; hard ones first, no
        more than needed."""
        may_differ = floor((1 - least) * len(which) + 1e-9)
        for index in sorted(which, key=lambda index: -self._hardness[index]):
            may_differ -= not self.same(rule, index)
            if may_differ < 0:
                return False
        return True

    def agreement(self, rule: LazyPrefill, which: Sequence[int]) -> AgreementCount:
        """How many of these answers are the same."""
        return AgreementCount(sum(self.same(rule, index) for index in which), len(which))

    def _compare(self, rule: LazyPrefill, index: int) -> bool:
        task = self._tasks[index]
        expected = self._expected[index]
        num_seen = 0
        for piece in self._reader(rule).stream(task.text, task.question, sampling=self._sampling):
            if piece.token_ids != expected[num_seen : num_seen + len(piece.token_ids)]:
                return False  # leaving the stream cancels the rest
            num_seen += len(piece.token_ids)
        return num_seen == len(expected)

    def _reader(self, rule: LazyPrefill) -> LLM:
        if self._lazy.prefill != rule:
            self._lazy = under(self._llm, rule)
        return self._lazy


def under(llm: LLM, rule: LazyPrefill | None) -> LLM:
    """An engine on the same weights under another prefill strategy, without drafts."""
    other = LLM(llm.model, tokenizer=llm.tokenizer, prefill=rule, decode=None)
    other.name = llm.name
    return other
