"""A request as it was before a pass, so that a pass which fails changes nothing."""

from __future__ import annotations

from copy import copy

from lazyahead.engine.request import Request
from lazyahead.prefill.progress import PrefillProgress


class Checkpoint:
    """What one pass may change of a request, as it was before. Make one with `take`."""

    def __init__(self, request: Request, progress: PrefillProgress) -> None:
        self._request = request
        self._progress = progress

    @classmethod
    def take(cls, request: Request) -> Checkpoint:
        """Marks the session, whose caches and stashes can then be rolled back."""
        request.session.mark()
        return cls(request, copy(request.prefill))

    def restore(self) -> None:
        """Undoes the pass, unless it was committed; what it computed beyond that is dropped."""
        request = self._request
        if request.session.rollback():
            request.prefill = self._progress
            del request.answer[request.num_emitted :]
        request.trim_logits()
