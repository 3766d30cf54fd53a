"""Which requests run, and which rows each of them sends into the next pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from lazyahead.draft.budget import Step
from lazyahead.draft.config import Lookahead
from lazyahead.draft.learned_cost import LearnedRowCost
from lazyahead.draft.tree import Draft
from lazyahead.engine.checkpoint import Checkpoint
from lazyahead.engine.prefixes import PrefixSharing
from lazyahead.engine.request import Request
from lazyahead.hf.plain_runner import PlainRunner
from lazyahead.hf.runner import Runner
from lazyahead.hf.segment import KEEP_ALL, Policy, Segment
from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.policy import DecodePolicy, PrefillPolicy
from lazyahead.prefill.progress import chunk_len

_OLDEST_FIRST = 4
"""Of so many passes, one begins with the prompt that came first."""


class Scheduled(NamedTuple):
    """The rows of one request in the next pass."""

    request: Request
    segment: Segment
    checkpoint: Checkpoint
    is_prefill: bool
    has_last: bool = True
    """Whether the prompt's last token takes part: its logits give the first answer token."""
    continues: bool = False
    """Whether the rows are stashed tokens of a prompt that has entered before."""

    @property
    def decode_policy(self) -> DecodePolicy | None:
        """The policy of a decoding step that may revive tokens."""
        policy = self.segment.policy
        return policy if isinstance(policy, DecodePolicy) else None

    def entered_tokens(self, accepted: Sequence[int]) -> list[int]:
        """Tokens of this pass that the session then holds: all but drafts not `accepted`."""
        if self.continues:
            return []
        token_ids = self.segment.token_ids
        chain = len(token_ids) - self.segment.num_drafts
        return [*token_ids[:chain], *(token_ids[chain + node] for node in accepted)]


