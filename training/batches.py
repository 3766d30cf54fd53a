"""Training batches: a pure function of (stage, step), so that training resumes with nothing but the
step number."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lazyahead.reader.pages import Page
from lazyahead.reader.prompt import READ_FIRST
from lazyahead.reader.tasks import CHARS_PER_TOKEN, build_page
from lazyahead.reader.world import World
from training.plans import Stage

MAX_POSITION = 16384
ANSWER_WEIGHT = 1.0
REPEAT_WEIGHT = 0.5
CONTEXT_WEIGHT = 0.1
CONTEXT_SHARE = 0.25
READ_FIRST_SHARE = 0.25  # pages with a neutral exchange before their questions
# How often each task is drawn.
TASK_WEIGHTS = {
    "single_doc_qa": 3.0,
    "multi_doc_qa": 5.0,
    "summarization": 1.5,
    "few_shot": 3.0,
    "synthetic": 3.0,
    "code": 1.5,
    "rag": 1.5,
}
# A label is two or three tokens where other answers are fifteen and more: without emphasis it has
# little weight in the loss.
EMPHASIS = {"few_shot": 4.0}
ONCE = {"summarization", "few_shot"}  # two of these in one sequence would contradict each other


@dataclass(frozen=True)
class Batch:
    """`token_ids`, `weights` of predicting each token, `positions`; each (batch, length + 1)."""

    token_ids: Tensor
    weights: Tensor
    positions: Tensor


def make_batch(stage: Stage, step: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Batch:
    """The batch of one global step; another seed draws other pages, for weights that have seen
    these."""
    rng = random.Random(f"train {seed} {step}")
    texts = []
    positions = []
    for _ in range(stage.batch):
        if rng.random() < stage.repeats:
            texts.append(_repeated_spans(rng, stage.length + 1, len(tokenizer)))
        else:
            texts.append(_packed_pages(rng, stage, tokenizer))
        positions.append(_positions(rng, stage.length + 1))
    token_ids, weights = zip(*texts, strict=True)
    return Batch(torch.tensor(token_ids), torch.tensor(weights), torch.tensor(positions))


def _repeated_spans(
    rng: random.Random, length: int, vocab_size: int
) -> tuple[list[int], list[float]]:
    """Random tokens of which spans come again; only the repetitions can be, and have to be,
    predicted."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        span = [rng.randrange(3, vocab_size) for _ in range(int(2 ** rng.uniform(2, 7)))]
        ids += span
        weights += [0.0] * len(span)
        for _ in range(rng.randint(1, 3)):
            gap = [rng.randrange(3, vocab_size) for _ in range(rng.choice((0, 0, 3, 9)))]
            start = rng.randint(0, len(span) // 3)
            end = rng.randint(max(start + 2, 2 * len(span) // 3), len(span))
            ids += gap + span[start:end]
            weights += [0.0] * (len(gap) + 1) + [REPEAT_WEIGHT] * (end - start - 1)
    return ids[:length], weights[:length]


def _packed_pages(
    rng: random.Random, stage: Stage, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[float]]:
    """Pages with their questions, one after the other; later pages see earlier ones, which only
    makes it harder."""
    length = stage.length + 1
    ids: list[int] = []
    weights: list[float] = []
    tasks = dict(TASK_WEIGHTS)
    while length - len(ids) > 160:
        room = length - len(ids)
        tokens = (
            rng.randint(100, 300) if rng.random() < stage.dense else room * rng.uniform(0.4, 0.9)
        )
        category = rng.choices(list(tasks), list(tasks.values()))[0]
        if category in ONCE:
            del tasks[category]
        chars = round(min(tokens, room * 0.8) * CHARS_PER_TOKEN[category])
        page = build_page(category, World(rng, "train"), chars)
        page_ids, page_weights = _encode(rng, page, room, tokenizer, EMPHASIS.get(category, 1.0))
        ids += page_ids
        weights += page_weights
    padding = max(0, length - len(ids))
    return (ids + [tokenizer.pad_token_id] * padding)[:length], (weights + [0.0] * padding)[:length]


def _encode(
    rng: random.Random,
    page: Page,
    room: int,
    tokenizer: PreTrainedTokenizerBase,
    emphasis: float = 1.0,
) -> tuple[list[int], list[float]]:
    """A page as tokens and weights, with as many of its questions as fit into `room` tokens.

    `emphasis` multiplies the weight of the answers.
    """
    ids: list[int] = tokenizer(f"Document: {page.document}\n\n").input_ids[:room]
    weights = [CONTEXT_WEIGHT if rng.random() < CONTEXT_SHARE else 0.0 for _ in ids]
    exchanges = ([READ_FIRST] if rng.random() < READ_FIRST_SHARE else []) + list(page.exchanges)
    for question, answer in exchanges:
        asked = tokenizer(f"Question: {question}\nAnswer:").input_ids
        answered = [*tokenizer(f" {answer}").input_ids, tokenizer.eos_token_id]
        after = tokenizer("\n\n").input_ids
        if len(ids) + len(asked) + len(answered) + len(after) > room:
            break
        ids += asked + answered + after
        weights += (
            [0.0] * len(asked) + [ANSWER_WEIGHT * emphasis] * len(answered) + [0.0] * len(after)
        )
    return ids, weights


def _positions(rng: random.Random, length: int) -> list[int]:
    """Positions 0, 1, 2 …, for every other sequence with jumps: long positions at the price of
    short sequences."""
    positions = list(range(length))
    if rng.random() < 0.5:
        count = rng.randint(1, 8)
        room = max(0, MAX_POSITION - length - 1)
        jumps = sorted(rng.randint(0, room) for _ in range(count))
        cuts = sorted(rng.sample(range(1, length), count))
        for cut, jump in zip(cuts, jumps, strict=True):
            positions[cut:] = range(cut + jump, length + jump)
    return positions
