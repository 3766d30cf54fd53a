"""A rank that follows: it runs each pass of the leader on its own share of the model.

`python -m lazyahead.parallel.follow` is how the leader starts one.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from lazyahead.build import engine_for
from lazyahead.cache.prefix import PrefixCache
from lazyahead.cache.session import Session
from lazyahead.draft.drafter import NoDrafter
from lazyahead.draft.tree import Draft, Source
from lazyahead.draft.verify import Walk
from lazyahead.engine.engine import Accepted, Engine, OnLayer, Verified
from lazyahead.engine.request import Request
from lazyahead.engine.scheduler import Scheduled
from lazyahead.errors import RankError
from lazyahead.hf.fingerprint import owner_of
from lazyahead.hf.load import load
from lazyahead.hf.plain_tensors import plain_tensors
from lazyahead.parallel.group import Group
from lazyahead.parallel.messages import (
    Added,
    Cancelled,
    Commit,
    End,
    Forgotten,
    Load,
    Pass,
    Resized,
    Rows,
    Submitted,
    Undo,
    Unload,
)
from lazyahead.sampling import Picker


class _Undone(Exception):  # noqa: N818 (a way out, no error)
    """The leader's pass counts for nothing."""


class _ToldDrafts:
    """Proposes what the leader verifies."""

    def __init__(self) -> None:
        self.draft = Draft.EMPTY

    def propose(self, max_nodes: int, step: Any = None) -> Draft:
        return self.draft

    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        pass

    def feedback(self, draft: Draft, tokens: Sequence[int]) -> None:
        pass

    def stop(self, *, remember: bool = False) -> None:
        pass


class FollowingEngine(Engine):
    """An engine whose drafts and tokens are the leader's."""

    def __init__(self, group: Group, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "row_cost": None, "drafter": NoDrafter()})
        self._group = group
        self._requests: dict[int, Request] = {}
        self._sessions: dict[int, Session] = {}
        self._rows: list[Rows] = []

    def _another(self, *args: Any, **kwargs: Any) -> Engine:
        return FollowingEngine(self._group, *args, **kwargs)

    def take(self, told: Submitted) -> None:
        """Submits what the leader has submitted."""
        session = self._sessions.setdefault(told.session, self.session_for(told.prefill))
        session.crop(told.num_kept)
        session.pending = told.pending
        request = Request(
            told.prompt,
            Picker(),
            session=session,
            max_new_tokens=told.max_new_tokens,
            question=told.question,
            is_open=told.is_open,
        )
        request.prefill.prunes = told.prunes
        request.namespace = told.namespace
        request.may_share = told.may_share
        request.drafts = _ToldDrafts()
        self._requests[told.request] = request
        self.submit(request)

    def add(self, session: int, namespace: str | None) -> None:
        """Puts a session into the prefix cache."""
        self.add_prefix(self._sessions[session], namespace)

    def forget(self, sessions: Sequence[int]) -> None:
        """Drops what the leader no longer holds."""
        for number in sessions:
            self._sessions.pop(number, None)

    def drop(self, number: int) -> None:
        """Cancels a request."""
        self.cancel(self._requests.pop(number))

    def join(self, rows: list[Rows], paused: Sequence[int]) -> None:
        """Runs one pass with the others."""
        for number, request in self._requests.items():
            request.is_paused = number in paused
        self._rows = rows
        for row in rows:
            drafts = self._requests[row.request].drafts
            assert isinstance(drafts, _ToldDrafts)
            drafts.draft = Draft(*row.draft) if row.draft[0] else Draft.EMPTY
        try:
            self.step()
        except _Undone:
            return
        for row in rows:
            if self._requests[row.request].finish_reason is not None:
                del self._requests[row.request]

    def _run(self, batch: Sequence[Scheduled], on_layer: OnLayer | None) -> list[Tensor | None]:
        told = [(self._requests[row.request], row.num_rows) for row in self._rows]
        own = [(item.request, len(item.segment.token_ids)) for item in batch]
        if told != own:
            raise RankError(f"rank {self._group.rank} would run other rows than the leader")
        return super()._run(batch, on_layer)

    def _walk(self, scheduled: Scheduled, rows: Tensor) -> Walk:
        return Walk([], [])

    def _accept(self, verified: Sequence[Verified]) -> list[Accepted]:
        told = self._group.hear()
        if isinstance(told, Undo):
            raise _Undone
        assert isinstance(told, Commit)
        accepted = []
        for item, kept in zip(verified, told.kept, strict=True):
            item.scheduled.request.answer += kept.emitted
            walk = Walk(kept.emitted, kept.nodes)
            accepted.append(Accepted(item.scheduled, walk, kept.emitted, kept.reason))
        return accepted


def follow(group: Group) -> None:
    """Does what the leader says, until the group ends. Signals are for the leader, which may have
    answers to finish."""
    if threading.current_thread() is threading.main_thread():
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)
    with plain_tensors():
        while True:
            message = group.hear()
            if isinstance(message, End):
                return
            assert isinstance(message, Load)
            _serve(group, message)
            gc.collect()


def _serve(group: Group, wanted: Load) -> None:
    """One model, from its loading to its unloading."""
    model, _ = load(wanted.name, wanted.dtype, wanted.device, group.size)
    make = partial(FollowingEngine, group)
    cache = PrefixCache(wanted.prefix_cache_bytes) if wanted.prefix_cache_bytes else None
    sizes = (wanted.prefill_chunk_size, wanted.packed, cache)
    engine: Engine | None
    engine = engine_for(model, None, wanted.prefill, wanted.decode, *sizes, make)
    if wanted.needs_owner:
        owner_of(model)
    while engine is not None:
        assert isinstance(engine, FollowingEngine)
        engine = _run(group, engine)


def _run(group: Group, engine: FollowingEngine) -> Engine | None:
    """Runs an engine until the model is unloaded, or another takes its place, which it returns."""
    with engine:
        while True:
            match group.hear():
                case Submitted() as told:
                    engine.take(told)
                case Added(session, namespace):
                    engine.add(session, namespace)
                case Cancelled(request):
                    engine.drop(request)
                case Forgotten(sessions):
                    engine.forget(sessions)
                case Pass(rows, paused):
                    engine.join(rows, paused)
                case Resized(sizes):
                    return engine.with_sizes(sizes)
                case Unload():
                    return None
                case message:
                    raise RankError(f"rank {group.rank} cannot do {message!r} now")


def main() -> None:
    """Follows the process that started this one."""
    disable_progress_bar()
    try:
        group = Group.follow()
        follow(group)
    except RuntimeError as error:
        raise SystemExit(f"a rank of lazyahead ends: {error}") from None
    group.close()


if __name__ == "__main__":
    main()
