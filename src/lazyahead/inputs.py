"""What callers of an LLM may hand over, brought into one form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.draft.factory import parse_decode
from lazyahead.errors import ConfigError, RequestError
from lazyahead.strategies import parse_prefill
from lazyahead.text import Prompt

Text = str | list[int] | Prompt


def as_prefill(value: LazyPrefill | str | None) -> LazyPrefill | None:
    """A way of reading: itself, `off`, a preset's name, or a profile's path. Raises ConfigError for
    anything else."""
    if value is None or isinstance(value, LazyPrefill):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"prefill is a LazyPrefill, a name or None, got {value!r}")
    return parse_prefill(value)


def as_decode(value: Lookahead | Drafter | str | None) -> Lookahead | Drafter | None:
    """A decoding strategy: itself, a drafter, `off` or `lookahead`. Raises ConfigError for another
    name."""
    return parse_decode(value)


def as_prompts(given: Any, may_be_empty: bool = False) -> tuple[list[Text], bool]:
    """One or several prompts, and whether it is one alone: a text, token ids, what a tokenizer
    gives back, or several of the former. Raises RequestError for anything else, naming it, and for
    an empty one of several unless they `may_be_empty`."""
    if isinstance(given, str):
        return [given], True
    if isinstance(given, Mapping):
        return _from_tokenizer(given)
    given = _listed(given)
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise RequestError(f"a prompt is a text or token ids, got {type(given).__name__}")
    if given and all(_is_token(token) for token in given):
        return [list(given)], True
    prompts = [_listed(prompt) for prompt in given]
    for place, prompt in enumerate(prompts):
        is_ids = isinstance(prompt, list | tuple) and all(_is_token(token) for token in prompt)
        if not (isinstance(prompt, str) or is_ids):
            raise RequestError(
                f"prompt {place} must be a text or token ids, got {type(prompt).__name__} "
                f"{prompt!r:.60}"
            )
        is_empty = not prompt or (isinstance(prompt, str) and not prompt.strip())
        if is_empty and not may_be_empty:
            raise RequestError(f"prompt {place} is empty (counted from 0); leave it out")
    return [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts], False


@contextmanager
def naming(what: str, is_alone: bool = False) -> Iterator[None]:
    """Inside, a RequestError begins with `what` it is about, unless that `is_alone`."""
    try:
        yield
    except RequestError as error:
        if is_alone:
            raise
        raise type(error)(f"{what}: {error}") from None


def _from_tokenizer(given: Mapping[str, Any]) -> tuple[list[Text], bool]:
    """What calling a tokenizer gives back: `input_ids`, padding left out."""
    if "input_ids" not in given:
        raise RequestError(f"a prompt with the fields {sorted(given)} has no 'input_ids'")
    rows = _listed(given["input_ids"])
    mask = _listed(given.get("attention_mask"))
    is_one = bool(rows) and all(_is_token(token) for token in rows)
    if is_one:
        rows, mask = [rows], mask and [mask]
    if mask:
        rows = [
            [token for token, is_read in zip(row, kept, strict=True) if is_read]
            for row, kept in zip(map(_listed, rows), map(_listed, mask), strict=True)
        ]
    return as_prompts(rows)[0], is_one


def _listed(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
