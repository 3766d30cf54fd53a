"""The rows of one request during one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lazyahead.cache.kv import GrowableTensor
from lazyahead.cache.session import Session
from lazyahead.hf.attention import Heads, LocalWindow
from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.progress import Reading
from lazyahead.prefill.schedule import num_local_layers
from lazyahead.prefill.score import AheadRange, reach_of
from lazyahead.prefill.select import quoted

_REPEATED = 4
"""Times as many tokens may come back for a pass that is repeated as in passing: such passes are
rare."""


class StashAttention(NamedTuple):
    """What the root and its drafts paid in one layer to tokens that wait at `boundary`."""

    boundary: int
    paid: Tensor
    """(Q, E), the head that pays most."""
    hits: Tensor
    """(Q, E), whether that is enough to call the token back."""


class InFlight:
    """The rows of one request during one pass: which they are, and how the pass is taken back.

    `token_ids` enter at layer 0: the next part of a prompt, or a root and its drafts. `parents`
    (one per draft, an offset into the drafts or -1 for the root) make them a tree. `limit` bounds
    the rows of a reading pass. `to_revive_now` are entries of stashes, by boundary, that an earlier
    attempt at this pass saw the root would need.
    """

    def __init__(
        self,
        session: Session,
        config: LazyPrefill | None,
        token_ids: Sequence[int],
        device: torch.device,
        *,
        depths: Sequence[int] = (),
        ancestors: Tensor | None = None,
        reading: Reading | None = None,
        limit: int | None = None,
        to_revive_now: Mapping[int, Tensor] | None = None,
    ) -> None:
        session.mark()
        self.session, self.config, self.reading, self.limit = session, config, reading, limit
        self._reading_before = replace(reading) if reading is not None else None
        self.token_ids, self.num_drafts, self._ancestors = token_ids, len(depths), ancestors
        start = len(session)
        resumes = reading is not None and reading.stage is not None
        chain = range(start, start + len(token_ids) - len(depths))
        places = (
            [reading.end - 1]
            if resumes and reading
            else [*chain, *(start + depth for depth in depths)]
        )
        self.last = max(places)
        self.entering_positions = torch.tensor(places, device=device)
        self.positions, self.entered = (
            self.entering_positions,
            torch.arange(len(places), device=device),
        )
        # one row that only keeps the place of the last token until the stage is reached
        self._is_blank = resumes
        self.has_last = reading is None or (not resumes and self.last == reading.end - 1)
        self._num_revived = 0
        # Of the layers up to the next boundary, whose keys are the same.
        self._masks: dict[tuple[Heads, int], Tensor] = {}
        self._scores: Tensor | None = None
        prunes = reading is not None and reading.prunes
        self._selective = config is not None and (
            prunes or (session.num_stashed > 0 and config.revive != "never")
        )
        self._local, self._num_local = (
            self._local_attention() if prunes and config is not None else (None, 0)
        )
        self.blocked = torch.zeros(self.num_drafts, dtype=torch.bool, device=device)
        """Drafts that would demand a revival: their own output is not to be used in this pass."""
        self._to_revive_now = to_revive_now
        self._stash_attention: list[StashAttention] = []
        self._uncertain = torch.zeros(1 + self.num_drafts, dtype=torch.bool, device=device)
        self.to_revive: dict[int, Tensor] = {}
        """Entries of stashes that the root needs and could not have: this pass is void, the next
        one brings them."""
        foretells = (
            self._selective and reading is None and config is not None and config.revive == "demand"
        )
        self._foretold = session.approx_keys if foretells else {}

    def _local_attention(self) -> tuple[LocalWindow | None, int]:
        """Who attends only to what is near, and in how many layers."""
        config, reading = self.config, self.reading
        assert config is not None
        assert reading is not None
        placed, num_layers = list(self.session.boundaries.values()), self.session.num_layers
        num_layers = num_local_layers(placed, num_layers, AheadRange.of(config.scorer).start)
        if not config.local_window or not num_layers:
            return None, 0
        return LocalWindow(
            config.local_window, reading.end - max(config.protect_last, config.scorer.window_size)
        ), num_layers

    @property
    def num_rows(self) -> int:
        return self.positions.numel()

    @property
    def logits_indices(self) -> Sequence[int]:
        """Rows that give logits: the root and its drafts, or the prompt's last token."""
        if self.reading is None:
            return range(len(self.token_ids))
        return [len(self.token_ids) - 1] if self.has_last or self._is_blank else []

    def check_recall(self, logits: Tensor) -> None:
        """The rows have spoken, (R, V). Of those that looked at waiting tokens, one in doubt of its
        token needs them: the root has the pass repeated, a draft's own token is not to be used."""
        if not self._stash_attention:
            return
        assert self.config is not None
        asking = torch.stack([glance.hits.any(-1) for glance in self._stash_attention]).any(
            0
        )  # (Q,)
        asking[0] &= not self._to_revive_now  # the root has been asked
        if not bool(asking.any()):
            return
        self._uncertain[asking] = (
            logits[asking].float().softmax(-1).amax(-1) < self.config.recall_below_prob
        )
        if bool(self._uncertain[0]):
            self.to_revive = self._entries_for(0)
        self._uncertain[1:] &= ~self.blocked  # those lack what they would have seen further up
        self.blocked |= self._uncertain[1:]

    def to_revive_next(self, draft: int | None) -> dict[int, Tensor]:
        """What the pass that begins with this draft as its root will bring, known already."""
        return (
            {}
            if draft is None or not bool(self._uncertain[1 + draft])
            else self._entries_for(1 + draft)
        )

    def _entries_for(self, row: int) -> dict[int, Tensor]:
        """Entries by boundary, neighbours included."""
        assert self.config is not None
        wanted: dict[int, list[Tensor]] = {}
        for boundary, paid, hits in self._stash_attention:
            if bool(hits[row].any()):
                stash, (known,) = self.session.stashes[boundary], hits[row].shape
                places, waiting = stash.positions[:known], stash.is_live[:known]
                limit, reach = _REPEATED * self.config.revive_limit, reach_of(self.config.scorer)
                chosen = quoted(paid[row], hits[row], places, waiting, limit, reach)
                wanted.setdefault(boundary, []).append(chosen.nonzero()[:, 0])
        return {boundary: torch.unique(torch.cat(parts)) for boundary, parts in wanted.items()}

    def undo(self) -> bool:
        """The pass was broken off: takes it back, unless it was committed. Tells whether it was
        taken back."""
        is_undone = self.session.rollback()
        if is_undone and self.reading is not None and self._reading_before is not None:
            for known in fields(Reading):
                setattr(self.reading, known.name, getattr(self._reading_before, known.name))
        return is_undone

    def entered_tokens(self, accepted: Sequence[int]) -> list[int]:
        """Tokens of this pass that the session now has: all but the drafts that were not accepted."""
        if self.reading is not None and self.entering_positions[0] < len(self.session):
            return []  # carried on tokens that entered in an earlier pass
        chain = len(self.token_ids) - self.num_drafts
        return [*self.token_ids[:chain], *(self.token_ids[chain + node] for node in accepted)]

    @property
    def scores_ahead(self) -> bool:
        """Whether the prompt's last rows run ahead of it to see what they will need."""
        return (
            self._selective
            and self.reading is not None
            and self.config is not None
            and AheadRange.of(self.config.scorer).stop > 0
        )

    @property
    def tables(self) -> list[GrowableTensor] | None:
        return self.session.tables if self._selective else None
