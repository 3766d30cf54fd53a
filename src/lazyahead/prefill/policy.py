"""The two policies: which prompt tokens go on while a prompt is computed, and which stashed tokens
are revived while an answer is decoded (LazyLLM, arXiv 2407.14057)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.cache.stash import Stash
from lazyahead.hf.rows import LocalWindow
from lazyahead.hf.segment import Segment, Watch
from lazyahead.prefill.boundary import Below, BoundaryPolicy, defer_all, entries_of
from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.progress import PrefillProgress, chunk_len
from lazyahead.prefill.schedule import Boundary, local_layers
from lazyahead.prefill.select import best, demanded

_PER_TOKEN = 8
"""Stashed tokens that a later turn revives at most for each token of its own."""


class PrefillPolicy(BoundaryPolicy):
    """Selects prompt tokens at each boundary, once the last token of the prompt is in flight.

    `limit` bounds the rows of a pass; more selected rows than that are stashed and continued in
    chunks.
    """

    needs_token_args = True

    def __init__(
        self,
        session: Session,
        config: LazyPrefill,
        progress: PrefillProgress,
        *,
        has_last: bool,
        limit: int | None,
    ) -> None:
        super().__init__(session, config)
        self.progress = progress
        self.limit = limit
        self.has_last = has_last
        """Whether the prompt's last token is in flight."""
        self.is_placeholder = progress.stage is not None
        """Whether the one row in flight only stands for the rows that are stashed at `stage`."""
        self.boundary_layers = session.boundaries.keys()
        self.head_reduction = getattr(config.scorer, "head_reduction", "mean")
        if has_last or self.is_placeholder:
            num_queries = config.scorer.window_size
            self.score_queries = {layer - 1: num_queries for layer in session.boundaries}
        if progress.prunes and config.local_window:
            self._set_local_window()
        self._scores: Tensor | None = None

    @property
    def first_new_position(self) -> int:
        return self.progress.start

    def observe(self, layer: int, weights: Tensor) -> None:
        """Scores the N tokens of `layer` by the weights (Q, N) of the last rows."""
        if self.has_last:
            self._scores = self.config.scorer(weights, self.session.kv[layer].positions)

    def at_boundary(self, layer: int, hidden: Tensor, segment: Segment) -> Tensor | None:
        stash = self.session.stashes[layer]
        if self.progress.stage == layer:
            return self._continue_chunk(stash, segment)
        if self.is_placeholder or not segment.num_rows:
            return None
        if self.progress.shares and layer == min(self.boundary_layers):
            self.progress.shared += (hidden,)
        below = self.below(layer, segment)
        if not self.has_last:
            return defer_all(stash, hidden, segment, below.row_slots)
        boundary = self.session.boundaries[layer]
        chosen = self._select(boundary, stash, segment, below)
        if self.limit is not None and _count(chosen, below.row_slots, stash) > self.limit:
            return self._postpone(layer, stash, hidden, segment, below, chosen)
        return self.regroup(stash, hidden, segment, below, chosen)

    def _set_local_window(self) -> None:
        """Rows before the last ones attend to a window only, in layers below the first cut."""
        config = self.config
        until = self.progress.end - (0 if self.progress.is_open else config.num_last_rows)
        self.local = LocalWindow(config.local_window, until)
        placed = list(self.session.boundaries.values())
        self.local_layers = local_layers(placed, self.session.num_layers, config.local_from)

    # --- select -----------------------------------------------------------------------------

    def _select(self, boundary: Boundary, stash: Stash, segment: Segment, below: Below) -> Tensor:
        """(N,) which tokens go on."""
        config = self.config
        progress = self.progress
        scores = self._scores_of(below)
        ranked_from = 0 if config.revive == "percentile" else progress.start
        pool = (below.positions >= ranked_from) & (below.positions < progress.end)
        count = boundary.keep_count(progress.end - ranked_from)
        protected = self._protected(below.positions)
        chosen = best(scores, pool, protected, count)
        if config.revive == "demand" and ranked_from > 0:  # a later turn
            older = self.may_revive(stash, segment, below) & (below.positions < ranked_from)
            most = min(config.revive_limit, _PER_TOKEN) * (progress.end - progress.start)
            limit = min(most, boundary.keep_count(progress.start))
            chosen |= demanded(scores, older, 0.0, limit)
        return chosen

    def _scores_of(self, below: Below) -> Tensor:
        """The scores (N,) that the last rows gave, or those of a scorer that reads no attention."""
        scorer = self.config.scorer
        if scorer.window_size == 0:
            nothing = torch.zeros(0, below.positions.numel(), device=below.positions.device)
            return scorer(nothing, below.positions)
        assert self._scores is not None  # the last rows have passed the layer below
        return self._scores

    def _protected(self, positions: Tensor) -> Tensor:
        """(N,) which tokens always go on."""
        config = self.config
        progress = self.progress
        protected = (positions < config.protect_first) | (positions == progress.end - 1)
        protected |= positions >= progress.end - config.protect_last
        if not progress.prunes:
            protected |= positions >= progress.start
        if progress.question is not None and config.protect_question:
            start, end = progress.question
            protected |= (positions >= start) & (positions < end)
        return protected

    # --- chunks -----------------------------------------------------------------------------

    def _postpone(
        self,
        layer: int,
        stash: Stash,
        hidden: Tensor,
        segment: Segment,
        below: Below,
        chosen: Tensor,
    ) -> Tensor:
        """Too many selected for this pass: all are stashed, the selected continue in later ones."""
        rows = defer_all(stash, hidden, segment, below.row_slots)
        selected = entries_of(stash, chosen)
        self.progress.stage = layer
        self.progress.selected = selected[stash.positions[selected].argsort()]
        return rows

    def _continue_chunk(self, stash: Stash, segment: Segment) -> Tensor:
        """The next selected rows take the place of the placeholder."""
        progress = self.progress
        assert progress.selected is not None  # set together with the stage
        num = chunk_len(len(progress.selected), self.limit, self.config.scorer.window_size)
        chunk = progress.selected[:num]
        progress.selected = progress.selected[num:]
        hidden, positions = stash.take(chunk)
        self.session.num_revived += int((positions < progress.start).sum())
        entered = torch.full_like(positions, -1)
        self.is_placeholder = False
        self.has_last = not progress.selected.numel()
        if self.has_last:
            progress.stage = None
            entered[-1] = 0  # the prompt's last token, whose logits are needed
        segment.replace(positions, entered)
        return hidden


