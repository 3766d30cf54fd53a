"""Logits to token. Noise is drawn per seed and place in the answer, so drafting cannot change what
is sampled."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, isfinite

import torch
from torch import Tensor

from lazyahead.errors import ConfigError

Processor = Callable[[Tensor, Tensor], Tensor]
"""Token ids so far (1, N) and logits (1, V) to logits (1, V), as transformers' `LogitsProcessor`.
"""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. Raises ConfigError naming a value that cannot mean
    anything.

    Whether and how tokens are drawn, and how many there are at most, is said here alone: a model's
    generation config does not make an answer sample. What that config says of tokens
    (`suppress_tokens`, `bad_words_ids`, `repetition_penalty`, forced tokens, `stop_strings`, ...)
    holds as in `generate`, except where a field here is set to something else than its default.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never written."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int | None = None
    """None draws one."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not (_is_number(value) and low <= value <= high):
                raise ConfigError(f"{name} must be between {low} and {high}, got {value!r}")
        for name in ("max_new_tokens", "top_k", "no_repeat_ngram_size", "min_new_tokens"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 10):
            raise ConfigError(
                "repetition_penalty must be above 0 and at most 10, got "
                f"{self.repetition_penalty!r}"
            )
        if not isinstance(self.stop, tuple) or not all(
            isinstance(stop, str) and stop for stop in self.stop
        ):
            raise ConfigError(
                f"stop must be a tuple of texts that are not empty, got {self.stop!r}"
            )
        if self.seed is not None and not (_is_token(self.seed) and self.seed < 1 << 63):
            raise ConfigError(f"seed must be between 0 and 2**63 - 1, got {self.seed!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}"
            )
        self._check_tokens()

    def several(self, count: int) -> list[Sampling]:
        """The same for each of several answers, with seeds that count up."""
        if count == 1:
            return [self]
        first = secrets.randbits(62) if self.seed is None else self.seed
        return [replace(self, seed=(first + place) % (1 << 63)) for place in range(count)]

    def _check_tokens(self) -> None:
        for word in self.bad_words:
            if (
                not isinstance(word, list | tuple)
                or not word
                or not all(_is_token(token) for token in word)
            ):
                raise ConfigError(
                    f"bad_words must hold sequences of token ids that are not empty, got {word!r}"
                )
        for token, bias in self.logit_bias.items():
            if not (_is_token(token) and (_is_number(bias) or bias == -inf)):
                raise ConfigError(
                    "logit_bias must give token ids a finite number or -inf, got "
                    f"{token!r}: {bias!r}"
                )


_RANGES = (
    ("max_new_tokens", 1, 1 << 20),
    ("temperature", 0, 100),
    ("top_k", 0, 1 << 31),
    ("min_p", 0, 1),
    ("presence_penalty", -10, 10),
    ("frequency_penalty", -10, 10),
    ("no_repeat_ngram_size", 0, 1 << 20),
    ("min_new_tokens", 0, 1 << 20),
)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Picker:
    """Chooses the token after a prefix: processors on that very prefix, then the likeliest or a
    seeded draw."""

    def __init__(
        self, processors: Processor | None = None, do_sample: bool = False, seed: int | None = None
    ) -> None:
        self.processors, self.do_sample = processors, do_sample
        self.seed = secrets.randbits(62) if seed is None else seed

    @property
    def is_plain(self) -> bool:
        """The likeliest token of the bare logits: nothing depends on the prefix."""
        return self.processors is None and not self.do_sample

    def process(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Logits (V,) after `prefix` (1, N), as they are chosen from, in fp32."""
        logits = logits.float()
        return (
            logits
            if self.processors is None
            else self.processors(prefix.to(logits.device), logits[None])[0]
        )

    def choose(self, logits: Tensor, offset: int) -> int:
        """Token from processed logits (V,) at place `offset` of the answer."""
        if not self.do_sample:
            return int(logits.argmax())
        return int((logits.softmax(-1) / self._noise(offset, logits)).argmax())

    def _noise(self, offset: int, like: Tensor) -> Tensor:
        """Exponential noise: argmax of p / noise is a draw from p, and changes as p does."""
        place = hashlib.blake2b(
            f"{self.seed} {offset}".encode(), digest_size=4
        ).digest()  # torch hears 32 bits
        generator = torch.Generator().manual_seed(int.from_bytes(place))
        return (
            torch.empty(like.shape, dtype=torch.float32)
            .exponential_(generator=generator)
            .to(like.device)
        )
