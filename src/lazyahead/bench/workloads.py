"""Prompts of the decoding benchmark: questions of the reader's world, random tokens, or parts of a
text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lazyahead.errors import ConfigError, RequestError
from lazyahead.llm import LLM
from lazyahead.reader import Sample, samples
from lazyahead.reader.tasks import CHARS_PER_TOKEN, build_page
from lazyahead.reader.world import World
from lazyahead.sampling import Sampling
from lazyahead.text import encode_turn, read_text

RANDOM_TEMPERATURE = 50.0
"""So high that any model samples nearly random tokens, which no drafter can predict."""


class Workload(NamedTuple):
    """Prompts, as token ids, and how they are answered."""

    name: str
    prompts: list[list[int]]
    sampling: Sampling


def workload(
    llm: LLM, name: str, length: int, count: int, max_new_tokens: int, seed: int
) -> Workload:
    """`count` prompts of about `length` tokens. Raises ConfigError for a name that is not in
    `WORKLOADS`."""
    if name not in WORKLOADS:
        raise ConfigError(f"no workload is called {name!r}; there are {', '.join(WORKLOADS)}")
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=seed)
    if name == "random":
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=RANDOM_TEMPERATURE,
            ignore_eos=True,
            seed=seed,
        )
    if length < SHORTEST:
        raise ConfigError(f"--length must be at least {SHORTEST}, got {length}")
    return Workload(name, WORKLOADS[name](llm, length, count, seed), sampling)


def stream_of_questions(
    llm: LLM, length: int, count: int, max_new_tokens: int, seed: int
) -> Workload:
    """Questions for single facts of a few documents, which state them in other words than the
    answer does. They are drawn from half as many different ones: as users' questions do, some
    come again."""
    chars = round((length - 40) * CHARS_PER_TOKEN["qa"])
    rng = random.Random(f"stream {length} {seed}")
    known: list[tuple[str, str]] = []
    while len(known) < max(1, count // 2):
        page = build_page("qa", World(rng, "eval"), chars)
        known += [(page.document, question) for question, _ in page.exchanges]
    asked = rng.choices(rng.sample(known, max(1, count // 2)), k=count)
    prompts = [llm.encode(document, question).token_ids for document, question in asked]
    return Workload("stream", prompts, Sampling(max_new_tokens=max_new_tokens, seed=seed))


def text_workload(llm: LLM, path: Path, length: int, count: int, max_new_tokens: int) -> Workload:
    """The model goes on with parts of a text. Raises RequestError for a text without two tokens."""
    token_ids = list(llm.tokenizer(read_text(path), verbose=False)["input_ids"])
    if len(token_ids) < 2:
        raise RequestError(f"{path} has no text; give one with some lines")
    length = min(length, len(token_ids))
    last = len(token_ids) - length
    starts = sorted({last * index // max(1, count - 1) for index in range(count)})
    prompts = [token_ids[start : start + length] for start in starts]
    return Workload("text", prompts, Sampling(max_new_tokens=max_new_tokens))


def _questions(category: str) -> Callable[[LLM, int, int, int], list[list[int]]]:
    def build(llm: LLM, length: int, count: int, seed: int) -> list[list[int]]:
        return [_encode(llm, sample) for sample in samples(category, length, seed, count)]

    return build


def _encode(llm: LLM, sample: Sample) -> list[int]:
    if not sample.history:
        return llm.encode(sample.document, sample.question).token_ids
    (first, answer), *_ = sample.history
    messages = [
        {"role": "user", "content": f"{sample.document}\n\n{first}"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": sample.question},
    ]
    return encode_turn(llm.tokenizer, messages).token_ids


def _random(llm: LLM, length: int, count: int, seed: int) -> list[list[int]]:
    rng, vocabulary = (
        random.Random(f"random {length} {seed}"),
        llm.model.config.get_text_config().vocab_size,
    )
    return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


SHORTEST = 256
WORKLOADS: dict[str, Callable[[LLM, int, int, int], list[list[int]]]] = {
    "rag": _questions("rag"),
    "qa": _questions("qa"),
    "code": _questions("code"),
    "chat": _questions("chat"),
    "random": _random,
}
"""What `--workload` takes."""
