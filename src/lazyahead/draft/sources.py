"""Texts to remember: files, JSON lines, folders of documents, as token sequences."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lazyahead.errors import RequestError
from lazyahead.text import Tokenizer, encode_prompt, read_text

_SUFFIXES = (
    ".c .cc .cfg .cpp .cs .css .csv .go .h .hpp .html .ini .java .js .json .jsonl .kt .lua .md "
    ".php .py .rb .rs .rst .sh .sql .swift .tex .toml .ts .tsx .txt .xml .yaml .yml"
)
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
"""What a file in a folder must end with to be read."""


def find_sources(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named that look like text (hidden ones left out).

    Raises RequestError for a path that is not there, or a folder without texts.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.is_file():
                raise RequestError(f"no file or folder at {path}; check the path")
            found.append(path)
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in TEXT_SUFFIXES and file.is_file()
        ]
        inside = [
            file
            for file in inside
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not inside:
            raise RequestError(
                f"{path} holds no texts ({', '.join(sorted(TEXT_SUFFIXES)[:8])} …); name files "
                "instead"
            )
        found += inside
    return found


def read_sequences(
    path: Path, tokenizer: Tokenizer, num_vocabulary: int, prompt_tokens: int = 0
) -> Iterator[list[int]]:
    """A file's token sequences: one of a text, one a line of JSON lines. Raises RequestError naming
    what is wrong.

    A line has `text`, or `prompt` and `answer`, or `tokens`. Of a prompt the last `prompt_tokens`
    tokens stand before the answer, as in `Lookahead.memory_prompt_tokens`.
    """
    if path.suffix.lower() != ".jsonl":
        yield _encode(tokenizer, read_text(path))
        return
    for number, values in json_lines(path):
        try:
            yield _sequence(values, tokenizer, num_vocabulary, prompt_tokens)
        except RequestError as error:
            raise RequestError(f"{path}, line {number}: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers. Raises RequestError naming a line that
    is none."""
    num_found = 0
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise RequestError(f"{path}, line {number} is not a JSON object")
        for field, value in values.items():
            _check_field(f"{path}, line {number}", field, value)
        num_found += 1
        yield number, values
    if not num_found:
        raise RequestError(f"{path} is empty; write one JSON object a line")


def _check_field(where: str, name: str, value: object) -> None:
    """Raises RequestError for a field whose texts UTF-8 cannot hold: with half a character."""
    try:
        json.dumps([name, value], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"{where}: {name!a} has half a character (a lone surrogate), which no UTF-8 text can "
            "hold; write its whole pair"
        ) from None


def _sequence(
    values: dict[str, Any], tokenizer: Tokenizer, num_vocabulary: int, prompt_tokens: int
) -> list[int]:
    tokens = values.get("tokens")
    prompt = values.get("prompt")
    answer = values.get("answer")
    text = values.get("text")
    if isinstance(tokens, list):
        if not all(type(token) is int and 0 <= token < num_vocabulary for token in tokens):
            raise RequestError(f"`tokens` must be whole numbers from 0 to {num_vocabulary - 1}")
        return tokens
    if isinstance(prompt, str) and isinstance(answer, str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        written = [*_encode(tokenizer, answer), *end]
        if not prompt_tokens:
            return written
        return [*encode_prompt(tokenizer, prompt).token_ids[-prompt_tokens:], *written]
    if isinstance(text, str):
        return _encode(tokenizer, text)
    raise RequestError("needs `text`, or `prompt` and `answer`, or `tokens`")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
