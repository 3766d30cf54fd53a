"""What all endpoints share: the model, its worker, and how a prompt becomes running answers."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from starlette.requests import Request as HTTPRequest

from lazyahead.answer import Answer, Setting, check, resume
from lazyahead.cache.session import Session
from lazyahead.config import PRESETS, LazyPrefill
from lazyahead.documents import DocumentStore
from lazyahead.engine.engine import Sizes
from lazyahead.engine.worker import Worker
from lazyahead.hf.plain_tensors import plain_tensors
from lazyahead.llm import LLM
from lazyahead.sampling import Sampling
from lazyahead.server.admission import Admission
from lazyahead.server.answers import Answers
from lazyahead.server.errors import ApiError, shutting_down
from lazyahead.server.metrics import Metrics
from lazyahead.server.schema import Extension
from lazyahead.server.settings import Settings
from lazyahead.server.store import ResponseStore
from lazyahead.server.watch import Watch
from lazyahead.text.prompt import Prompt

T = TypeVar("T")
_log = logging.getLogger(__name__)
SERVERS_OWN = "default"
READER_NAMES = ("built-in reader", "")


@dataclass(frozen=True)
class Manner:
    """How one request is read and drafted."""

    prefill: LazyPrefill | None
    may_draft: bool
    namespace: str
    detail: bool = False
    may_share: bool = True


class Service:
    """One model behind one worker."""

    def __init__(self, llm: LLM, settings: Settings, *, drafts: bool = True) -> None:
        """`drafts`: whether requests are drafted that do not say."""
        self.llm = llm
        self.replica = ""
        """Its name among others; what it keeps carries it, so that a router finds it again."""
        self.settings = settings
        self.drafts = drafts and llm.engine.decode is not None
        self.model_name = settings.model_name or _short(llm.name)
        self.started = int(time.time())
        self.engine = llm.engine.with_sizes(
            Sizes(
                settings.prefill_chunk_size,
                settings.max_running,
                settings.max_prefill_rows,
                settings.max_running_tokens or _tokens_that_fit(llm.shortest_session()),
                settings.cache_bytes,
            )
        )
        self.documents: DocumentStore | None = None
        if settings.documents is not None:
            self.documents = DocumentStore(llm, settings.documents)
        self.worker = Worker(self.engine, on_death=self._die)
        self.on_death: Callable[[], object] = lambda: None
        """Called in the worker's thread, should it fail."""
        self.admission = Admission(settings.max_running + settings.max_queue)
        self.metrics = Metrics(
            self.model_name, lambda: self.worker.num_running, lambda: self.worker.num_waiting
        )
        self.pdf_places = asyncio.Semaphore(settings.max_pdfs)
        self.is_draining = False
        """No request that generates is taken any more."""
        self.is_stopping = False
        """Answers that still run end."""
        self.running: set[Answers] = set()
        self.responses = ResponseStore(settings.response_ttl_s, settings.response_cache_bytes)
        self._setting = Setting(llm.model, llm.tokenizer, llm.eos_ids, llm.max_context)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="lazyahead-text")
        self._namespaces: set[str] = set()

    def _die(self, _: BaseException) -> None:
        self.on_death()

    # --- its life ---------------------------------------------------------------------------

    def start(self) -> None:
        """Runs the worker, and one pass, so that the first request finds everything in place."""
        self.worker.start()
        session = self.engine.new_session()
        sampling = Sampling(max_new_tokens=1, ignore_eos=True)
        answer = Answer(self._setting, Prompt([0, 0]), sampling, session)
        answer.request.may_draft = False
        for _ in self.worker.submit(answer):
            pass
        if self.documents is not None:
            self._load_documents(self.documents)

    def _load_documents(self, store: DocumentStore) -> None:
        """Those that are for everybody, as many as the cache holds."""
        assert self.engine.prefixes is not None
        cache = self.engine.prefixes.cache
        for path, session in store.everybodys():
            if isinstance(session, Exception):
                _log.warning("%s", session)
                continue
            if cache.nbytes + session.nbytes > cache.max_bytes:
                _log.warning("%s and later ones do not fit into --cache-bytes", path.name)
                break
            self.engine.add_prefix(session)

    def stop(self) -> None:
        self.is_draining = self.is_stopping = True
        self.worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def end_answers(self) -> None:
        """Ends what still runs, each stream with an event that says so."""
        self.is_draining = self.is_stopping = True
        for answers in list(self.running):
            answers.cancel()

    @property
    def is_reader(self) -> bool:
        """Whether the model is the built-in one."""
        return self.llm.name in READER_NAMES

    # --- from a request to its answers ------------------------------------------------------

    async def in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes long, tokenising above all, beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, call, *arguments)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one that is served."""
        if name not in (None, self.model_name):
            raise ApiError(
                404,
                f"there is no model {name!r} here; it is called {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def manner(self, asked: Extension, tenant: str) -> Manner:
        """Raises ApiError for what there is none of."""
        prefill = self.llm.prefill
        if asked.prefill is not None:
            prefill = self._prefill(asked.prefill)
        if asked.decode == "lookahead" and self.engine.decode is None:
            raise ApiError(
                400,
                "this server was started without drafting; leave 'decode' out",
                param="lazyahead.decode",
            )
        may_draft = self.drafts if asked.decode is None else asked.decode == "lookahead"
        namespace = self._namespace(asked.namespace, tenant)
        return Manner(prefill, may_draft, namespace, asked.detail, asked.cache)

    def _prefill(self, name: str) -> LazyPrefill | None:
        if name == "off":
            return None
        if name not in PRESETS:
            raise ApiError(
                400,
                f"no preset is called {name!r}; there are off, {', '.join(PRESETS)}",
                param="lazyahead.prefill",
            )
        if self.llm.support.level != "full":
            raise ApiError(400, "this model can only read prompts whole", param="lazyahead.prefill")
        return PRESETS[name]

    def _namespace(self, name: str | None, tenant: str) -> str:
        """The namespace of this tenant, or the shared one, that is called so."""
        if name in self.settings.shared_namespaces:
            return f"shared/{name}"
        full = f"{tenant}/{name or SERVERS_OWN}"
        if full not in self._namespaces:
            if len(self._namespaces) >= self.settings.max_namespaces:
                raise ApiError(
                    429,
                    f"there are {len(self._namespaces)} namespaces already, as many as this "
                    "server keeps; use one of yours, or none",
                    param="lazyahead.namespace",
                )
            self._namespaces.add(full)
        return full

    def check_counts(self, n: int, stops: Sequence[str], num_biases: int) -> None:
        """Raises ApiError for more than the operator allows."""
        limits = self.settings
        for param, num, most in (
            ("n", n, limits.max_n),
            ("stop", len(stops), limits.max_stops),
            ("logit_bias", num_biases, limits.max_logit_bias),
        ):
            if num > most:
                raise ApiError(400, f"{param!r} may be at most {most} here, got {num}", param=param)
        if any(len(stop) > 1000 for stop in stops):
            raise ApiError(400, "a stop text is longer than 1000 characters", param="stop")

    def check_chars(self, num: int) -> None:
        """Raises ApiError for a prompt that is too long to be tokenised."""
        most = self.settings.max_prompt_chars
        if num > most:
            raise ApiError(
                400,
                f"the prompt has {num} characters, more than the {most} that this server takes",
                code="context_length_exceeded",
            )

    def num_tokens(self, asked: int | None, prompt: Prompt, param: str = "max_tokens") -> int:
        """The longest answer: as asked for, else what the context leaves, up to the limit."""
        most = self.settings.max_tokens
        if asked is None:
            return max(1, min(most, self.llm.max_context - len(prompt.token_ids)))
        if asked > most:
            raise ApiError(400, f"{param!r} may be at most {most} here, got {asked}", param=param)
        return asked

    def check_length(self, prompt: Prompt) -> None:
        """Raises ContextLengthError for a prompt that leaves no room for an answer."""
        check(self._setting, prompt, Sampling(max_new_tokens=1))

    async def ask(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int,
        manner: Manner,
        *,
        num_top: int | None = None,
        session: Session | None = None,
    ) -> Answers:
        """Begins `n` answers to each prompt. The caller iterates over what is returned and closes
        it. Raises ApiError, RequestError, before any of them runs."""
        for prompt in prompts:
            check(self._setting, prompt, sampling)
        pairs = [(prompt, own) for prompt in prompts for own in sampling.several(n)]
        if self.is_stopping:
            raise shutting_down()
        if session is None:
            sessions = [self.engine.session_for(manner.prefill) for _ in pairs]
        else:
            sessions = [session]
        more = len(pairs) - 1
        self.admission.enter(more)
        try:
            made = await self.in_thread(self._make, pairs, sessions, manner)
            watches = [Watch(answer.request, num_top, manner.detail) for answer in made]
            jobs = [
                self.worker.submit(answer, watch)
                for answer, watch in zip(made, watches, strict=True)
            ]
        except BaseException:
            self.admission.leave(more)
            raise
        answers = Answers(self, jobs, watches, more)
        self.running.add(answers)
        for prompt, _ in pairs:
            self.metrics.started(len(prompt.token_ids))
        return answers

    def _make(
        self,
        pairs: Sequence[tuple[Prompt, Sampling]],
        sessions: Sequence[Session],
        manner: Manner,
    ) -> list[Answer]:
        with plain_tensors():
            made = []
            for (prompt, sampling), session in zip(pairs, sessions, strict=True):
                if len(session):
                    resume(session, prompt.token_ids, self.llm.support)
                answer = Answer(self._setting, prompt, sampling, session)
                answer.request.may_draft = manner.may_draft
                answer.request.namespace = manner.namespace
                answer.request.may_share = manner.may_share
                made.append(answer)
        return made


def _tokens_that_fit(session: Session) -> int | None:
    """Tokens whose keys and values fit into half of the memory that is free. `session` is one of
    this model's; None where the model keeps a state of its own."""
    parts = [part for kv in session.kv for part in (kv.keys, kv.values)]
    if not parts:
        return None
    token_bytes = sum(part.nbytes // part.shape[2] for part in parts)
    device = parts[0].device
    free = int(psutil.virtual_memory().available)
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    return max(1, free // 2 // token_bytes)


def tenant_of(request: HTTPRequest) -> str:
    """Who asks: one name for each API key, and one for all where none is asked for."""
    return str(request.state.tenant)


def tenant_name(key: str | None) -> str:
    return "anyone" if key is None else hashlib.sha256(key.encode()).hexdigest()[:16]


def _short(name: str) -> str:
    """The last part of a path; what is none stays."""
    if name in READER_NAMES:
        return "lazyahead-reader"
    return Path(name).name if Path(name).exists() else name
