"""Drafters of users: the few methods they need, made into the interface that the engine calls.

A drafter needs `start(prompt, namespace)`, which returns an object for one answer; that needs
`extend(tokens)` and `propose(max_nodes)`. Whatever else `DraftRequest` has may be missing: the
arguments `source` and `step`, `feedback` and `stop`. A draft without probabilities gets those that
drafts of this drafter turned out to have at each depth, so that no more of it is verified than
pays.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lazyahead.draft.budget import DEPTH_CLASS, MAX_DEPTH, AcceptanceBucket, Step
from lazyahead.draft.drafter import Drafter, DraftRequest
from lazyahead.draft.tree import ROOT, Draft, Source
from lazyahead.errors import ConfigError

_DECAY = 0.98
_PRIOR_WEIGHT = 4.0
_PRIOR_CLASS = 2  # at first a guess is trusted like a match of four tokens


def as_drafter(drafter: Any, vocab_size: int | None = None) -> Drafter:
    """A drafter with the whole interface, around one that may have only part of it.

    Raises ConfigError, naming what is missing, here for a drafter without `start(prompt,
    namespace)`, and when an answer begins for a request without `extend` or `propose`; when it
    proposes, for anything that is not a `Draft`, and for token ids not below `vocab_size`.
    """
    start = getattr(drafter, "start", None)
    name = type(drafter).__name__
    if isinstance(drafter, type) or not callable(start):
        raise ConfigError(
            f"decode is a Lookahead, a drafter or None, got {drafter!r}; a drafter is an object "
            "with start(prompt, namespace)"
        )
    if not _takes(start, 2):
        raise ConfigError(f"start of the drafter {name} must take (prompt, namespace)")
    return _Adapter(drafter, name, vocab_size)


class _Adapter:
    """A user's drafter; what is learned of its drafts is kept by namespace."""

    def __init__(self, drafter: Any, name: str, vocab_size: int | None) -> None:
        self.inner = drafter
        self.name = name
        self.vocab_size = vocab_size
        self._acceptance: dict[str, DepthAcceptance] = {}

    def start(self, prompt: Sequence[int] = (), namespace: str = "default") -> DraftRequest:
        request = self.inner.start(prompt, namespace)
        for method, example in (("extend", "tokens"), ("propose", "max_nodes")):
            if not callable(getattr(request, method, None)):
                raise ConfigError(
                    f"the drafter {self.name} started {request!r}, which has no {method}({example})"
                )
        acceptance = self._acceptance.setdefault(namespace, DepthAcceptance())
        return _AdaptedRequest(request, self, acceptance)


class _AdaptedRequest:
    """One answer of a user's drafter."""

    def __init__(self, request: Any, drafter: _Adapter, acceptance: DepthAcceptance) -> None:
        self._inner = request
        self._drafter = drafter
        self._acceptance = acceptance
        self._takes_source = _takes_keyword(request.extend, "source")
        self._takes_step = _takes_keyword(request.propose, "step")
        self._feedback = getattr(request, "feedback", None)
        self._stop = getattr(request, "stop", None)

    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        if self._takes_source:
            self._inner.extend(tokens, source=source)
        else:
            self._inner.extend(tokens)

    def propose(self, max_nodes: int, step: Step | None = None) -> Draft:
        if self._takes_step:
            draft: Draft = self._inner.propose(max_nodes, step=step)
        else:
            draft = self._inner.propose(max_nodes)
        self._check(draft)
        if not len(draft):
            return Draft.EMPTY
        draft = draft.within(MAX_DEPTH)
        if not draft.probs:
            draft = self._acceptance.with_probs(draft)
        return draft.best(max_nodes)

    def feedback(self, draft: Draft, tokens: Sequence[int]) -> None:
        self._acceptance.learn(draft, tokens)
        if self._feedback is not None:
            self._feedback(draft, tokens)

    def stop(self, *, remember: bool = False) -> None:
        if self._stop is None:
            return
        if _takes_keyword(self._stop, "remember"):
            self._stop(remember=remember)
        else:
            self._stop()

    def _check(self, draft: Any) -> None:
        name = self._drafter.name
        if not isinstance(draft, Draft):
            raise ConfigError(
                f"propose of the drafter {name} must return a Draft, got {draft!r}; Draft.EMPTY is "
                "no guess"
            )
        vocab_size = self._drafter.vocab_size
        if vocab_size is not None and len(draft) and max(draft.token_ids) >= vocab_size:
            raise ConfigError(
                f"the drafter {name} proposed token {max(draft.token_ids)}, but the model's token "
                f"ids are below {vocab_size}; use the model's own tokenizer"
            )


class DepthAcceptance:
    """How likely guesses are right once all above them are, learned by depth alone."""

    def __init__(self) -> None:
        self._bucket = AcceptanceBucket(_PRIOR_CLASS, _PRIOR_WEIGHT, ())

    def with_probs(self, draft: Draft) -> Draft:
        """The draft with the probability of each node; siblings share it equally."""
        rates = self._bucket.rates
        probs: list[float] = []
        for parent, depth in zip(draft.parents, draft.depths, strict=True):
            above = 1.0 if parent == ROOT else probs[parent]
            probs.append(above * rates[DEPTH_CLASS[depth]] / len(draft.children[parent]))
        sources = draft.sources
        return Draft.unchecked(draft.token_ids, draft.parents, sources, draft.match_lens, probs)

    def learn(self, draft: Draft, tokens: Sequence[int]) -> None:
        """Judge the nodes along the text that came, as far as the draft reached."""
        node = ROOT
        for depth, token in enumerate(tokens, 1):
            children = draft.children[node]
            if not children or depth > MAX_DEPTH:
                return
            right = [child for child in children if draft.token_ids[child] == token]
            self._bucket.count(depth, bool(right), _DECAY)
            if not right:
                return
            node = right[0]


def _takes(method: Callable[..., Any], num_arguments: int) -> bool:
    """Whether it can be called with so many arguments; True where it does not tell."""
    try:
        inspect.signature(method).bind(*range(num_arguments))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _takes_keyword(method: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = any(p.name == name and p.kind in kinds for p in parameters)
    return named or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
