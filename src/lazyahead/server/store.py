"""Responses that can be continued: their messages, and the session that has read them."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from lazyahead.cache.session import Session
from lazyahead.config import LazyPrefill

MAX_RESPONSES = 10_000


@dataclass
class Kept:
    """A finished response."""

    tenant: str
    messages: list[dict[str, Any]]
    """The conversation up to this answer, without instructions."""
    prefill: LazyPrefill | None
    session: Session | None
    """What has read it; None while a turn goes on with it and after, and once its memory was needed
    for others."""
    until: float = field(default=0.0)

    @property
    def num_chars(self) -> int:
        return sum(len(message["content"]) for message in self.messages)

    @property
    def session_bytes(self) -> int:
        return 0 if self.session is None else self.session.nbytes


class ResponseStore:
    """Keeps responses for `ttl_s` after they were last used, and within `max_bytes`: sessions leave
    first, then texts, each time those not used for longest. Used in the event loop only."""

    def __init__(self, ttl_s: float, max_bytes: int) -> None:
        self._ttl_s, self._max_bytes = ttl_s, max_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Of texts (a byte a character) and sessions."""
        return sum(kept.num_chars + kept.session_bytes for kept in self._kept.values())

    def put(self, response_id: str, kept: Kept) -> None:
        kept.until = time.monotonic() + self._ttl_s
        self._kept[response_id] = kept
        self._trim()

    def get(self, response_id: str, tenant: str) -> Kept | None:
        """A response of this tenant that is still kept."""
        self._trim()
        kept = self._kept.get(response_id)
        if kept is None or kept.tenant != tenant:
            return None
        kept.until = time.monotonic() + self._ttl_s
        self._kept.move_to_end(response_id)
        return kept

    def _trim(self) -> None:
        now = time.monotonic()
        while self._kept:
            oldest = next(iter(self._kept))
            if self._kept[oldest].until > now and len(self._kept) <= MAX_RESPONSES:
                break
            del self._kept[oldest]
        excess = self.nbytes - self._max_bytes
        for kept in self._kept.values():
            if excess > 0:
                excess -= kept.session_bytes
                kept.session = None
        while excess > 0 and self._kept:
            excess -= self._kept.popitem(last=False)[1].num_chars
