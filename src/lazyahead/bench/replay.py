"""Drafters on recorded text, without a model: how much they find, and what finding costs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lazyahead.draft.budget import RowCost
from lazyahead.draft.drafter import NoDrafter, PromptLookupDrafter
from lazyahead.draft.replay import FREE_ROWS, replay
from lazyahead.draft.tree import Source
from lazyahead.draft.trie_drafter import TrieDrafter
from lazyahead.reader import samples

DRAFTERS: dict[str, type[TrieDrafter] | type[PromptLookupDrafter] | type[NoDrafter]] = {
    "trie": TrieDrafter,
    "prompt_lookup": PromptLookupDrafter,
    "none": NoDrafter,
}
MEMORY_TOKENS = 1 << 20
NUM_ANSWER = 1024
"""Tokens of the answer after each context."""
Text = tuple[Sequence[int], Sequence[int]]
"""Prompt and answer."""


@dataclass(frozen=True)
class ReplayRow:
    """What one drafter did with the recorded answers."""

    drafter: str
    tokens_per_step: float
    acceptance: float
    """Accepted share of the drafted tokens."""
    rows_per_step: float
    draft_us_per_token: float
    """Microseconds of proposing, choosing, learning and indexing for each token of the answers."""
    index_us_per_token: float
    """Microseconds of indexing for each token of the prompts."""
    ideal_speedup: float
    """Over decoding token by token, with the modelled cost of each step and the measured time of
    drafting."""


@dataclass(frozen=True)
class ContextRow:
    """What drafting costs after a context of this length, in microseconds."""

    length: int
    memory_tokens: int
    """Tokens of earlier answers that are searched as well."""
    draft_us_per_token: float
    """Of the answer: proposing, choosing, verifying, learning and indexing, drafts of up to 64
    tokens."""
    draft_us_per_step: float
    """The same for each step, which brings several tokens."""
    insert_us_per_token: float
    """Indexing a token of the answer."""
    index_us_per_token: float
    """Indexing a token of the prompt."""
    bytes_per_token: float


def own_texts(encode: Callable[[str], list[int]], length: int, count: int) -> list[Text]:
    """Answers of the reader's world, for when there is no other text."""
    drawn = samples("rag", max(length, 256), n=count)
    return [(encode(sample.prompt), encode(f" {sample.answer}")) for sample in drawn]


def windows(token_ids: Sequence[int], length: int, answer_length: int, count: int) -> list[Text]:
    """Parts of a text, the last ones, as if each were an answer to the `length` tokens before it.

    Of a short text the first half only comes before answers.
    """
    last = len(token_ids) - answer_length
    first = min(length, last // 2)
    starts = sorted(
        {
            last - index * answer_length
            for index in range(count)
            if last - index * answer_length >= first
        }
    )
    return [
        (token_ids[max(0, start - length) : start], token_ids[start : start + answer_length])
        for start in starts
    ]


def measure_drafters(
    texts: Sequence[Text], cost: RowCost = FREE_ROWS, *, remember: bool = False
) -> list[ReplayRow]:
    """Every drafter on the same answers. With `remember`, answers help those after them."""
    rows = []
    for name, kind in DRAFTERS.items():
        result = replay(kind(), texts, cost, remember=remember)
        rows.append(
            ReplayRow(
                drafter=name,
                tokens_per_step=result.tokens_per_step,
                acceptance=result.acceptance,
                rows_per_step=1 + result.num_drafted / max(1, result.num_steps),
                draft_us_per_token=result.draft_us_per_token,
                index_us_per_token=result.prompt_us_per_token,
                ideal_speedup=result.speedup,
            )
        )
    return rows


def measure_contexts(token_ids: Sequence[int], lengths: Sequence[int]) -> Iterator[ContextRow]:
    """The cost of drafting after prompts of these lengths, without and with a memory of a million
    tokens.

    The text is repeated with changes where it is shorter, so that there is always something to
    find.
    """
    for num_remembered in (0, MEMORY_TOKENS):
        drafter = TrieDrafter(capacity_bytes=64 << 20 if num_remembered else 0)
        if num_remembered:
            for start in range(0, num_remembered, 1024):
                drafter.remember(_stretched(token_ids, 1024, seed=start))
        for length in lengths:
            yield _measure_context(
                drafter, _stretched(token_ids, length + NUM_ANSWER), length, num_remembered
            )


def _measure_context(
    drafter: TrieDrafter, text: Sequence[int], length: int, memory_tokens: int
) -> ContextRow:
    prompt = text[:length]
    answer = text[length:]
    result = replay(drafter, [(prompt, answer)] * 3)
    request = drafter.start(prompt)
    begin = time.thread_time()
    for token in answer:
        request.extend([token], Source.OUTPUT)
        request.index()
    insert_s = time.thread_time() - begin
    return ContextRow(
        length=length,
        memory_tokens=memory_tokens,
        draft_us_per_token=result.draft_us_per_token,
        draft_us_per_step=1e6 * result.draft_s / result.num_steps,
        insert_us_per_token=1e6 * insert_s / len(answer),
        index_us_per_token=result.prompt_us_per_token,
        bytes_per_token=(request.own.nbytes + drafter.nbytes()) / (len(text) + memory_tokens),
    )


def _stretched(token_ids: Sequence[int], length: int, seed: int = 0) -> list[int]:
    """`length` tokens: stretches of the text in random order, some 16 to 64 tokens each."""
    rng = random.Random(seed)
    found: list[int] = []
    while len(found) < length:
        start = rng.randrange(len(token_ids))
        found += token_ids[start : start + rng.randrange(16, 65)]
    return found[:length]