class DecodePolicy(BoundaryPolicy):
    """Revives stashed tokens that the root row of a step attends to.

    A draft row that needs a stashed token cannot have it: `blocked` marks it, so that it is not
    verified and becomes the next root.
    """

    needs_token_args = True

    def __init__(self, session: Session, config: LazyPrefill, num_drafts: int) -> None:
        super().__init__(session, config)
        first = min(layer for layer, stash in session.stashes.items() if len(stash))
        self.boundary_layers = [layer for layer in session.boundaries if layer >= first]
        self.score_queries = {layer - 1: 1 + num_drafts for layer in self.boundary_layers}
        self.head_reduction = "mean" if config.revive == "percentile" else "max"
        device = session.kv[0].positions.device
        self.blocked = torch.zeros(num_drafts, dtype=torch.bool, device=device)
        """(M,) drafts whose own output is not to be used in this pass."""
        self._scores: Tensor | None = None

    def watches(self) -> Mapping[int, Watch] | None:
        """Stashed tokens of each boundary."""
        if self.config.revive != "demand":
            return None
        return {
            layer - 1: Watch(stash, self.config.revive_threshold)
            for layer, stash in self.session.stashes.items()
            if len(stash)
        }

    def observe(self, layer: int, weights: Tensor) -> None:
        """Keeps the weights (Q, N) of the root and its drafts."""
        self._scores = weights

    def at_boundary(self, layer: int, hidden: Tensor, segment: Segment) -> Tensor | None:
        stash = self.session.stashes[layer]
        scores = self._scores
        assert scores is not None  # root and drafts have passed the layer below
        if self._needs_nothing(stash, scores):
            return None
        below = self.below(layer, segment)
        chosen = self._select(self.session.boundaries[layer], stash, segment, below, scores)
        return self.regroup(stash, hidden, segment, below, chosen)

    def stays(self, chosen: Tensor, segment: Segment) -> Tensor:
        """The running answer and its drafts are never stashed."""
        return chosen | (segment.entered >= 0)

    def _needs_nothing(self, stash: Stash, scores: Tensor) -> bool:
        """The common case: no row attends to any token stashed here above the threshold."""
        if self.config.revive != "demand" or self.num_revived:
            return False
        if not len(stash):
            return True
        exceeds = scores[:, stash.slots] > self.config.revive_threshold
        return not bool((exceeds & stash.is_live).any())

    def _select(
        self, boundary: Boundary, stash: Stash, segment: Segment, below: Below, scores: Tensor
    ) -> Tensor:
        """(N,) which tokens go on; also which drafts would need more than that."""
        config = self.config
        candidates = self.may_revive(stash, segment, below)
        if config.revive == "percentile":
            chosen = self._percentile(boundary, scores[0], below.positions)
            for draft, row in enumerate(scores[1:]):
                wanted = self._percentile(boundary, row, below.positions)
                self.blocked[draft] |= (wanted & candidates & ~chosen).any()
            return chosen
        limit = config.revive_limit
        chosen = demanded(scores[0], candidates, config.revive_threshold, limit)
        chosen[below.row_slots[segment.entered < 0]] = True  # revived rows go on to the end
        if limit and self.blocked.numel():
            exceeds = candidates & (scores[1:] > config.revive_threshold)  # (M, N)
            self.blocked |= (exceeds & ~chosen).any(-1)
        return chosen

    def _percentile(self, boundary: Boundary, scores: Tensor, positions: Tensor) -> Tensor:
        """The paper's rule: the best `keep_ratio` of the prompt, selected anew at every step."""
        config = self.config
        end = self.session.prompt_len
        protected = (positions < config.protect_first) | (positions >= end - config.protect_last)
        return best(scores, positions < end, protected, boundary.keep_count(end))


def _count(chosen: Tensor, row_slots: Tensor, stash: Stash) -> int:
    """Rows that would go on: of those in flight, and of those stashed."""
    return int(chosen[row_slots].sum()) + int(entries_of(stash, chosen).numel())
