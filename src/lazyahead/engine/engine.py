"""The loop: admit -> draft -> forward -> verify -> commit. Rows of all running requests travel in
one pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lazyahead.cache.session import Session
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.budget import Step
from lazyahead.draft.drafter import Drafter, NoDrafter
from lazyahead.draft.learned_cost import LearnedRowCost
from lazyahead.draft.tree import Draft
from lazyahead.draft.verify import walk
from lazyahead.engine.model_runner import Runner
from lazyahead.engine.request import Request
from lazyahead.errors import ConfigError
from lazyahead.prefill.policy import Segment
from lazyahead.prefill.progress import chunk_len
from lazyahead.prefill.schedule import boundaries


class Engine:
    """Runs requests on one model, many at once. `submit`, then `step` until `is_idle`, inside `with
    engine:`.

    Beside running answers a prompt is read in parts of `prefill_chunk_size` rows, which bounds how
    long a pass can stall them; alone it is read in one pass. `row_cost` tells how many drafts pay;
    without it every draft is verified.
    """

    def __init__(
        self,
        runner: Runner,
        prefill: LazyPrefill | None,
        decode: Lookahead | None,
        *,
        drafter: Drafter | None = None,
        row_cost: LearnedRowCost | None = None,
        prefill_chunk_size: int = 512,
        max_running: int = 64,
    ) -> None:
        if prefill_chunk_size < 1 or max_running < 1:
            raise ConfigError(
                f"prefill_chunk_size {prefill_chunk_size} and max_running {max_running} must be at least 1"
            )
        self.runner, self.prefill, self.decode = runner, prefill, decode
        self.drafter = drafter or NoDrafter()
        self.prefill_chunk_size, self.max_running = prefill_chunk_size, max_running
        self.row_cost = row_cost
        self._step: Step | None = None  # what the drafts of the current pass are for
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._attached: list[AbstractContextManager[Any]] = []

    def new_session(self) -> Session:
        """An empty session for this engine's model and way of reading."""
        if self.prefill is None:
            return Session(self.runner.num_layers)
        needs_attention = self.prefill.scorer.window_size > 0
        placed = boundaries(self.prefill.schedule, self.runner.attends_fully, needs_attention)
        return Session(self.runner.num_layers, placed)

    def __enter__(self) -> Engine:
        context = self.runner.attached()
        context.__enter__()
        self._attached.append(context)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._attached.pop().__exit__(*exc)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def submit(self, request: Request) -> None:
        """Queues a request; it joins between two steps."""
        request.session.in_use = True
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Takes a request out between two steps; what it has written stays, a prompt half read is
        forgotten."""
        if request.finish_reason is not None:
            return
        if request.is_prefilling and request in self._running:
            session = request.session
            pending = session.pending
            session.crop(request.reading.start)
            session.pending = pending
        self._finish(request, "cancelled")

    def answer(self, requests: Sequence[Request]) -> None:
        """Submits these and steps until all have ended. Left early, by an exception, it cancels
        those that have not."""
        with self:
            try:
                for request in requests:
                    self.submit(request)
                while any(request.finish_reason is None for request in requests):
                    self.step()
            finally:
                for request in requests:
                    self.cancel(request)

    def step(self) -> None:
        """One pass for all running requests. Where it is broken off, what it has not committed is
        as before it."""
        self._admit()
        segments = self._draft()
        begin = time.perf_counter()
        try:
            logits = self._forward(segments)
            runs = self._verify(segments, logits)
            self._note_cost(segments, runs, time.perf_counter() - begin)
            self._commit(runs)
        except BaseException:
            for request, segment in segments:
                request.forget(segment.undo())
            raise

    # --- the phases -------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            request = self._waiting.popleft()
            request.session.prompt_len = len(request.prompt)
            self._running.append(request)

    def _draft(self) -> list[tuple[Request, Segment]]:
        """The rows of each request: a root and its drafts, or the next part of a prompt."""
        writing = [request for request in self._running if not request.is_prefilling]
        limit = self.prefill_chunk_size if writing and not self.runner.single_request_only else None
        reading = self._read_all(limit)
        self._propose(writing, sum(len(segment.token_ids) for _, segment in reading))
        return [(request, self._write(request)) for request in writing] + reading

    def _forward(self, segments: Sequence[tuple[Request, Segment]]) -> list[Tensor | None]:
        """Logits (R, V) of each segment's rows that speak; None where none do."""
        together = [[segment for _, segment in segments]] if segments else []
        groups = (
            [[segment] for _, segment in segments] if self.runner.single_request_only else together
        )
        parts: list[Tensor | None] = []
        for group in groups:
            logits = self.runner.run(group)
            start = 0
            for segment in group:
                num = len(segment.logits_indices) if logits.numel() else 0
                parts.append(logits[start : start + num] if num else None)
                start += num
        return parts

    def _verify(
        self, segments: Sequence[tuple[Request, Segment]], logits: Sequence[Tensor | None]
    ) -> list[tuple[Request, Segment, list[int], list[int]]]:
        """What each request's answer goes on with: tokens, and the draft nodes whose rows hold
        them."""
        runs = []
        for (request, segment), rows in zip(segments, logits, strict=True):
            reading = segment.reading
            if reading is not None:
                reading.num_entered = (
                    min(reading.end, len(request.session) + len(segment.token_ids)) - reading.start
                )
                reading.is_done = segment.has_last and reading.stage is None
            elif rows is not None:
                segment.check_recall(rows)
            if rows is None or segment.to_revive or (reading is not None and not reading.is_done):
                runs.append((request, segment, list[int](), list[int]()))
                continue
            tokens, nodes = self._walk(request, segment, rows)
            runs.append((request, segment, tokens, nodes))
        return runs

    def _commit(self, runs: Sequence[tuple[Request, Segment, list[int], list[int]]]) -> None:
        """Accepted rows stay in place, the rest is dropped; an answer ends at the very token that
        ends it."""
        for request, segment, tokens, nodes in runs:
            if segment.to_revive:  # once more, with what the root turned out to need
                request.to_revive = segment.to_revive
                request.num_steps += 1
                segment.undo()
                continue
            emitted, reason = self._accept(request, tokens)
            kept = nodes[: max(0, len(emitted) - 1)]
            request.to_revive = (
                segment.to_revive_next(request.draft.child(nodes, tokens))
                if segment.num_drafts
                else {}
            )
            request.session.commit(segment.entered_tokens(kept), segment.num_drafts, kept)
            if emitted:
                request.sources = request.draft.sources_of(nodes, len(emitted))
                self._tell(request, segment, tokens, emitted, reason)

    # --- their parts ------------------------------------------------------------------------------

    def _propose(self, writing: Sequence[Request], num_reading: int) -> None:
        """Each request's draft, cut to the nodes that raise expected tokens per second in the
        common pass."""
        if self.decode is None or not writing:
            return
        others = num_reading + sum(request.num_reviving for request in writing)
        num_context, limit = (
            sum(len(request.session) for request in writing),
            self.decode.decoding_length,
        )
        self._step = None
        if self.row_cost is not None:
            num_context //= len(writing)
            self._step = self.row_cost.step(len(writing), others, num_context)
        steps = [self._step] if self._step is not None else []
        for request in writing:
            request.proposed = Draft.EMPTY
            room = request.max_new_tokens - len(request.answer) - 1
            start = len(request.session)
            steady = self.runner.may_draft(start, start + min(room, limit))
            if request.drafts is not None and room > 0 and steady:
                request.proposed = request.drafts.propose(limit, *steps).within(room)
            request.draft = request.proposed
        if self.row_cost is None or self._step is None:
            return
        guessed = [request for request in writing if request.proposed.probs]
        if guessed:
            probs = [request.proposed.probs for request in writing]
            counts = self.row_cost.choose(probs, self._step)
            for request, count in zip(writing, counts, strict=True):
                if request.proposed.probs:
                    request.draft = request.proposed.best(count)

    def _note_cost(
        self,
        segments: Sequence[tuple[Request, Segment]],
        runs: Sequence[tuple[Request, Segment, list[int], list[int]]],
        seconds: float,
    ) -> None:
        """What a pass took in which all requests are decoding."""
        step = self._step
        if self.row_cost is None or step is None or not segments:
            return
        if all(segment.reading is None for _, segment in segments):
            rows = sum(len(segment.token_ids) for _, segment in segments) + step.other_rows
            self.row_cost.note(step, rows, sum(len(run[2]) for run in runs), seconds)

    def _write(self, request: Request) -> Segment:
        draft = request.draft
        ancestors = torch.from_numpy(draft.ancestors).to(self.runner.device) if len(draft) else None
        rows = (
            request.session,
            self.prefill,
            [*request.session.pending, *draft.token_ids],
            self.runner.device,
        )
        return Segment(
            *rows, depths=draft.depths, ancestors=ancestors, to_revive_now=request.to_revive
        )

    def _read_all(self, limit: int | None) -> list[tuple[Request, Segment]]:
        """Prompts first come first served: a whole one where nobody waits for a token, else parts
        of `limit` rows."""
        segments = []
        for request in (request for request in self._running if request.is_prefilling):
            segment = self._read(request, limit)
            segments.append((request, segment))
            may_grow = segment.has_last and request.session.num_stashed > 0
            if limit is None or request.reading.stage is not None or may_grow:
                break
            limit -= len(segment.token_ids)
            if limit <= 0:
                break
        return segments

    def _read(self, request: Request, limit: int | None) -> Segment:
        reading, start = request.reading, len(request.session)
        token_ids: Sequence[int] = request.prompt[
            -1:
        ]  # carries on what was chosen: one row keeps its place
        if reading.stage is None:
            queries = self.prefill.scorer.window_size if self.prefill is not None else 1
            token_ids = request.prompt[
                start : start + chunk_len(reading.end - start, limit, max(1, queries))
            ]
        return Segment(
            request.session,
            self.prefill,
            token_ids,
            self.runner.device,
            reading=reading,
            limit=limit,
        )

    def _walk(
        self, request: Request, segment: Segment, rows: Tensor
    ) -> tuple[list[int], list[int]]:
        """Follows the model's own choices through the draft."""
        if (
            request.drafts is None and self.decode is not None
        ):  # indexed while a GPU still computes the pass
            request.drafts = self.drafter.start(request.prompt, self.decode.namespace)
        picker = request.picker
        likeliest = rows.argmax(-1).tolist() if picker.is_plain and request.scores is None else None

        def pick(node: int, tokens: Sequence[int]) -> int:
            if likeliest is not None and request.logits is None:
                return int(likeliest[node + 1])
            bare = rows[node + 1]
            processed = picker.process(bare, request.prefix(tokens))
            if request.scores is not None:
                request.scores.append(processed)
            if request.logits is not None:
                request.logits.append(bare.float())
            return picker.choose(processed, len(request.answer) + len(tokens))

        draft = request.draft if segment.reading is None else Draft.EMPTY
        blocked = set(segment.blocked.nonzero()[:, 0].tolist()) if segment.num_drafts else set()
        return walk(draft, pick, blocked=blocked)

    def _accept(self, request: Request, tokens: Sequence[int]) -> tuple[Sequence[int], str | None]:
        """Tokens up to the one that ends the answer, and why it ends."""
        for num, token in enumerate(tokens, 1):
            request.answer.append(token)
            reason = request.accept(token, request)
            if reason is None and len(request.answer) >= request.max_new_tokens:
                reason = "length"
            if reason is not None:
                return tokens[:num], reason
        return tokens, None

    def _tell(
        self,
        request: Request,
        segment: Segment,
        tokens: Sequence[int],
        emitted: Sequence[int],
        reason: str | None,
    ) -> None:
        """The session and the drafter hear of the step, then the caller does."""
        session = request.session
        session.pending = [emitted[-1]]
        request.num_emitted = len(request.answer)
        request.last_token = time.perf_counter()
        if segment.reading is not None:
            session.prefill_lens = [len(kv) for kv in session.kv]
            for stash in session.stashes.values():
                stash.compact()
            request.first_token = request.last_token
        else:
            request.num_steps += 1
            request.num_reviving = session.num_revived - request.num_revived_seen
        request.num_revived_seen = session.num_revived
        if request.drafts is not None:
            request.drafts.extend(emitted)
            if segment.reading is None:
                request.drafts.feedback(request.proposed, tokens)
        for kept in (request.scores, request.logits):
            if kept is not None:
                del kept[len(request.answer) :]
        request.emit(emitted, reason)
        if reason is not None:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        request.session.in_use = False
        if request.drafts is not None:
            request.drafts.stop(remember=reason in ("stop", "length"))
            if self.row_cost is not None:
                self.row_cost.save()
        for queue in (self._running, self._waiting):
            if request in queue:
                queue.remove(request)
