"""The loop: schedule -> run -> verify -> commit. Rows of all running requests share a pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from lazyahead.cache.prefix import PrefixCache
from lazyahead.cache.session import Session
from lazyahead.checks import check_count
from lazyahead.draft.config import Lookahead
from lazyahead.draft.drafter import Drafter, NoDrafter
from lazyahead.draft.learned_cost import LearnedRowCost
from lazyahead.draft.tree import Draft
from lazyahead.draft.verify import Walk, walk
from lazyahead.engine.prefixes import PrefixSharing
from lazyahead.engine.request import Request
from lazyahead.engine.row_cost import clock_of
from lazyahead.engine.scheduler import Scheduled, Scheduler
from lazyahead.errors import ConfigError, RequestError
from lazyahead.hf.plain_runner import PlainRunner
from lazyahead.hf.runner import Runner
from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.schedule import boundaries

OnLayer = Callable[[int], None]


class Verified(NamedTuple):
    """What one request's answer goes on with."""

    scheduled: Scheduled
    walk: Walk
    """Empty where this pass gave no answer token."""


class Accepted(NamedTuple):
    """Of a walk, the tokens that the answer takes, and why it ends with them."""

    scheduled: Scheduled
    walk: Walk
    emitted: Sequence[int]
    reason: str | None


class Sizes(NamedTuple):
    """How much an engine takes at once, and keeps."""

    prefill_chunk_size: int
    max_running: int
    max_prefill_rows: int | None
    max_running_tokens: int | None
    cache_bytes: int


