"""One prompt on its way to an answer: what is asked, how far it has come, what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.draft.drafter import DraftRequest
from lazyahead.draft.tree import Draft, Source
from lazyahead.prefill.progress import Reading
from lazyahead.results import Stats
from lazyahead.sampling import Picker


class Request:
    """One prompt on its way to an answer."""

    def __init__(
        self,
        prompt: Sequence[int],
        picker: Picker,
        *,
        accept: Callable[[int, Request], str | None] = lambda token, request: None,
        emit: Callable[[Sequence[int], str | None], None] = lambda tokens, reason: None,
        session: Session,
        max_new_tokens: int,
        question: tuple[int, int] | None = None,
        prefix: Sequence[int] | None = None,
        min_tokens: int | None = None,
    ) -> None:
        """`prompt` is the whole text, whose first `len(session)` tokens the session has read.
        `accept` sees each token of the answer and may answer with a finish reason; `emit` hears
        of each step after it is committed. `prefix` is what processors see in place of `prompt`
        (left padding included)."""
        self.prompt, self.picker, self.accept, self.emit = list(prompt), picker, accept, emit
        self.session, self.max_new_tokens = session, max_new_tokens
        self.answer: list[int] = []
        self.num_emitted = 0
        """Tokens of the answer that are committed."""
        self.finish_reason: str | None = None
        self.num_reused, self.num_steps = len(session), 0
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.last_token = self.submitted
        self.scores: list[Tensor] | None = None
        """Processed logits (V,) of each answer token; None: not asked for."""
        self.logits: list[Tensor] | None = None
        """Bare logits, likewise."""
        self.proposed = self.draft = Draft.EMPTY
        """What the drafter proposed for this step, and what of it is verified."""
        self.sources: tuple[Source | None, ...] = ()
        """Where each token that the latest step told was drafted from; None: the model's own pick.
        """
        self.to_revive: Mapping[int, Tensor] = {}
        """What the next pass brings back from the stashes, by boundary."""
        self.num_reviving = 0
        """Rows that came back in the latest step: they share the budget of the next."""
        self.num_revived_seen = session.num_revived
        self.drafts: DraftRequest | None = None
        self._num_revived_before = session.num_revived
        num_new = len(self.prompt) - len(session)
        self.reading = Reading(
            len(session), len(self.prompt), num_new >= (min_tokens or 0), question
        )
        self._prefix = _Prefix(self.prompt if prefix is None else prefix)

    def forget(self, is_undone: bool) -> None:
        """A pass was broken off: what it had added to the answer, and the scores it had noted, are
        gone."""
        if is_undone:
            del self.answer[self.num_emitted :]
        for kept in (self.scores, self.logits):
            if kept is not None:
                del kept[len(self.answer) :]

    @property
    def is_prefilling(self) -> bool:
        return not self.reading.is_done

    @property
    def progress(self) -> float:
        """Fraction of the prompt's tokens that have entered; for a progress bar."""
        return self.reading.num_entered / max(1, self.reading.end - self.reading.start)

    def prefix(self, more: Sequence[int]) -> Tensor:
        """The text so far and `more`, (1, N), as processors see it."""
        return self._prefix.with_(self.answer, more)

    def stats(self) -> Stats:
        """Measurements up to now."""
        first = self.last_token if self.first_token is None else self.first_token
        session = self.session
        return Stats(
            prompt_tokens=len(self.prompt),
            reused_tokens=self.num_reused,
            answer_tokens=len(self.answer),
            ttft_s=first - self.submitted,
            decode_s=self.last_token - first,
            prompt_tokens_computed=session.prompt_tokens_computed,
            num_steps=self.num_steps,
            revived=session.num_revived - self._num_revived_before,
            kept_by_layer=session.kept_by_layer,
        )


class _Prefix:
    """Token ids as a tensor that grows with the answer, without copying the prompt each time."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._base, self._ids = len(token_ids), torch.tensor([*token_ids, *[0] * 64])
        self._len = self._base

    def with_(self, answer: Sequence[int], more: Sequence[int]) -> Tensor:
        need = self._base + len(answer) + len(more)
        self._len = min(self._len, self._base + len(answer))
        while need > self._ids.numel():
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
        known = self._len - self._base
        if known < len(answer):
            self._ids[self._len : self._base + len(answer)] = torch.tensor(answer[known:])
            self._len = self._base + len(answer)
        if more:
            self._ids[self._len : need] = torch.tensor(more)
        return self._ids[None, :need]