class Scheduler:
    """Admission, prefill chunks, and the draft budget.

    Beside running answers a prompt is computed in chunks of `prefill_chunk_size` rows, which
    bounds how long a pass can delay them; alone it is computed in one pass, or in chunks of
    `max_prefill_rows`, which bounds how long others wait to join. Requests that run may come to
    hold at most `max_running_tokens`, prompts and answers; others wait.
    """

    def __init__(
        self,
        runner: Runner | PlainRunner,
        decode: Lookahead | None,
        row_cost: LearnedRowCost | None,
        *,
        prefill_chunk_size: int,
        max_running: int,
        max_prefill_rows: int | None = None,
        max_running_tokens: int | None = None,
        prefixes: PrefixSharing | None = None,
    ) -> None:
        self._runner = runner
        self._prefixes = prefixes
        self._decode = decode
        self._row_cost = row_cost
        self._prefill_chunk_size = prefill_chunk_size
        self._max_prefill_rows = max_prefill_rows
        self._max_running_tokens = max_running_tokens
        self._num_prefills = 0
        self._max_running = max_running
        self.step: Step | None = None
        """What the drafts of the current pass are for; None: nothing is drafted."""
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or any(not request.is_paused for request in self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queues a request."""
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, running or queued."""
        if request in self._running:
            self._running.remove(request)
        if request in self._waiting:
            self._waiting.remove(request)

    def is_running(self, request: Request) -> bool:
        """Whether the request has been admitted and has not ended."""
        return request in self._running

    def schedule(self) -> list[Scheduled]:
        """Admits queued requests, then gives each running one its rows: a root and its drafts, or
        the next chunk of its prompt."""
        self._admit()
        decoding = [
            request
            for request in self._running
            if not request.is_prefilling and not request.is_paused
        ]
        chunks = self._prefill_chunks(has_company=bool(decoding))
        self._propose(decoding, sum(len(chunk.segment.token_ids) for chunk in chunks))
        return [self._decode_rows(request) for request in decoding] + chunks

    def _admit(self) -> None:
        room = self._max_running - sum(not request.is_paused for request in self._running)
        while self._waiting and room > 0 and self._fits(self._waiting[0]):
            room -= 1
            request = self._waiting.popleft()
            request.admitted = perf_counter()
            request.session.prompt_len = len(request.prompt)
            if self._prefixes is not None:
                self._prefixes.begin(request)
            self._running.append(request)

    def _fits(self, request: Request) -> bool:
        """Whether it may run beside those that do. A request that runs alone always may."""
        if self._max_running_tokens is None or not self._running:
            return True
        total = sum(running.max_tokens for running in self._running)
        return total + request.max_tokens <= self._max_running_tokens

    # --- decoding ---------------------------------------------------------------------------

    def _propose(self, decoding: Sequence[Request], num_prefill_rows: int) -> None:
        """Each request's draft, cut to the nodes that raise expected tokens per second."""
        decode = self._decode
        self.step = None
        if decode is None or not decoding:
            return
        other_rows = num_prefill_rows + sum(request.num_reviving for request in decoding)
        num_context = sum(len(request.session) for request in decoding) // len(decoding)
        if self._row_cost is not None:
            self.step = self._row_cost.step(len(decoding), other_rows, num_context)
        for request in decoding:
            request.proposed = self._proposal(request, decode, len(decoding))
            request.draft = request.proposed
        if self._row_cost is None or self.step is None:
            return
        if any(request.proposed.probs for request in decoding):
            probs = [request.proposed.probs for request in decoding]
            counts = self._row_cost.choose(probs, self.step)
            for request, count in zip(decoding, counts, strict=True):
                if request.proposed.probs:
                    request.draft = request.proposed.best(count)

    def _proposal(self, request: Request, decode: Lookahead, num_requests: int) -> Draft:
        room = request.max_new_tokens - len(request.answer) - 1
        if request.drafts is None or room <= 0:
            return Draft.EMPTY
        start = len(request.session)
        most = self._runner.max_drafts(num_requests)
        limit = decode.decoding_length if most is None else min(decode.decoding_length, most)
        if not self._runner.may_draft(start, start + min(room, limit)):
            return Draft.EMPTY
        steps = () if self.step is None else (self.step,)
        return request.drafts.propose(limit, *steps).within(room)

    def _decode_rows(self, request: Request) -> Scheduled:
        checkpoint = Checkpoint.take(request)
        session = request.session
        draft = request.draft
        device = self._runner.device
        ancestors = torch.from_numpy(draft.ancestors).to(device) if len(draft) else None
        token_ids = [*session.pending, *draft.token_ids]
        start = len(session)
        chain = range(start, start + len(session.pending))
        positions = [*chain, *(chain[-1] + depth for depth in draft.depths)]
        config = session.prefill
        policy: Policy = KEEP_ALL
        if config is not None and config.revive != "never" and session.num_stashed:
            policy = DecodePolicy(session, config, len(draft))
        segment = Segment(
            session.kv,
            token_ids,
            positions,
            range(len(token_ids)),
            device,
            ancestors=ancestors,
            owner=session,
            boundaries=session.boundaries,
            policy=policy,
            token_args=session.token_args if policy.needs_token_args else None,
        )
        return Scheduled(request, segment, checkpoint, is_prefill=False)

    # --- prefill ----------------------------------------------------------------------------

    def _prefill_chunks(self, has_company: bool) -> list[Scheduled]:
        """The next rows of prompts, those with the least left first; the oldest one now and then,
        so that it is never kept waiting by shorter ones for good."""
        limit = self._prefill_chunk_size if has_company else self._max_prefill_rows
        if self._runner.single_request_only:
            limit = None
        prompts = [
            request for request in self._running if request.is_prefilling and not request.is_paused
        ]
        self._num_prefills += 1
        if self._num_prefills % _OLDEST_FIRST:
            prompts.sort(key=lambda request: request.prefill.end - len(request.session))
        chunks = []
        for request in prompts:
            chunk = self._prefill_rows(request, limit)
            chunks.append(chunk)
            may_grow = chunk.has_last and request.session.num_stashed > 0
            if limit is None or chunk.continues or may_grow:
                break
            limit -= len(chunk.segment.token_ids)
            if limit <= 0:
                break
        return chunks

    def _prefill_rows(self, request: Request, limit: int | None) -> Scheduled:
        checkpoint = Checkpoint.take(request)
        session = request.session
        progress = request.prefill
        config = session.prefill
        continues = progress.stage is not None
        if continues:  # one placeholder row until the stage is reached
            token_ids: Sequence[int] = request.prompt[-1:]
            positions = range(progress.end - 1, progress.end)
        else:
            start = len(session)
            num_queries = max(1, config.scorer.window_size) if config is not None else 1
            num = chunk_len(progress.end - start, limit, num_queries)
            token_ids = request.prompt[start : start + num]
            positions = range(start, start + num)
        ends = positions[-1] == progress.end - 1 and not progress.is_open
        has_last = ends and not continues
        policy: Policy = KEEP_ALL
        if config is not None and _selects(request, config):
            policy = PrefillPolicy(session, config, progress, has_last=has_last, limit=limit)
        segment = Segment(
            session.kv,
            token_ids,
            positions,
            [len(token_ids) - 1] if has_last or continues else [],
            self._runner.device,
            owner=session,
            boundaries=session.boundaries,
            policy=policy,
            token_args=session.token_args if policy.needs_token_args else None,
        )
        return Scheduled(request, segment, checkpoint, True, has_last, continues)


def _selects(request: Request, config: LazyPrefill) -> bool:
    """Whether boundaries select tokens while this prompt is computed."""
    return request.prefill.prunes or (request.session.num_stashed > 0 and config.revive != "never")
