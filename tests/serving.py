"""Servers in a thread, with a tiny random model, for tests of what goes over HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import families
import httpx
import tiny as disk
from support import LAZY

from lazyahead import LLM, Lookahead, Sampling
from lazyahead.answer import Answer, Setting
from lazyahead.config import LazyPrefill
from lazyahead.engine.engine import Engine
from lazyahead.engine.worker import Worker
from lazyahead.server.app import create_app
from lazyahead.server.run import Server, bind
from lazyahead.server.settings import Settings
from lazyahead.text.prompt import Prompt


def tiny_llm(prefill: LazyPrefill | None = LAZY, **options: Any) -> LLM:
    """A tiny model that takes text."""
    tokenizer = disk.chatty(disk.byte_level())
    model = families.build("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    options = {"decode": Lookahead(), **options}
    llm = LLM(model, tokenizer=tokenizer, prefill=prefill, **options)
    llm.engine.row_cost = None  # every draft is verified, however busy the machine
    return llm


def answer_of(
    llm: LLM, engine: Engine, ids: list[int], sampling: Sampling, **manner: Any
) -> Answer:
    """An answer that no engine has heard of."""
    setting = Setting(llm.model, llm.tokenizer, llm.eos_ids, llm.max_context)
    session = engine.session_for(manner.get("prefill", llm.prefill))
    return Answer(setting, Prompt(ids), sampling, session)


def engine_of(llm: LLM, max_running: int = 16) -> Engine:
    """An engine of one's own beside the LLM's."""
    own = llm.engine
    return Engine(
        own.runner,
        own.prefill,
        own.decode,
        drafter=own.drafter,
        row_cost=own.row_cost,
        max_running=max_running,
    )


class Running:
    """A server that takes requests."""

    def __init__(
        self, llm: LLM, settings: Settings, drafts: bool = True, buffer: int | None = None
    ) -> None:
        """`buffer`: bytes that the system keeps for a reader."""
        self.llm = llm
        self._buffer = buffer
        self.app = create_app(llm, settings, drafts=drafts)
        self.service = self.app.state.service
        self.port = 0
        self.exit_code: int | None = None
        self._started = threading.Event()
        self.server = Server(self.app, self._note)
        self._thread = threading.Thread(target=self._main)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def worker(self) -> Worker:
        return self.service.worker

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def until_idle(self) -> None:
        """Waits until nothing is left of any request."""
        wait_for(lambda: not self.service.running and self.service.engine.is_idle)
        wait_for(lambda: self.service.admission.num_taken == 0 and not self.worker._jobs)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(60)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _note(self, port: int) -> None:
        self.port = port
        self._started.set()

    def _main(self) -> None:
        bound = bind("127.0.0.1", 0)
        if self._buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer)
        asyncio.run(self.server.serve(sockets=[bound]))
        self.exit_code = self.server.exit_code


@contextmanager
def serving(
    llm: LLM | None = None, drafts: bool = True, buffer: int | None = None, **settings: Any
) -> Iterator[Running]:
    """A server, for as long as the block runs."""
    running = Running(llm or tiny_llm(), Settings(**settings), drafts, buffer)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def wait_for(is_so: Callable[[], bool], most_s: float = 60) -> None:
    """Returns once it is so; fails where it never is."""
    end = monotonic() + most_s
    while not is_so():
        assert monotonic() < end, "it never came to be"
        sleep(0.005)
