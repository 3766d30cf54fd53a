"""The leader's engine: an engine that tells the other ranks what it does."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.engine.engine import Accepted, Engine, OnLayer, Sizes, Verified
from lazyahead.engine.request import Request
from lazyahead.engine.scheduler import Scheduled
from lazyahead.errors import RequestError
from lazyahead.parallel.group import Group
from lazyahead.parallel.messages import (
    Added,
    Cancelled,
    Commit,
    Forgotten,
    Kept,
    Pass,
    Resized,
    Rows,
    Submitted,
    Undo,
)


class LeadingEngine(Engine):
    """Every pass runs on all ranks. An error in the midst of one ends the group, for the others
    wait inside it."""

    def __init__(self, group: Group, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group = group
        self._numbers = count()
        self._sessions: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
        self._requests: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self._forgotten: deque[int] = deque()
        self._may_undo = False
        self._is_in_pass = False

    def with_sizes(self, sizes: Sizes) -> Engine:
        with self.lock:
            self._group.tell(Resized(sizes))
            return super().with_sizes(sizes)

    def _another(self, *args: Any, **kwargs: Any) -> Engine:
        return LeadingEngine(self._group, *args, **kwargs)

    check_s = 1.0

    def check(self) -> None:
        self._group.check()

    def submit(self, request: Request) -> None:
        with self.lock:
            super().submit(request)
            session, progress = request.session, request.prefill
            self._requests[request] = next(self._numbers)
            message = Submitted(
                self._requests[request],
                self._number_of(session),
                session.prefill,
                len(session),
                list(session.pending),
                request.prompt,
                progress.question,
                progress.prunes,
                request.max_new_tokens,
                progress.is_open,
                request.namespace,
                request.may_share,
            )
            self._tell_forgotten()
            self._group.tell(message)

    def add_prefix(self, session: Session, namespace: str | None = None) -> None:
        with self.lock:
            if session not in self._sessions:
                raise RequestError("the session is no beginning that `read_ahead` computed")
            super().add_prefix(session, namespace)
            self._group.tell(Added(self._sessions[session], namespace))

    def cancel(self, request: Request) -> None:
        with self.lock:
            runs = request.finish_reason is None and request in self._requests
            super().cancel(request)
            if runs and self._group.is_open:
                self._group.tell(Cancelled(self._requests[request]))

    def _step(self, on_layer: OnLayer | None) -> None:
        self._may_undo = self._is_in_pass = False
        try:
            super()._step(on_layer)
        except BaseException as error:
            if self._may_undo:
                self._group.tell(Undo())
            elif self._is_in_pass and self._group.is_open:
                raise self._group.failed(error) from error
            raise

    def _run(self, batch: Sequence[Scheduled], on_layer: OnLayer | None) -> list[Tensor | None]:
        rows = [
            Rows(self._requests[item.request], len(item.segment.token_ids), _draft_of(item))
            for item in batch
        ]
        paused = [
            number
            for request, number in self._requests.items()
            if request.is_paused and request.finish_reason is None
        ]
        self._group.tell(Pass(rows, paused))
        self._is_in_pass = True
        listener = _Listener(on_layer)
        parts = super()._run(batch, listener)
        self._may_undo = True
        listener.raise_what_was_raised()
        return parts

    def _accept(self, verified: Sequence[Verified]) -> list[Accepted]:
        accepted = super()._accept(verified)
        self._may_undo = False
        kept = [Kept(list(item.emitted), item.walk.nodes, item.reason) for item in accepted]
        self._group.tell(Commit(kept))
        return accepted

    def _number_of(self, session: Session) -> int:
        if session not in self._sessions:
            number = next(self._numbers)
            self._sessions[session] = number
            weakref.finalize(session, self._forgotten.append, number).atexit = False
        return self._sessions[session]

    def _tell_forgotten(self) -> None:
        if self._forgotten:
            self._group.tell(
                Forgotten([self._forgotten.popleft() for _ in range(len(self._forgotten))])
            )


def _draft_of(item: Scheduled) -> tuple[Sequence[int], Sequence[int]]:
    if item.is_prefill:
        return (), ()
    draft = item.request.draft
    return list(draft.token_ids), list(draft.parents)


class _Listener:
    """Passes on which layer begins. What the caller raises then waits for the end of the pass:
    the other ranks cannot leave it early."""

    def __init__(self, on_layer: Callable[[int], None] | None) -> None:
        self._on_layer = on_layer
        self._raised: BaseException | None = None

    def __call__(self, layer: int) -> None:
        if self._on_layer is None or self._raised is not None:
            return
        try:
            self._on_layer(layer)
        except BaseException as error:
            self._raised = error

    def raise_what_was_raised(self) -> None:
        if self._raised is not None:
            raise self._raised
