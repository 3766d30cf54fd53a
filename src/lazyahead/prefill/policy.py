"""The two policies: which prompt tokens go on while a prompt is computed, and which stashed tokens
are revived while an answer is decoded (LazyLLM, arXiv 2407.14057)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.cache.stash import Stash
from lazyahead.hf.attention import ExtraKeys, LocalWindow
from lazyahead.hf.batch import Batch
from lazyahead.hf.segment import Rows, Segment
from lazyahead.prefill.ahead import AheadScores, score_ahead
from lazyahead.prefill.boundary import Below, BoundaryPolicy, defer_all, entries_of
from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.progress import PrefillProgress, chunk_len
from lazyahead.prefill.recall import Recall
from lazyahead.prefill.schedule import Boundary, num_local_layers
from lazyahead.prefill.score import AheadRange, reach_of
from lazyahead.prefill.select import best, best_with_neighbours, demanded

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
        self.scores_ahead = AheadRange.of(config.scorer).stop > 0
        if has_last or self.is_placeholder:
            num_queries = config.scorer.window_size
            self.score_queries = {layer - 1: num_queries for layer in session.boundaries}
        if progress.prunes:
            self._set_local_window()
        self._scores: Tensor | None = None

    @property
    def first_new_position(self) -> int:
        return self.progress.start

    def observe(self, layer: int, weights: Tensor) -> None:
        """Scores the N tokens of `layer` by the weights (Q, N) of the last rows."""
        if self.has_last:
            self._scores = self.config.scorer(weights, self.session.kv[layer].positions)

    def at_boundary(
        self, layer: int, hidden: Tensor, segment: Segment, batch: Batch
    ) -> Tensor | None:
        stash = self.session.stashes[layer]
        if self.progress.stage == layer:
            return self._continue_chunk(stash, segment)
        if self.is_placeholder or not segment.num_rows:
            return None
        below = self.below(layer, segment)
        if not self.has_last:
            return defer_all(stash, hidden, segment, below.row_slots)
        boundary = self.session.boundaries[layer]
        ahead = self._score(boundary, stash, hidden, segment, below, batch)
        chosen = self._select(boundary, stash, segment, below)
        if self.limit is not None and _count(chosen, below.row_slots, stash) > self.limit:
            rows: Tensor | None = self._postpone(layer, stash, hidden, segment, below, chosen)
        else:
            rows = self.regroup(stash, hidden, segment, below, chosen)
        if ahead is not None and self.config.revive == "demand":
            ahead.store(stash)
        return rows

    def _set_local_window(self) -> None:
        """Rows before the last ones attend to a window only, in layers below the first cut."""
        config = self.config
        placed = list(self.session.boundaries.values())
        start = AheadRange.of(config.scorer).start
        num_layers = num_local_layers(placed, self.session.num_layers, start)
        if config.local_window and num_layers:
            until = self.progress.end - max(config.protect_last, config.scorer.window_size)
            self.local = LocalWindow(config.local_window, until)
            self.num_local_layers = num_layers

    # --- score ------------------------------------------------------------------------------

    def _score(
        self,
        boundary: Boundary,
        stash: Stash,
        hidden: Tensor,
        segment: Segment,
        below: Below,
        batch: Batch,
    ) -> AheadScores | None:
        """Sets the scores (N,); also returns what rows saw that ran ahead."""
        scorer = self.config.scorer
        if scorer.window_size == 0:
            nothing = below.positions.new_zeros((0, below.positions.numel()))
            self._scores = scorer(nothing, below.positions)
        if not self.scores_ahead or not (boundary.keep_ratio < 1 or len(stash)):
            return None
        assert self._scores is not None  # a scorer that runs ahead has a window
        rows = Rows(hidden, segment.positions, segment.entered)
        ahead = score_ahead(batch, segment, self.session, scorer, boundary.layer, rows, below)
        self._scores = torch.maximum(self._scores, scorer(ahead.attention, below.positions))
        return ahead

    # --- select -----------------------------------------------------------------------------

    def _select(self, boundary: Boundary, stash: Stash, segment: Segment, below: Below) -> Tensor:
        """(N,) which tokens go on."""
        config = self.config
        progress = self.progress
        scores = self._scores
        assert scores is not None  # the last rows have passed the layer below
        ranked_from = 0 if config.revive == "percentile" else progress.start
        pool = (below.positions >= ranked_from) & (below.positions < progress.end)
        count = boundary.keep_count(progress.end - ranked_from)
        chosen = best(scores, pool, self._protected(below.positions), count)
        if config.revive == "demand" and ranked_from > 0:
            older = self.may_revive(stash, segment, below) & (below.positions < ranked_from)
            most = min(config.revive_limit, _PER_TOKEN) * (progress.end - progress.start)
            limit = min(most, boundary.keep_count(progress.start))
            chosen |= demanded(scores, older, 0.0, limit)
        return chosen

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

    `to_revive` are stash entries, by boundary, that an earlier try of this step found it needs.
    A draft row that needs a stashed token cannot have it: `blocked` marks it, so that it is not
    verified and becomes the next root.
    """

    needs_token_args = True

    def __init__(
        self,
        session: Session,
        config: LazyPrefill,
        *,
        num_drafts: int,
        to_revive: Mapping[int, Tensor],
    ) -> None:
        super().__init__(session, config)
        self.num_drafts = num_drafts
        self._to_revive_now = to_revive
        stashed = [layer for layer, stash in session.stashes.items() if len(stash)]
        first = min(stashed)
        self.boundary_layers = [layer for layer in session.boundaries if layer >= first]
        self.score_queries = {layer - 1: 1 + num_drafts for layer in self.boundary_layers}
        self.head_reduction = "mean" if config.revive == "percentile" else "max"
        device = session.kv[0].positions.device
        self.blocked = torch.zeros(num_drafts, dtype=torch.bool, device=device)
        """(M,) drafts whose own output is not to be used in this pass."""
        self._recall = Recall(session, config, 1 + num_drafts)
        if config.revive == "demand" and not (to_revive and not num_drafts):
            self.stash_keys = _stash_keys(session)
        self._scores: Tensor | None = None

    def observe(self, layer: int, weights: Tensor) -> None:
        """Keeps the weights (Q, N) of the root and its drafts."""
        self._scores = weights

    def observe_stash(self, boundary: int, weights: Tensor) -> None:
        self._recall.observe(boundary, weights)

    def at_boundary(
        self, layer: int, hidden: Tensor, segment: Segment, batch: Batch
    ) -> Tensor | None:
        stash = self.session.stashes[layer]
        scores = self._scores
        assert scores is not None  # root and drafts have passed the layer below
        if self._needs_nothing(stash, scores):
            return None
        below = self.below(layer, segment)
        chosen = self._select(self.session.boundaries[layer], stash, segment, below, scores)
        if layer in self._to_revive_now:
            chosen[stash.slots[self._to_revive_now[layer]]] = True
        return self.regroup(stash, hidden, segment, below, chosen)

    def stays(self, chosen: Tensor, segment: Segment) -> Tensor:
        """The running answer and its drafts are never stashed."""
        return chosen | (segment.entered >= 0)

    def check_recall(self, logits: Tensor) -> Mapping[int, Tensor]:
        """With the logits (Q, V) of root and drafts: the stash entries that the root needs and did
        not have, by boundary. Where there are any, this pass is void and is repeated with them."""
        self._recall.check(logits, root_was_checked=bool(self._to_revive_now))
        uncertain = self._recall.uncertain
        uncertain[1:] &= ~self.blocked  # those lack what they would have attended to higher up
        self.blocked |= uncertain[1:]
        return self._recall.entries_for(0) if bool(uncertain[0]) else {}

    def to_revive_next(self, draft: int | None) -> Mapping[int, Tensor]:
        """The entries that the pass with this draft as its root will revive, known already."""
        if draft is None or not bool(self._recall.uncertain[1 + draft]):
            return {}
        return self._recall.entries_for(1 + draft)

    def _needs_nothing(self, stash: Stash, scores: Tensor) -> bool:
        """The common case: no row attends to any token stashed here above the threshold."""
        if self.config.revive != "demand" or self.num_revived or self._to_revive_now:
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
        exceeds = candidates & (scores > config.revive_threshold)  # (Q, N)
        limit = config.revive_limit
        reach = reach_of(config.scorer)
        chosen = best_with_neighbours(
            scores[0], exceeds[0], below.positions, candidates, limit, reach
        )
        chosen[below.row_slots[segment.entered < 0]] = True  # revived rows go on to the end
        if self.num_drafts and limit:
            self.blocked |= (exceeds[1:] & ~chosen).any(-1)
        return chosen

    def _percentile(self, boundary: Boundary, scores: Tensor, positions: Tensor) -> Tensor:
        """The paper's rule: the best `keep_ratio` of the prompt, selected anew at every step."""
        config = self.config
        end = self.session.prompt_len
        protected = (positions < config.protect_first) | (positions >= end - config.protect_last)
        return best(scores, positions < end, protected, boundary.keep_count(end))


def _stash_keys(session: Session) -> dict[int, Sequence[tuple[int, ExtraKeys]]]:
    """Layer -> the approximate keys, by boundary, of tokens that are stashed below it."""
    found: dict[int, list[tuple[int, ExtraKeys]]] = {}
    for boundary, stash in session.stashes.items():
        for layer, keys in stash.keys.items() if len(stash) else ():
            extra = ExtraKeys(keys, stash.is_live[: keys.shape[2]])
            found.setdefault(layer, []).append((boundary, extra))
    return dict(found)


def _count(chosen: Tensor, row_slots: Tensor, stash: Stash) -> int:
    """Rows that would go on: of those in flight, and of those stashed."""
    return int(chosen[row_slots].sum()) + int(entries_of(stash, chosen).numel())
