"""Whether the tokenizer that transformers makes of a GGUF file is the one the file describes.

Some versions of transformers lose the merges of a file, so that text falls into single characters,
or do not begin texts with the token the file asks for. The model then answers, but poorly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from lazyahead.errors import UnsupportedModelError

_NUM_WORDS = 64
"""Words of the vocabulary that are tried, evenly spread."""
_LEAST = 4
"""Letters of such a word."""
_SPACES = ("▁", "Ġ")
"""How vocabularies write a space."""


def check_tokenizer(file: Path, fields: Mapping[str, Any], tokenizer: Any) -> None:
    """Lets texts begin with the token that the file asks for, by its `fields`. Raises
    UnsupportedModelError where words of its vocabulary are not read as the tokens they are."""
    words = _words(fields["tokenizer.ggml.tokens"].contents())
    found = sum(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words)
    if 2 * found < len(words):
        raise _lost(file, "merges")
    asked = fields.get("tokenizer.ggml.add_bos_token")
    if asked is None or not asked.contents() or _begins(tokenizer):
        return
    tokenizer.add_bos_token = True
    if not _begins(tokenizer):
        raise _lost(file, "first token")


def _words(tokens: Sequence[str]) -> list[str]:
    """Plain words among the tokens, with the space before them where there is one."""
    words = []
    for token in tokens:
        space, word = (token[:1], token[1:]) if token.startswith(_SPACES) else ("", token)
        if len(word) >= _LEAST and word.isascii() and word.isalpha():
            words.append(" " + word if space else word)
    return words[:: max(1, len(words) // _NUM_WORDS)]


def _begins(tokenizer: Any) -> bool:
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _lost(file: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers {transformers.__version__} loses the {what} of {file}'s tokenizer; use a "
        "newer transformers, or the model's safetensors folder"
    )
