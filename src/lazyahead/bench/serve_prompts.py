"""Prompts to send to a server: random ones of a length, or those of a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from lazyahead.bench.data.read import read_samples
from lazyahead.bench.serve_client import Ask
from lazyahead.errors import ConfigError, RequestError

_CONSONANTS, _VOWELS = "bdfghjklmnprstvwz", "aeiou"


class Tokens(Protocol):
    """Text to tokens and back."""

    async def encode(self, text: str) -> list[int]: ...

    async def decode(self, token_ids: Sequence[int]) -> str: ...


class ServerTokens:
    """By the server's /tokenize and /detokenize, as vLLM and lazyahead have them."""

    def __init__(self, client: httpx.AsyncClient, url: str, model: str) -> None:
        self._client, self._url, self._model = client, url, model

    async def encode(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return list((await self._post("/tokenize", body))["tokens"])

    async def decode(self, token_ids: Sequence[int]) -> str:
        body = {"model": self._model, "tokens": list(token_ids)}
        return str((await self._post("/detokenize", body))["prompt"])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._client.post(self._url + path, json=body)
            answer.raise_for_status()
            return dict(answer.json())
        except (httpx.HTTPError, ValueError) as error:
            raise RequestError(
                f"{self._url} does not count tokens at {path} ({error}); give --tokenizer FOLDER, "
                "or prompts of your own with --data"
            ) from None


class LocalTokens:
    """By a tokenizer on this machine."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"--tokenizer {name} cannot be loaded: {reason}") from None

    async def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    async def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


@dataclass(frozen=True)
class RandomPrompts:
    """Made-up words: nothing in them repeats, so that nothing can be drafted or cached."""

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    """Lengths are drawn evenly from (1 - this) to (1 + this) times those."""
    prefix_len: int = 0
    """Tokens in front that all prompts share."""

    def __post_init__(self) -> None:
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(
                f"--random-range-ratio must be at least 0 and below 1, got {self.range_ratio}"
            )

    async def draw(self, tokens: Tokens, num: int, seed: int) -> list[Ask]:
        rng = random.Random(seed)
        prefix = await _text(tokens, self.prefix_len, rng) + "\n" if self.prefix_len else ""
        asks = []
        for _ in range(num):
            text = prefix + await _text(tokens, self._length(self.input_len, rng), rng)
            output_len = self._length(self.output_len, rng)
            asks.append(Ask(text, output_len, len(await tokens.encode(text))))
        return asks

    def _length(self, middle: int, rng: random.Random) -> int:
        spread = int(middle * self.range_ratio)
        return max(1, rng.randint(middle - spread, middle + spread))


async def _text(tokens: Tokens, length: int, rng: random.Random) -> str:
    """So many tokens, give or take one where the cut changes a word."""
    words = " ".join(_word(rng) for _ in range(length))
    return await tokens.decode((await tokens.encode(words))[:length])


def _word(rng: random.Random) -> str:
    syllables = range(rng.randint(1, 3))
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in syllables)


def data_prompts(path: Path, num: int, output_len: int | None) -> tuple[list[Ask], list[str]]:
    """The first prompts of a file or folder, and lines about what was left out. Raises
    RequestError."""
    found = read_samples(path)
    samples = found.samples[:num]
    asks = [Ask(sample.prompt, output_len or sample.max_new_tokens) for sample in samples]
    return asks, list(found.left_out)