class Engine:
    """Runs requests on one model, many at once. `submit`, then `step` until `is_idle`, inside
    `with engine:`.

    `row_cost` learns how many drafts pay; without it every draft is verified. Raises ConfigError
    for a chunk size or a number of requests below 1.
    """

    def __init__(
        self,
        runner: Runner | PlainRunner,
        prefill: LazyPrefill | None,
        decode: Lookahead | None,
        *,
        drafter: Drafter | None = None,
        row_cost: LearnedRowCost | None = None,
        prefill_chunk_size: int = 512,
        max_running: int = 64,
        max_prefill_rows: int | None = None,
        max_running_tokens: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        check_count("prefill_chunk_size", prefill_chunk_size, least=1)
        check_count("max_running", max_running, least=1)
        if max_prefill_rows is not None:
            check_count("max_prefill_rows", max_prefill_rows, least=1)
        if max_running_tokens is not None:
            check_count("max_running_tokens", max_running_tokens, least=1)
        self.runner = runner
        self.prefill = prefill
        self.decode = decode
        self.drafter = drafter or NoDrafter()
        self.row_cost = row_cost
        self.prefixes: PrefixSharing | None = None
        if prefix_cache is not None and isinstance(runner, Runner):
            self.prefixes = PrefixSharing(prefix_cache, runner)
        self._clock = clock_of(runner.model)
        self._scheduler = Scheduler(
            runner,
            decode,
            row_cost,
            prefill_chunk_size=prefill_chunk_size,
            max_running=max_running,
            max_prefill_rows=max_prefill_rows,
            max_running_tokens=max_running_tokens,
            prefixes=self.prefixes,
        )
        self._attached: list[AbstractContextManager[Any]] = []
        self.in_pass: tuple[Request, ...] = ()
        """The requests of the pass that runs. After one that failed, those that have not ended."""
        self.lock = threading.RLock()
        """Held during every step, and during a whole call of `answer`."""

    def with_sizes(self, sizes: Sizes) -> Engine:
        """An engine of other sizes for the same model and strategies. Where other processes run
        the model too, they then serve that one, and this one is over."""
        return self._another(
            self.runner,
            self.prefill,
            self.decode,
            drafter=self.drafter,
            row_cost=self.row_cost,
            prefill_chunk_size=sizes.prefill_chunk_size,
            max_running=sizes.max_running,
            max_prefill_rows=sizes.max_prefill_rows,
            max_running_tokens=sizes.max_running_tokens,
            prefix_cache=PrefixCache(sizes.cache_bytes) if sizes.cache_bytes else None,
        )

    def _another(self, *args: Any, **kwargs: Any) -> Engine:
        return Engine(*args, **kwargs)

    check_s: float | None = None
    """How often to `check` while nothing runs; None: there is nothing to check."""

    def check(self) -> None:
        """Raises RankError where another process that runs the model has ended."""

    def new_session(self) -> Session:
        """An empty session for this engine's model and prefill strategy."""
        return self.session_for(self.prefill)

    def session_for(self, prefill: LazyPrefill | None) -> Session:
        """An empty session whose prompts are read by another strategy than the engine's own.
        Sessions of different strategies share passes. Raises ConfigError where the model can only
        read whole."""
        if prefill is None:
            return Session(self.runner.num_layers)
        if not self.runner.num_layers:
            raise ConfigError("this model keeps a state of its own and reads prompts whole")
        needs_attention = prefill.scorer.window_size > 0
        placed = boundaries(prefill.schedule, self.runner.attends_fully, needs_attention)
        return Session(self.runner.num_layers, placed, prefill)

    def __enter__(self) -> Engine:
        context = self.runner.attached()
        context.__enter__()
        self._attached.append(context)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._attached.pop().__exit__(*exc)
        self.in_pass = ()  # so that ended requests can be freed

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    @property
    def has_work(self) -> bool:
        """Whether a step would run anything: not all requests are paused."""
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def submit(self, request: Request) -> None:
        """Queues a request; it joins between two steps."""
        with self.lock:
            request.session.in_use = True
            self._scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Takes a request out between two steps. Its answer so far stays in the session; a prompt
        computed in part is dropped."""
        with self.lock:
            if request.finish_reason is not None:
                return
            if request.is_prefilling and self._scheduler.is_running(request):
                session = request.session
                pending = session.pending
                session.crop(request.prefill.start)
                session.pending = pending
            self._finish(request, "cancelled")

    def answer(self, requests: Sequence[Request]) -> None:
        """Submits these and steps until all have ended. An exception cancels those that have not.
        Calls from other threads wait until this one has ended."""
        with self.lock, self:
            try:
                for request in requests:
                    self.submit(request)
                while any(request.finish_reason is None for request in requests):
                    self.step()
            finally:
                for request in requests:
                    self.cancel(request)

    def read_ahead(self, token_ids: Sequence[int]) -> Session:
        """Computes the beginning of later prompts up to the first boundary, and keeps it in the
        prefix cache where there is one. Raises RequestError where the model keeps a state of its
        own."""
        session = self.new_session()
        if not session.num_layers:
            raise RequestError("this model keeps a state of its own, which no prompts can share")
        self.answer([Request.opening(token_ids, session)])
        return session

    def add_prefix(self, session: Session, namespace: str | None = None) -> None:
        """Puts a session of `read_ahead` into the prefix cache. Raises RequestError where there is
        no cache, or where the session is another."""
        if self.prefixes is None:
            raise RequestError("there is no prefix cache; give prefix_cache_bytes")
        with self.lock:
            self.prefixes.add(session, namespace)

    def step(self, on_layer: OnLayer | None = None) -> None:
        """One pass for all running requests. Where it fails, everything is as before it."""
        with self.lock:
            self._step(on_layer)

    def _step(self, on_layer: OnLayer | None) -> None:
        self.in_pass = ()
        batch = self._scheduler.schedule()
        self.in_pass = tuple(scheduled.request for scheduled in batch)
        begin = self._clock()
        try:
            logits = self._run(batch, on_layer)
            verified = self._verify(batch, logits)
            self._note_cost(verified, self._clock() - begin)
            self._commit(self._accept(verified))
        except BaseException:
            for scheduled in batch:
                scheduled.checkpoint.restore()
            raise
        self.in_pass = ()

    # --- the phases -------------------------------------------------------------------------

    def _run(self, batch: Sequence[Scheduled], on_layer: OnLayer | None) -> list[Tensor | None]:
        """Logits (R, V) of each segment's rows that need them; None where none do."""
        together = [[scheduled.segment for scheduled in batch]] if batch else []
        alone = [[scheduled.segment] for scheduled in batch]
        parts: list[Tensor | None] = []
        for group in alone if self.runner.single_request_only else together:
            logits = self.runner.run(group, on_layer)
            start = 0
            for segment in group:
                num = len(segment.logits_indices) if logits.numel() else 0
                parts.append(logits[start : start + num] if num else None)
                start += num
        return parts

    def _verify(
        self, batch: Sequence[Scheduled], logits: Sequence[Tensor | None]
    ) -> list[Verified]:
        """What each request's answer goes on with: tokens, and the draft nodes that hold them."""
        verified = []
        for scheduled, rows in zip(batch, logits, strict=True):
            if scheduled.is_prefill:
                self._advance_prefill(scheduled)
            found = Walk([], [])
            if rows is not None and not scheduled.request.is_prefilling:
                found = self._walk(scheduled, rows)
            verified.append(Verified(scheduled, found))
        return verified

    def _accept(self, verified: Sequence[Verified]) -> list[Accepted]:
        """An answer ends at the very token that ends it."""
        return [
            Accepted(*item, *self._up_to_end(item.scheduled.request, item.walk.tokens))
            for item in verified
        ]

    def _commit(self, batch: Sequence[Accepted]) -> None:
        """Accepted rows stay in place, the rest is dropped."""
        for scheduled, (tokens, nodes), emitted, reason in batch:
            request = scheduled.request
            accepted = nodes[: max(0, len(emitted) - 1)]
            num_drafts = scheduled.segment.num_drafts
            request.session.commit(scheduled.entered_tokens(accepted), num_drafts, accepted)
            if emitted:
                request.sources = request.draft.sources_of(nodes, len(emitted))
                self._publish(scheduled, tokens, emitted, reason)
            elif request.prefill.is_open and request.prefill.is_done:
                self._share(request)
                self._finish(request, "stop")

    # --- their parts ------------------------------------------------------------------------

    def _advance_prefill(self, scheduled: Scheduled) -> None:
        """Notes how far the prompt has come by this pass."""
        progress = scheduled.request.prefill
        num_entered = len(scheduled.request.session) + len(scheduled.segment.token_ids)
        progress.num_entered = min(progress.end, num_entered) - progress.start
        has_last = scheduled.has_last or scheduled.continues
        if progress.is_open:
            has_last = progress.num_entered == progress.end - progress.start
        progress.is_done = has_last and progress.stage is None

    def _note_cost(self, verified: Sequence[Verified], seconds: float) -> None:
        """Passes in which all requests decode tell what rows cost."""
        step = self._scheduler.step
        if self.row_cost is None or step is None or not verified:
            return
        if any(item.scheduled.is_prefill for item in verified):
            return
        num_rows = sum(len(item.scheduled.segment.token_ids) for item in verified)
        num_tokens = sum(len(item.walk.tokens) for item in verified)
        self.row_cost.note(step, num_rows + step.other_rows, num_tokens, seconds)

    def _walk(self, scheduled: Scheduled, rows: Tensor) -> Walk:
        """Follows the model's own choices through the draft."""
        request = scheduled.request
        if request.drafts is None and self.decode is not None and request.may_draft:
            namespace = request.namespace or self.decode.namespace
            request.drafts = self.drafter.start(request.prompt, namespace)
        picker = request.picker
        is_greedy = picker.is_plain and request.scores is None and request.logits is None
        likeliest = rows.argmax(-1).tolist() if is_greedy else None

        def pick(node: int, tokens: Sequence[int]) -> int:
            if likeliest is not None:
                return int(likeliest[node + 1])
            raw = rows[node + 1]
            processed = picker.process(raw, request.prefix(tokens))
            if request.scores is not None:
                request.scores.append(processed)
            if request.logits is not None:
                request.logits.append(raw.float())
            return picker.choose(processed, len(request.answer) + len(tokens))

        policy = scheduled.decode_policy
        draft = Draft.EMPTY if scheduled.is_prefill else request.draft
        blocked = set[int]()
        if policy is not None and len(draft):
            blocked = set(policy.blocked.nonzero()[:, 0].tolist())
        return walk(draft, pick, blocked=blocked)

    def _up_to_end(
        self, request: Request, tokens: Sequence[int]
    ) -> tuple[Sequence[int], str | None]:
        """Tokens up to the one that ends the answer, and why it ends."""
        for num, token in enumerate(tokens, 1):
            request.answer.append(token)
            reason = request.accept(token, request)
            if reason is None and len(request.answer) >= request.max_new_tokens:
                reason = "length"
            if reason is not None:
                return tokens[:num], reason
        return tokens, None

    def _publish(
        self,
        scheduled: Scheduled,
        tokens: Sequence[int],
        emitted: Sequence[int],
        reason: str | None,
    ) -> None:
        """Updates session and drafter after a committed step, then calls `emit`."""
        request = scheduled.request
        session = request.session
        session.pending = [emitted[-1]]
        request.num_emitted = len(request.answer)
        request.last_token = time.perf_counter()
        if scheduled.is_prefill:
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
            if not scheduled.is_prefill:
                request.drafts.feedback(request.proposed, tokens)
        request.trim_logits()
        request.emit(emitted, reason)
        if scheduled.is_prefill:
            self._share(request)
        if reason is not None:
            self._finish(request, reason)

    def _share(self, request: Request) -> None:
        if self.prefixes is not None:
            self.prefixes.keep(request)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        request.session.in_use = False
        self.in_pass = tuple(other for other in self.in_pass if other is not request)
        if request.drafts is not None:
            request.drafts.stop(remember=reason in ("stop", "length"))
            if self.row_cost is not None:
                self.row_cost.save()
        self._scheduler.remove(request)
