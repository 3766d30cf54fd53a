"""One prompt on its way to an answer: what is asked, how far it has come, what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.draft.drafter import DraftRequest
from lazyahead.draft.tree import Draft, Source
from lazyahead.prefill.progress import PrefillProgress
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
        is_open: bool = False,
    ) -> None:
        """`prompt` is the whole text, whose first `len(session)` tokens the session has computed.
        `accept` receives each token of the answer and may return a finish reason; `emit` receives
        the tokens of each step after it is committed. `prefix` is what logits processors see in
        place of `prompt` (left padding included). Prompts that add fewer than `min_tokens` are
        never pruned. An open request has no answer: it ends when the prompt, the beginning of
        others, has been computed up to the first boundary."""
        # Set by the caller.
        self.prompt = list(prompt)
        self.picker = picker
        self.accept = accept
        self.emit = emit
        self.session = session
        self.max_new_tokens = max_new_tokens
        self.scores: list[Tensor] | None = None
        """Processed logits (V,) of each answer token; None: not collected."""
        self.logits: list[Tensor] | None = None
        """Raw logits (V,), likewise."""
        self.may_draft = True
        """Whether the engine's drafter guesses for it."""
        self.namespace: str | None = None
        """Whose earlier answers it is drafted from and whose prompts share what they begin with;
        None: the engine's own."""
        self.may_share = True
        """Whether the prefix cache gives it what it begins with, and keeps that for others."""
        self.is_paused = False
        """Left out of passes until this is False again. It then takes no place among those that
        run at once."""
        self.submitted = time.perf_counter()
        self.num_reused = len(session)
        self._num_revived_before = session.num_revived
        self._prefix = _Prefix(self.prompt if prefix is None else prefix)

        # Set by the scheduler.
        self.admitted: float | None = None
        """When it came to run; None: it waits."""
        num_new = len(self.prompt) - len(session)
        prunes = num_new >= (min_tokens or 0)
        self.prefill = PrefillProgress(len(session), len(self.prompt), prunes, question, is_open)
        self.proposed = Draft.EMPTY
        """What the drafter proposed for this step."""
        self.draft = Draft.EMPTY
        """What of it is verified."""

        # Set by the engine.
        self.answer: list[int] = []
        self.num_emitted = 0
        """Tokens of the answer that are committed."""
        self.finish_reason: str | None = None
        self.num_steps = 0
        self.first_token: float | None = None
        self.last_token = self.submitted
        self.sources: tuple[Source | None, ...] = ()
        """Where each token of the latest step was drafted from; None: the model's own choice."""
        self.num_reviving = 0
        """Rows revived in the latest step: they share the row budget of the next."""
        self.num_revived_seen = session.num_revived
        self.drafts: DraftRequest | None = None

    @classmethod
    def opening(cls, token_ids: Sequence[int], session: Session) -> Request:
        """An open request: the beginning of later prompts."""
        return cls(
            token_ids, Picker(), session=session, max_new_tokens=1, min_tokens=0, is_open=True
        )

    @property
    def max_tokens(self) -> int:
        """Tokens that it may come to hold, prompt and answer."""
        return len(self.prompt) + self.max_new_tokens

    def trim_logits(self) -> None:
        """Drops collected scores and logits beyond the answer."""
        for collected in (self.scores, self.logits):
            if collected is not None:
                del collected[len(self.answer) :]

    @property
    def is_prefilling(self) -> bool:
        return not self.prefill.is_done

    @property
    def progress(self) -> float:
        """Fraction of the prompt's tokens that have entered; for a progress bar."""
        return self.prefill.num_entered / max(1, self.prefill.end - self.prefill.start)

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
