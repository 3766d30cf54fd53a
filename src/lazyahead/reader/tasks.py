"""Samples of the reader's tasks: the six categories of LongBench and three workloads, deterministic
by seed."""

import random
from dataclasses import dataclass

from lazyahead.reader.pages import BUILDERS, Page, several, single_doc_qa
from lazyahead.reader.prompt import READ_FIRST, format_prompt
from lazyahead.reader.world import Split, World

CATEGORIES = tuple(BUILDERS)  # measured as LongBench measures its own, see metrics.py
WORKLOADS = ("rag", "qa", "chat")  # what the speed benchmarks generate from

CHARS_PER_TOKEN = {
    "single_doc_qa": 4.95,
    "multi_doc_qa": 4.9,
    "summarization": 5.0,
    "few_shot": 3.95,
    "synthetic": 4.95,
    "code": 3.5,
    "rag": 4.9,
    "qa": 4.95,
    "chat": 4.95,
}


@dataclass(frozen=True)
class Sample:
    """One question about one document, with the answer the document supports.

    `history` holds earlier turns, (question, answer) pairs, oldest first; `others` what else could
    have been asked.
    """

    category: str
    document: str
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is given; it goes on with a space and the answer."""
        return format_prompt(self.document, self.question, self.history)


def build_page(category: str, world: World, chars: int) -> Page:
    """A page of a category or workload whose document has about `chars` characters."""
    if category in BUILDERS:
        return BUILDERS[category](world, chars)
    return several(world, chars) if category == "rag" else single_doc_qa(world, chars)


def samples(
    category: str,
    length: int = 4096,
    seed: int = 0,
    n: int = 1,
    heldout_templates: bool = False,
    split: Split = "eval",
) -> list[Sample]:
    """`n` samples whose prompts have about `length` tokens of the reader's tokenizer.

    Sample i does not depend on `n`. `heldout_templates` states and asks facts in sentences that
    training never uses (it changes nothing in few_shot, synthetic and code). Raises ValueError for
    an unknown category, or a length below 256 tokens.
    """
    if category not in CHARS_PER_TOKEN:
        raise ValueError(
            f"unknown category {category!r}; choose one of {', '.join(CHARS_PER_TOKEN)}"
        )
    if length < 256:
        raise ValueError(f"length is {length} tokens; the shortest document has 256")
    found = []
    for index in range(n):
        rng = random.Random(f"{split} {category} {length} {seed} {index}")
        world = World(rng, split, heldout_templates)
        page = build_page(category, world, round((length - 40) * CHARS_PER_TOKEN[category]))
        (question, answer), *others = page.exchanges
        history: tuple[tuple[str, str], ...] = ()
        if category == "chat":
            history = (READ_FIRST,) if index % 2 == 0 or not others else (others[0],)
        found.append(Sample(category, page.document, question, answer, history, tuple(others)))
    return found
