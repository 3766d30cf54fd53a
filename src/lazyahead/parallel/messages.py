"""What the leader tells the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lazyahead.draft.config import Lookahead
from lazyahead.engine.engine import Sizes
from lazyahead.prefill.config import LazyPrefill


class Load(NamedTuple):
    """Load a model and make an engine for it. `needs_owner`: its fingerprint is asked for."""

    name: str
    dtype: str
    device: str
    prefill: LazyPrefill | None
    decode: Lookahead | None
    needs_owner: bool
    prefill_chunk_size: int
    packed: bool | None
    prefix_cache_bytes: int


class Resized(NamedTuple):
    """An engine of other sizes takes the place of the one before."""

    sizes: Sizes


class Submitted(NamedTuple):
    """A request, on a session of which the first `num_kept` tokens stay."""

    request: int
    session: int
    prefill: LazyPrefill | None
    """The session's reading strategy."""
    num_kept: int
    pending: list[int]
    prompt: list[int]
    question: tuple[int, int] | None
    prunes: bool
    max_new_tokens: int
    is_open: bool
    namespace: str | None
    may_share: bool


class Added(NamedTuple):
    """A session goes into the prefix cache."""

    session: int
    namespace: str | None


class Cancelled(NamedTuple):
    """A request that has not ended is taken out."""

    request: int


class Forgotten(NamedTuple):
    """Sessions that nobody holds any more."""

    sessions: list[int]


class Rows(NamedTuple):
    """What one request sends into a pass; the draft is empty while its prompt is read."""

    request: int
    num_rows: int
    draft: tuple[Sequence[int], Sequence[int]]
    """Token ids and parents."""


class Pass(NamedTuple):
    """A pass begins."""

    rows: list[Rows]
    paused: list[int]
    """Requests that take no part."""


class Kept(NamedTuple):
    """What a pass gave one request: tokens of the answer, the draft nodes that hold them, and why
    the answer ends."""

    emitted: list[int]
    nodes: list[int]
    reason: str | None


class Commit(NamedTuple):
    """The pass is over; what it gave each request, in the order of its rows."""

    kept: list[Kept]


class Undo(NamedTuple):
    """The pass is over and counts for nothing."""


class Unload(NamedTuple):
    """The model is no longer used."""


class End(NamedTuple):
    """The group ends."""


Message = (
    Load | Resized | Submitted | Added | Cancelled | Forgotten | Pass | Commit | Undo | Unload | End
)
