"""Samples to tokens: LongBench's middle truncation, chat template, the question's place."""

from __future__ import annotations

from collections.abc import Sequence

from lazyahead.bench.data.sample import Sample
from lazyahead.text import Prompt, Tokenizer

FLOOR_TOKENS = 192
"""Last tokens of a prompt that a reading without context gets."""


def encode_sample(tokenizer: Tokenizer, sample: Sample, length: int | None = None) -> Prompt:
    """A sample's prompt as token ids, with the span of its question.

    A text of more than `length` tokens loses its middle first, as in LongBench; the chat template's
    tokens come on top. The template is used where the tokenizer has one and the sample allows it.
    """
    text = sample.prompt if length is None else truncate_middle(tokenizer, sample.prompt, length)
    is_chat = bool(sample.use_chat_template and tokenizer.chat_template)
    if is_chat:
        turns = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    options = {"add_special_tokens": not is_chat, "verbose": False}
    question = sample.question.strip()
    start = text.rfind(question) if question else -1
    if start < 0 or not tokenizer.is_fast:
        return Prompt(list(tokenizer(text, **options)["input_ids"]))
    encoding = tokenizer(text, return_offsets_mapping=True, **options)
    end = start + len(question)
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < end and b > start]
    return Prompt(list(encoding["input_ids"]), (inside[0], inside[-1] + 1) if inside else None)


def truncate_middle(tokenizer: Tokenizer, text: str, length: int) -> str:
    """At most `length` tokens of a text: its first half and its last, as LongBench cuts it."""
    token_ids = tokenizer(text, verbose=False)["input_ids"]
    if len(token_ids) <= length:
        return text
    half = length // 2
    parts = (token_ids[:half], token_ids[-half:])
    return "".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)


def encode_answer(tokenizer: Tokenizer, sample: Sample, limit: int) -> list[int]:
    """The first right answer as tokens that follow the prompt, `limit` of them at most.

    Where no chat template separates the two, an answer in mid-line begins with a space.
    """
    answer = sample.answers[0]
    is_chat = bool(sample.use_chat_template and tokenizer.chat_template)
    if not is_chat and not sample.prompt[-1:].isspace() and not answer[:1].isspace():
        answer = f" {answer}"
    token_ids = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    return list(token_ids[:limit])


def without_context(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """The end of a prompt: what a model is given that reads no context.

    A prompt that begins with the tokenizer's BOS keeps it: some models are lost without it, which
    would pass for what the context adds.
    """
    head = list(token_ids[:1]) if token_ids[0] == tokenizer.bos_token_id else []
    return [*head, *token_ids[max(len(head), len(token_ids) - FLOOR_TOKENS) :]]
