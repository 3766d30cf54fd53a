"""The boundary: where rows in segment and the stash meet, are scored, and go on or wait.

One operation serves prefill, decoding and the next turn (LazyLLM, sections 3.1 and 3.2):

    rows in segment + stash  --score-->  which tokens matter  --select-->  rows that go on / rows
    stashed
"""

from __future__ import annotations

import torch
from torch import Tensor

from lazyahead.cache.stash import Stash
from lazyahead.hf.ahead import FrozenRows
from lazyahead.hf.attention import Heads, More, Rows, attend, attention_of
from lazyahead.hf.segment import Pass
from lazyahead.prefill.ahead import score_ahead
from lazyahead.prefill.progress import Reading, chunk_len
from lazyahead.prefill.schedule import Boundary
from lazyahead.prefill.score import reach_of
from lazyahead.prefill.segment import InFlight, StashAttention
from lazyahead.prefill.select import best, demanded, quoted

_PER_TOKEN = 8
"""Tokens that a later turn brings back at most for each of its own."""


class Segment(InFlight):
    """Rows on their way through the layers, at each boundary among those that wait there."""

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, heads: Heads
    ) -> Tensor:
        """Caches the rows' keys and values (1, H_kv, T, D), answers (1, H, T, D_v); scores for the
        boundary below."""
        if self._is_blank:
            return query.new_zeros(1, query.shape[1], query.shape[2], values.shape[-1])
        kv = self.session.kv[layer]
        kv.append(keys, values, self.positions)
        ancestors, near = (
            self._ancestors if self.num_drafts else None,
            self._local if layer < self._num_local else None,
        )
        rows = Rows(self.positions, self.last, ancestors, self._masks, near)
        if self._asks_at(layer + 1):
            num_queries = min(self._num_queries, self.num_rows)
            self._scores = self._score(
                attention_of(query[:, :, -num_queries:], kv, rows, heads), kv.positions
            )
        for boundary in self._foretold.get(layer, ()):
            self._foretell(boundary, layer, query, rows, heads)
        return attend(query, kv, rows, heads)

    def at_boundary(self, layer: int, hidden: Tensor, pass_: Pass) -> Tensor | None:
        """Rows (T, d) at the entry to `layer` -> those that go on, by position; None when nothing
        changes."""
        boundary = self.session.boundaries.get(layer)
        if boundary is not None:
            self._masks = {}
        if boundary is None or not self._selective or self.config is None:
            return None
        stash = self.session.stashes[layer]
        if self.reading is not None and self.reading.stage == layer:
            return self._carry_on(stash, self.reading)
        is_silent = (
            self._is_blank
            or not self.num_rows
            or (self.reading is None and not self._asks_at(layer))
        )
        if is_silent or self._nobody_asks(stash):
            return None
        positions, row_slots = self._below(layer)
        if not self.has_last:
            self._defer(stash, hidden, torch.ones_like(row_slots, dtype=torch.bool), row_slots)
            return hidden[:0]
        if self.config.scorer.window_size == 0:
            self._scores = self.config.scorer(hidden, positions)[None]
        foreseen = None
        if self.scores_ahead and (boundary.keep_ratio < 1 or len(stash)):
            assert self._scores is not None
            rows, slots = (
                FrozenRows(hidden, self.positions, self.entered),
                (len(positions), row_slots),
            )
            foreseen = score_ahead(
                pass_, self, self.session, self.config.scorer, layer, rows, slots
            )
            self._scores = torch.maximum(
                self._scores, self.config.scorer(foreseen.peaks[None], positions)[None]
            )
        chosen = self._choose(boundary, stash, positions, row_slots)
        if self._to_revive_now and layer in self._to_revive_now:
            chosen[stash.slots[self._to_revive_now[layer]]] = True
        if (
            self.reading is not None
            and self.limit is not None
            and _count(chosen, row_slots, stash) > self.limit
        ):
            going: Tensor | None = self._postpone(
                layer, stash, hidden, chosen, row_slots, self.reading
            )
        else:
            going = self._regroup(stash, hidden, chosen, row_slots)
        if foreseen is not None and self.config.revive == "demand":
            foreseen.tell(stash)
        return going

    # --- score ------------------------------------------------------------------------------------

    @property
    def _num_queries(self) -> int:
        assert self.config is not None
        return (
            1 + self.num_drafts if self.reading is None else max(1, self.config.scorer.window_size)
        )

    def _asks_at(self, layer: int) -> bool:
        """Whether scores are needed at the entry to `layer`."""
        if not self._selective or layer not in self.session.boundaries or not self.has_last:
            return False
        if self.reading is not None:
            return self.config is not None and self.config.scorer.window_size > 0
        return len(self.session.stashes[layer]) > 0 or self._num_revived > 0

    def _nobody_asks(self, stash: Stash) -> bool:
        """The common case of a decoding step, seen at one glance: no row pays any stashed token
        enough."""
        if self.reading is not None or self._num_revived or self._to_revive_now:
            return False
        if self.config is None or self.config.revive != "demand":
            return False
        assert self._scores is not None
        return not bool(
            ((self._scores[:, stash.slots] > self.config.revive_threshold) & stash.is_live).any()
        )

    def _score(self, attention: Tensor, positions: Tensor) -> Tensor:
        """Attention (H, Q, N) -> scores: (1, N) for a prompt; in decoding (Q, N) for the root and
        each draft, by the paper's rule eq. 1, on demand what the head that pays most does."""
        assert self.config is not None
        if self.reading is None:
            return attention.mean(0) if self.config.revive == "percentile" else attention.amax(0)
        return self.config.scorer(attention, positions)[None]

    def _foretell(self, boundary: int, layer: int, query: Tensor, rows: Rows, heads: Heads) -> None:
        """What root and drafts pay at `layer` to tokens that wait at `boundary`, by the keys they
        would have here."""
        if self._to_revive_now and not self.num_drafts:
            return  # the root has been asked, and nobody else is here
        assert self.config is not None
        config, stash, kv = self.config, self.session.stashes[boundary], self.session.kv[layer]
        asking = query[:, :, -min(self._num_queries, self.num_rows) :]
        keys = stash.keys[layer]
        waiting = More(keys, stash.is_live[: keys.shape[2]])
        paid = attention_of(asking, kv, rows, heads, waiting).amax(0)[:, len(kv) :]  # (Q, E)
        self._stash_attention.append(StashAttention(boundary, paid, paid > config.revive_threshold))

    def _below(self, layer: int) -> tuple[Tensor, Tensor]:
        """Positions (N,) of all tokens at the layer below, and the slots (T,) of the rows in
        segment among them."""
        if layer == 0:
            return torch.arange(self.last + 1, device=self.positions.device), self.positions
        positions = self.session.kv[layer - 1].positions
        return positions, torch.arange(
            len(positions) - self.num_rows, len(positions), device=positions.device
        )

    # --- select -----------------------------------------------------------------------------------

    def _choose(
        self, boundary: Boundary, stash: Stash, positions: Tensor, row_slots: Tensor
    ) -> Tensor:
        """Which of the N tokens below go on, as a mask; in decoding also which drafts would ask for
        more."""
        config, scores = self.config, self._scores
        assert config is not None
        assert scores is not None
        waiting = self._waiting(stash, positions, row_slots)
        chosen = self._selected(boundary, scores[0], positions, waiting)
        if self.reading is None and config.revive == "demand":
            chosen[row_slots[self.entered < 0]] = (
                True  # what an answer brought back goes on to the end
            )
        left = waiting & ~chosen
        if self.num_drafts and config.revive == "percentile":
            for draft, row in enumerate(scores[1:]):
                self.blocked[draft] |= (
                    self._selected(boundary, row, positions, waiting) & left
                ).any()
        elif self.num_drafts and config.revive_limit:
            self.blocked |= ((scores[1:] > config.revive_threshold) & left).any(-1)
        return chosen

    def _waiting(self, stash: Stash, positions: Tensor, row_slots: Tensor) -> Tensor:
        """Tokens (N,) that may come back: stashed ones, and those that came back at an earlier
        boundary."""
        waiting = torch.zeros_like(positions, dtype=torch.bool)
        if len(stash):
            waiting[stash.slots[stash.live]] = True
        if self._num_revived:
            waiting[row_slots[self.entered < 0]] = True
        return waiting

    def _selected(
        self, boundary: Boundary, scores: Tensor, positions: Tensor, waiting: Tensor
    ) -> Tensor:
        config, reading = self.config, self.reading
        assert config is not None
        end = reading.end if reading else self.session.prompt_len
        ranked_from = 0 if config.revive == "percentile" else (reading.start if reading else end)
        chosen = torch.zeros_like(waiting)
        if ranked_from < end:
            pool = (positions >= ranked_from) & (positions < end)
            chosen = best(
                scores,
                pool,
                self._protected(positions, end),
                boundary.keep_count(end - ranked_from),
            )
        if config.revive == "demand" and ranked_from > 0:
            older = waiting & (positions < ranked_from)
            if reading is None:
                hits = older & (scores > config.revive_threshold)
                hits = quoted(
                    scores, hits, positions, waiting, config.revive_limit, reach_of(config.scorer)
                )
            else:
                most = min(config.revive_limit, _PER_TOKEN) * (end - reading.start)
                hits = demanded(scores, older, 0.0, min(most, boundary.keep_count(reading.start)))
            chosen |= hits
        return chosen

    def _protected(self, positions: Tensor, end: int) -> Tensor:
        config, reading = self.config, self.reading
        assert config is not None
        protected = (positions < config.protect_first) | (positions >= end - config.protect_last)
        if reading is None:
            return protected
        protected |= positions == end - 1  # the row that asks
        if not reading.prunes:
            protected |= positions >= reading.start
        if reading.question is not None and config.protect_question:
            protected |= (positions >= reading.question[0]) & (positions < reading.question[1])
        return protected

    # --- stash and revive -------------------------------------------------------------------------

    def _regroup(
        self, stash: Stash, hidden: Tensor, chosen: Tensor, row_slots: Tensor
    ) -> Tensor | None:
        """Rows not chosen wait, chosen ones that wait come back; the others fly on, by position."""
        stays = chosen[row_slots]
        if self.reading is None:
            stays = stays | (self.entered >= 0)  # the running answer and its drafts never wait
        live = stash.live
        returning = live[chosen[stash.slots[live]]] if len(stash) else live
        num_staying = int(stays.sum())
        if num_staying == self.num_rows and not returning.numel():
            return None
        if num_staying < self.num_rows:
            self._defer(stash, hidden, ~stays, row_slots)
            hidden = hidden[stays]
            self.positions, self.entered = self.positions[stays], self.entered[stays]
        if returning.numel():
            hidden = self._revive(stash, returning, hidden)
        self._num_revived = int((self.entered < 0).sum())
        return hidden

    def _revive(self, stash: Stash, entries: Tensor, hidden: Tensor) -> Tensor:
        rows, positions = stash.take(entries)
        fresh_from = self.reading.start if self.reading else self.session.prompt_len
        self.session.num_revived += int((positions < fresh_from).sum())
        head = self.num_rows - self.num_drafts  # drafts stay last, in their own order
        self.positions = torch.cat([positions, self.positions])
        self.entered = torch.cat([torch.full_like(positions, -1), self.entered])
        hidden = torch.cat([rows, hidden])
        order = torch.arange(self.num_rows, device=positions.device)
        order[: entries.numel() + head] = self.positions[: entries.numel() + head].argsort(
            stable=True
        )
        self.positions, self.entered = self.positions[order], self.entered[order]
        return hidden[order]

    def _defer(self, stash: Stash, hidden: Tensor, which: Tensor, row_slots: Tensor) -> None:
        stash.add(hidden[which], self.positions[which], row_slots[which])
        if bool(which.all()):
            self.positions, self.entered = self.positions[:0], self.entered[:0]

    # --- reading in parts -------------------------------------------------------------------------

    def _postpone(
        self,
        layer: int,
        stash: Stash,
        hidden: Tensor,
        chosen: Tensor,
        row_slots: Tensor,
        reading: Reading,
    ) -> Tensor:
        """Too many chosen for this pass: all wait here, the chosen are carried on from the next
        pass on."""
        self._defer(stash, hidden, torch.ones_like(row_slots, dtype=torch.bool), row_slots)
        live = stash.live
        wanted = live[chosen[stash.slots[live]]]
        reading.stage, reading.wanted = layer, wanted[stash.positions[wanted].argsort()]
        return hidden[:0]

    def _carry_on(self, stash: Stash, reading: Reading) -> Tensor:
        """The next part of those chosen at this boundary replaces the row that kept their place."""
        assert reading.wanted is not None
        assert self.config is not None
        part = reading.wanted[
            : chunk_len(len(reading.wanted), self.limit, self.config.scorer.window_size)
        ]
        reading.wanted = reading.wanted[part.numel() :]
        hidden, self.positions = stash.take(part)
        self.session.num_revived += int((self.positions < reading.start).sum())
        self.entered = torch.full_like(self.positions, -1)
        self._is_blank, self.has_last = False, not reading.wanted.numel()
        if self.has_last:
            reading.stage = None
            self.entered[-1] = 0  # the prompt's last token takes the place it logits_indices from
        return hidden


def _count(chosen: Tensor, row_slots: Tensor, stash: Stash) -> int:
    """Rows that would go on: of those in segment, and back from the stash."""
    return int(chosen[row_slots].sum()) + (
        int(chosen[stash.slots[stash.live]].sum()) if len(stash) else 0
    )
