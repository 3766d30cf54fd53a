"""Statistics of the tokens for the first weights: frequencies, and which tokens are one word."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lazyahead.reader.tasks import CATEGORIES, build_page
from lazyahead.reader.world import World


@dataclass(frozen=True)
class Vocabulary:
    """Of every token its relative frequency, and the id of its stem: the first token that differs
    only in case or in a leading space. Both (V,)."""

    frequencies: Tensor
    stems: Tensor


def study(tokenizer: PreTrainedTokenizerBase, num_pages: int = 300) -> Vocabulary:
    """Counts tokens on pages of the training split; a token that does not occur counts as one that
    occurs once."""
    rng = random.Random("vocabulary")
    counts = torch.ones(len(tokenizer))
    for index in range(num_pages):
        page = build_page(CATEGORIES[index % len(CATEGORIES)], World(rng, "train"), 2000)
        ids = torch.tensor(tokenizer(page.document).input_ids)
        counts += torch.bincount(ids, minlength=len(counts))
    first: dict[str, int] = {}
    words = [tokenizer.decode([token]).strip().lower() for token in range(len(tokenizer))]
    stems = [first.setdefault(word or f"token {token}", token) for token, word in enumerate(words)]
    return Vocabulary(counts / counts.sum(), torch.tensor(stems))
