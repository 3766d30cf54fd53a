"""The reader's tokenizer: byte-level BPE with single digits, so any text encodes and numbers are
copied by digits."""

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lazyahead.reader.prompt import EOS, format_prompt
from lazyahead.reader.tasks import CATEGORIES, build_page
from lazyahead.reader.world import World

VOCAB_SIZE = 2048
# Token ids 0, 1, 2.
UNUSED = "<s>"
END = EOS
PAD = "<pad>"


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] | trim -%}
{%- if message['role'] == 'system' -%}
{{- 'Document: ' + content + '\n\n' -}}
{%- elif message['role'] == 'user' -%}
{%- if content.startswith('Document:') or content.startswith('Question:') -%}
{{- content -}}
{%- elif '\n\n' in content -%}
{%- set parts = content.rsplit('\n\n', 1) -%}
{{- 'Document: ' + parts[0] + '\n\nQuestion: ' + parts[1] -}}
{%- else -%}
{{- 'Question: ' + content -}}
{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}
{{- '\nAnswer:' -}}
{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + content + eos_token -}}
{%- if not loop.last -%}
{{- '\n\n' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
"""Renders what `format_prompt` writes."""


def _texts(count: int) -> Iterator[str]:
    rng = random.Random("tokenizer")
    for index in range(count):
        heldout = index % 8 == 0
        page = build_page((*CATEGORIES, "rag")[index % 7], World(rng, "train", heldout), 1500)
        yield " ".join(
            format_prompt("", question) + " " + answer for question, answer in page.exchanges
        )
        yield page.document


def build_tokenizer(folder: Path, num_pages: int = 4000) -> None:
    """Trains the tokenizer on pages of the training split and writes it to `folder`, chat template
    included."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNUSED, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_texts(num_pages), trainer)
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=PAD, model_max_length=16384
    )
    outer.chat_template = CHAT_TEMPLATE
    outer.save_pretrained(folder)
