"""Which replica answers: the one whose prefix cache is likely to hold the document, unless it has
more than its share of the work.

A rendezvous hash ranks the replicas for each document (Thaler and Ravishankar, 1998): when one
joins or leaves, only the documents that it wins or held move. A bound on the load (Mirrokni et
al., arXiv 1608.01350) sends what exceeds it to the document's next replica, always the same one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lazyahead.errors import ConfigError

PREFIX_CHARS = 2048
"""First characters of a prompt that say which document it is about."""
LOAD_FACTOR = 2.0
"""A replica takes at most so many times its fair share before the next one is asked. Chosen by
simulation (docs/scale.md)."""


def document_key(body: Mapping[str, Any], num_chars: int = PREFIX_CHARS) -> str:
    """What a request is about: the start of its text. Requests whose texts start alike have one
    key, whatever the endpoint's fields are called."""
    said = [body.get(name) for name in ("system", "instructions", "messages", "input", "text")]
    return _start_of([part for part in [*said, body.get("prompt")] if part], num_chars)


def rank(key: str, replicas: Sequence[str]) -> list[str]:
    """The replicas in the order in which a document prefers them. Depends on the names alone, not
    on their order nor on who asks."""
    return sorted(replicas, key=lambda replica: _score(key, replica))


def choose(key: str, loads: Mapping[str, int], load_factor: float = LOAD_FACTOR) -> str:
    """The replica for one more request about `key`, where `loads` are the requests that each has
    now: the first by `rank` whose load stays within `load_factor` times the mean.

    Raises ConfigError for no replicas, and for a factor below 1.
    """
    if not loads:
        raise ConfigError("there is no replica to choose from; start one")
    if not load_factor >= 1.0:
        raise ConfigError(f"load_factor must be at least 1, got {load_factor}")
    return order(key, loads, load_factor)[0]


def order(
    key: str, loads: Mapping[str, int], load_factor: float = LOAD_FACTOR, places: int | None = None
) -> list[str]:
    """The replicas in the order in which to ask them about `key`: by `rank`, but last those that
    have their share or, of `places`, none left."""
    limit = bound(sum(loads.values()) + 1, len(loads), load_factor)
    limit = limit if places is None else min(limit, places)
    ranked = rank(key, list(loads))
    return sorted(ranked, key=lambda replica: loads[replica] >= limit)


def bound(num_requests: int, num_replicas: int, load_factor: float) -> int:
    """The most requests that one replica may have when there are so many in all."""
    return math.ceil(load_factor * num_requests / num_replicas)


def _score(key: str, replica: str) -> tuple[bytes, str]:
    parts = f"{len(replica)}:{replica}{key}".encode(errors="surrogatepass")
    return hashlib.blake2b(parts, digest_size=8).digest(), replica


def _start_of(value: Any, num_chars: int) -> str:
    """The first characters of a prompt: a text, token ids, or messages."""
    found: list[str] = []
    left = num_chars
    for text in _texts(value):
        found.append(text[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    return "".join(found)


def _texts(value: Any) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _texts(value.get("content") or value.get("text") or "")
    if isinstance(value, Sequence) and value and isinstance(value[0], int):
        return [json.dumps(list(value[:PREFIX_CHARS]))]
    if isinstance(value, Sequence):
        return [text for part in value for text in _texts(part)]
    return []
