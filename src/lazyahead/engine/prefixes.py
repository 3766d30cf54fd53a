"""Which prompts take their beginning from the prefix cache, and what they leave there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lazyahead.cache.prefix import Block, PrefixCache, begin_with, first_boundary
from lazyahead.cache.session import Session
from lazyahead.engine.request import Request
from lazyahead.errors import RequestError
from lazyahead.hf.runner import Runner
from lazyahead.prefill.schedule import local_layers


class PrefixSharing:
    """Prompts of one namespace share what they begin with, as far as it is computed alike; what
    the namespace None holds is everybody's.

    Shared are tokens whose states do not depend on what follows: not the last rows of a prompt,
    which attend differently, and nothing of prompts too short to defer from.
    """

    def __init__(self, cache: PrefixCache, runner: Runner) -> None:
        self.cache = cache
        self._runner = runner

    def begin(self, request: Request) -> None:
        """Before its first pass: puts the known part of the prompt into the request's session."""
        if not self._may_share(request):
            return
        session, prompt = request.session, request.prompt
        num_scoring = 1 if session.prefill is None else max(1, session.prefill.scorer.window_size)
        num_tokens = min(_num_shared(request), len(prompt) - num_scoring)
        blocks, own = self._match(request, prompt[: max(0, num_tokens)])
        request.prefill.shares = own
        if blocks:
            begin_with(session, blocks)
            if session.boundaries:
                request.prefill.shared = (session.stashes[first_boundary(session)].hidden,)
            request.num_reused = request.prefill.num_entered = len(session)

    def _match(self, request: Request, token_ids: Sequence[int]) -> tuple[list[Block], bool]:
        """The longest known beginning, and whether it is the namespace's own: behind one that is
        everybody's nothing is kept, as all of it would be kept twice."""
        own = self.cache.match(_group(request.session, request.namespace), token_ids)
        if request.namespace is None:
            return own, True
        shared = self.cache.match(_group(request.session, None), token_ids)
        return (shared, False) if len(shared) > len(own) else (own, True)

    def keep(self, request: Request) -> None:
        """After its prefill: keeps what of the prompt others can share."""
        if not request.prefill.shares:
            return
        session, num_tokens = request.session, _num_shared(request)
        hidden = torch.cat(request.prefill.shared) if session.boundaries else None
        request.prefill.shared = ()
        group = _group(session, request.namespace)
        self.cache.insert(group, request.prompt[:num_tokens], session, hidden)

    def add(self, session: Session, namespace: str | None = None) -> None:
        """Keeps a beginning that was computed as an open request, here or before."""
        hidden: Tensor | None = None
        if session.boundaries:
            stash = session.stashes[first_boundary(session)]
            if len(stash) != len(session):
                raise RequestError("the session is no beginning that `read_ahead` computed")
            hidden = stash.hidden
        self.cache.insert(_group(session, namespace), session.token_ids, session, hidden)

    def _may_share(self, request: Request) -> bool:
        """A prompt that begins a conversation of its own, and defers as all others do."""
        if not request.may_share or request.prefill.start or self._runner.single_request_only:
            return False
        has_states = first_boundary(request.session) > 0
        return has_states and (request.session.prefill is None or request.prefill.prunes)


def _group(session: Session, namespace: str | None) -> Hashable:
    """Sessions of one group compute the layers below their first boundary alike."""
    config, first = session.prefill, first_boundary(session)
    if config is None or not config.local_window:
        return namespace, first
    placed = list(session.boundaries.values())
    layers = local_layers(placed, session.num_layers, config.local_from)
    return namespace, first, config.local_window, layers


def _num_shared(request: Request) -> int:
    """Tokens at the prompt's start whose states below the first boundary do not depend on what
    follows."""
    config, num_tokens = request.session.prefill, len(request.prompt)
    if request.prefill.is_open or config is None or not config.local_window:
        return num_tokens
    return max(0, num_tokens - config.num_last_rows)
