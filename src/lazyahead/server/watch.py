"""What is seen of a request between passes, in the worker's thread: drafts, log-probabilities, and
how deep its prompt was read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lazyahead.engine.request import Request
from lazyahead.results import Reach


class TokenLogprob(NamedTuple):
    """The log-probability of an answer token, and of the likeliest ones at its place, as the model
    gave them (before penalties, temperature and the like)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Deeper(NamedTuple):
    """Prompt tokens that came back, and the layers that they have since."""

    positions: tuple[int, ...]
    depths: tuple[int, ...]


class Seen(NamedTuple):
    """After one pass."""

    logprobs: tuple[TokenLogprob, ...] = ()
    reach: Reach | None = None
    """After the prefill."""
    deeper: Deeper | None = None
    """Later, where tokens came back."""


class Watch:
    """Called with the request after each pass that gave a piece."""

    def __init__(self, request: Request, num_top: int | None, detail: bool) -> None:
        """`num_top`: likeliest tokens at each place; None: no log-probabilities."""
        self.num_top = num_top
        self.detail = detail
        self.num_drafts = self.num_drafted = self.num_accepted = 0
        self._num_seen = 0
        self._depth: tuple[int, ...] | None = None
        self._num_revived = 0
        if num_top is not None:
            request.logits = []

    def __call__(self, request: Request) -> Seen:
        self._count(request)
        logprobs = self._logprobs(request)
        self._num_seen = request.num_emitted
        if not self.detail:
            return Seen(logprobs)
        reach, deeper = self._reach(request)
        return Seen(logprobs, reach, deeper)

    def _count(self, request: Request) -> None:
        if self._num_seen and len(request.draft):
            self.num_drafts += 1
            self.num_drafted += len(request.draft)
            self.num_accepted += sum(source is not None for source in request.sources)

    def _logprobs(self, request: Request) -> tuple[TokenLogprob, ...]:
        """Of the latest tokens; their logits are then dropped."""
        logits = request.logits
        if logits is None or self.num_top is None:
            return ()
        found = []
        for place in range(self._num_seen, len(logits)):
            found.append(_logprob(logits[place], request.answer[place], self.num_top))
            logits[place] = _NONE
        return tuple(found)

    def _reach(self, request: Request) -> tuple[Reach | None, Deeper | None]:
        session = request.session
        if not session.num_layers:
            return None, None
        if self._depth is None:
            reach = session.reach()
            self._depth, self._num_revived = reach.depth, session.num_revived
            return reach, None
        if session.num_revived == self._num_revived:
            return None, None
        depth = session.reach().depth
        changed = [
            at for at, (old, new) in enumerate(zip(self._depth, depth, strict=True)) if new > old
        ]
        self._depth, self._num_revived = depth, session.num_revived
        return None, Deeper(tuple(changed), tuple(depth[at] for at in changed))


_NONE = torch.empty(0)


def _logprob(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, logprobs.numel()))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
