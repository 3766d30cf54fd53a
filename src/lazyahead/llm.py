"""A model, ready to answer: text in, pieces of text with their measurements out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from lazyahead.answer import Answer, Setting, check, resume, shortest_session
from lazyahead.build import engine_for
from lazyahead.cache.prefix import PrefixCache
from lazyahead.cache.session import Session
from lazyahead.cache.session_file import load_session, save_session
from lazyahead.checks import check_count
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.engine.engine import Engine
from lazyahead.errors import RequestError, SessionFileError
from lazyahead.hf.load import adopt, eos_ids, load, load_tokenizer, max_context
from lazyahead.hf.plain_tensors import plain_tensors
from lazyahead.hf.probe import probe
from lazyahead.hf.unwrap import unwrap
from lazyahead.inputs import Text, as_decode, as_prefill, as_prompts, naming
from lazyahead.parallel.group import Group
from lazyahead.parallel.start import lead
from lazyahead.reader import reader_path
from lazyahead.results import Completion, Piece, Reach
from lazyahead.sampling import Sampling
from lazyahead.stream import Cancelled, Stream
from lazyahead.text.messages import Message, check_text, read_messages
from lazyahead.text.prompt import (
    Prompt,
    check_length,
    encode_beginning,
    encode_next,
    encode_prompt,
    encode_turn,
)


class LLM:
    """A model with its tokenizer, its engine and its two strategies.

    `model` is a folder, a hub name, or a loaded model, also inside `torch.compile` or PEFT's
    adapters (then give its `tokenizer`, or pass prompts as token ids); None is the built-in reader.
    `dtype` is that of the weights, `"auto"` as they were saved; `"int8"` is for a CPU: bfloat16,
    with linear layers in 8-bit integers beside the plain ones, sooner and not quite the same.
    `prefill` and `decode` are the two strategies, as configs or by name (`"balanced"`,
    `"lookahead"`, `"off"`); None is plain. `decode` may also be a drafter of your own. `packed`
    lets linear layers on the CPU use weights packed for it, beside the plain ones: None does so
    where twice their bytes are free, unless the environment says LAZYAHEAD_PACKED=0. With
    `prefix_cache_bytes`, prompts share what they begin with, which is then computed once; answers
    stay the same. `tp` shares the model out to so many processes, one a GPU, or several on a CPU,
    each with a prefix cache of that size; `close` ends them. Raises ModelError when the model
    cannot be loaded or does not support what was asked.
    """

    def __init__(
        self,
        model: str | Path | nn.Module | None = None,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        prefill: LazyPrefill | str | None = LazyPrefill(),  # noqa: B008 (frozen)
        decode: Lookahead | Drafter | str | None = None,
        prefill_chunk_size: int = 512,
        packed: bool | None = None,
        prefix_cache_bytes: int = 0,
        tp: int | Group = 1,
    ) -> None:
        check_count("prefix_cache_bytes", prefix_cache_bytes)
        self.prefill, self.decode = as_prefill(prefill), as_decode(decode)
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(str(tokenizer))
        if model is None or isinstance(model, str | Path):
            self.name = "built-in reader" if model is None else str(model)
            model = str(reader_path() if model is None else model)
        else:
            self.name = str(unwrap(model).config.name_or_path or "model")
        sizes = (prefill_chunk_size, packed, prefix_cache_bytes)
        self._lead = lead(tp, model)
        if self._lead is None:
            self._load(model, tokenizer, dtype, device, *sizes, Engine)
        else:
            assert isinstance(model, str)
            options = (self.prefill, self.decode, *sizes)
            with self._lead.loading(model, str(dtype), device, *options) as make:
                self._load(model, tokenizer, dtype, device, *sizes, make)
        self.max_context = max_context(self.model)
        self.eos_ids = eos_ids(self.model, self.tokenizer)
        self._setting = Setting(
            self.model,
            self.tokenizer,
            self.eos_ids,
            self.max_context,
        )
        self._sample: Session | None = None

    def _load(
        self,
        model: str | nn.Module,
        tokenizer: Any,
        dtype: str | torch.dtype,
        device: str,
        prefill_chunk_size: int,
        packed: bool | None,
        prefix_cache_bytes: int,
        make: Callable[..., Engine],
    ) -> None:
        """Sets the model, its tokenizer, what it supports and its engine."""
        if isinstance(model, str):
            num_ranks = 1 if self._lead is None else self._lead.group.size
            self.model, loaded = load(model, dtype, device, num_ranks)
            self.tokenizer = tokenizer or loaded
        else:
            self.model, self.tokenizer = unwrap(model), tokenizer
            adopt(self.model, dtype, device)
        with plain_tensors():
            self.support = probe(self.model)
            cache = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
            options = (self.prefill, self.decode, prefill_chunk_size, packed, cache, make)
            self.engine = engine_for(self.model, self.tokenizer, *options)

    def close(self) -> None:
        """Ends the other processes of tensor parallelism; without them there is nothing to end."""
        if self._lead is not None:
            with self.engine.lock:
                self._lead.close()

    def encode(self, prompt: str, question: str | None = None) -> Prompt:
        """Text to tokens through the chat template. Raises RequestError when there is no text, or
        none that can be encoded, ContextLengthError when it is far too long."""
        tokenizer = self._tokenizer()
        check_length(tokenizer, check_text(prompt or "", "the prompt"), self.max_context)
        return encode_prompt(tokenizer, prompt, question)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise RequestError(
                "this model was given without a tokenizer; pass token ids, or tokenizer=..."
            )
        return self.tokenizer

    def session(self) -> Session:
        """A new conversation. Requests on it share what they have in common."""
        return self.engine.new_session()

    def save_session(self, session: Session, path: str | Path) -> None:
        """Writes a session to a safetensors file that `load_session` takes. Raises
        SessionFileError."""
        self.check_whole()
        if len(session) and not session.in_use:
            with self.engine.lock, plain_tensors():
                session.shape_like(self.shortest_session())
        save_session(session, path, self.model, self.prefill)

    def load_session(self, path: str | Path) -> Session:
        """Reads a session back. Raises SessionFileError for a damaged file or one of another model
        or config."""
        self.check_whole()
        with plain_tensors():
            empty = self.engine.new_session()
            return load_session(path, self.model, self.prefill, empty, self.shortest_session)

    def read_ahead(self, document: str | list[int]) -> Session:
        """Computes what prompts that begin with a document have in common, before any question,
        and keeps it in the prefix cache where there is one.

        The session it returns is for `save_session`, and after `load_session` for `add_prefix`.
        Raises RequestError, ContextLengthError.
        """
        token_ids = self.beginning(document)
        with self.engine.lock, plain_tensors():
            return self.engine.read_ahead(token_ids)

    def add_prefix(self, session: Session) -> None:
        """Puts what `read_ahead` gave into the prefix cache. Raises RequestError where there is
        none, or where the session is another."""
        with self.engine.lock, plain_tensors():
            self.engine.add_prefix(session)

    def beginning(self, document: str | list[int]) -> list[int]:
        """The tokens of a document that do not depend on the question behind it."""
        prompt = self._encode(document, None)
        check(self._setting, prompt, Sampling(max_new_tokens=1))
        if not isinstance(document, str):
            return prompt.token_ids
        return encode_beginning(self._tokenizer(), document)

    def check_whole(self) -> None:
        """Raises SessionFileError where sessions have no files."""
        if self._lead is not None:
            raise SessionFileError(
                f"under tp={self._lead.group.size} each rank holds a share of a session, so it "
                "has no file; load the model without tp for that"
            )

    def shortest_session(self) -> Session:
        """A session of two tokens, for what its states look like."""
        if self._sample is None:
            with self.engine.lock, plain_tensors():
                self._sample = shortest_session(self.engine)
        return self._sample

    def reach(self, session: Session) -> Reach:
        """How deep each prompt token of a session got."""
        return session.reach()

    def stream(
        self,
        prompt: Text,
        question: str | None = None,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        session: Session | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Stream:
        """Answers piece by piece, one piece per step. Leaving the stream early, or its `cancel`
        from any thread, ends the answer.

        `prompt` is a text, token ids, or what the tokenizer made of one. With a `session`, what the
        prompt shares with it from the start is not read again. `on_progress` hears the fraction of
        the prompt that has been read. Raises RequestError, ContextLengthError.
        """
        read = self._encode(prompt, question)
        return Stream(
            lambda is_cancelled: self._stream(read, sampling, session, on_progress, is_cancelled)
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        session: Session | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Stream:
        """Answers the last of `messages`, all of which count, as `stream`.

        A message has a `role` and a `content`: a text, a list of text parts, or None. What a
        `session` has read or written of them is not read again.
        """
        read, tokenizer = read_messages(messages), self._tokenizer()
        whole = "".join(message["content"] for message in read)
        check_length(tokenizer, whole, self.max_context)
        previous = session.history if session is not None else []
        turn = encode_turn(tokenizer, read, previous)
        return Stream(
            lambda is_cancelled: self._stream(turn, sampling, session, on_progress, is_cancelled)
        )

    def next_turn(
        self,
        content: str,
        *,
        session: Session,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        on_progress: Callable[[float], None] | None = None,
    ) -> Stream:
        """Answers `content` as the user's next message to whatever the session holds, as `stream`:
        for sessions whose messages are not at hand."""
        check_text(content, "the message")
        turn = encode_next(self._tokenizer(), content, session.history)
        return Stream(
            lambda is_cancelled: self._stream(turn, sampling, session, on_progress, is_cancelled)
        )

    @overload
    def generate(
        self,
        prompts: str | list[int],
        question: str | None = None,
        *,
        sampling: Sampling = ...,
        session: Session | None = None,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        question: str | None = None,
        *,
        sampling: Sampling = ...,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Any,
        question: str | None = None,
        *,
        sampling: Sampling = ...,
        session: Session | None = None,
        n: int = ...,
    ) -> Any: ...

    def generate(
        self,
        prompts: Any,
        question: str | None = None,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        session: Session | None = None,
        n: int = 1,
    ) -> Any:
        """One prompt to its Completion, or several at once to theirs, in order. Raises as `stream`.

        A prompt is a text or a list of token ids; what a tokenizer gives back for one or several
        counts as token ids. With `n` above 1, a list of so many answers to the one prompt, the
        seeds counted up from the sampling's.
        """
        prompts = "" if prompts is None and question else prompts
        texts, is_one = as_prompts(prompts, may_be_empty=bool(question))
        check_count("n", n, least=1)
        if n > 1 and (not is_one or session is not None):
            raise RequestError(f"n={n} answers are of one prompt without a session")
        if is_one and n == 1:
            stream = self.stream(texts[0], question, sampling=sampling, session=session)
            return Completion.fold(list(stream))
        if session is not None:
            raise RequestError(
                "a session is one conversation; give each of several prompts its own call"
            )
        asked: list[tuple[Prompt, Sampling]] = []
        for place, text in enumerate(texts):
            with naming(f"prompt {place}", is_one):
                prompt = self._encode(text, question)
                check(self._setting, prompt, sampling)
            asked += [(prompt, own) for own in sampling.several(n)]
        return self._together(asked)

    def _together(self, asked: Sequence[tuple[Prompt, Sampling]]) -> list[Completion]:
        """Answers in common passes."""
        with self.engine.lock, plain_tensors():
            answers = [self._begin(prompt, sampling, None) for prompt, sampling in asked]
            try:
                self.engine.answer([answer.request for answer in answers])
            finally:
                for answer in answers:
                    answer.end()
        return [Completion.fold(list(answer.pieces)) for answer in answers]

    def _encode(self, prompt: Any, question: str | None) -> Prompt:
        if isinstance(prompt, str):
            return self.encode(prompt, question)
        if isinstance(prompt, Prompt):
            if question is not None:
                raise RequestError("a question goes with a text; a Prompt holds its own")
            return prompt
        if prompt is None and question:
            return self.encode("", question)
        (ids, *others), _ = as_prompts(prompt)
        if isinstance(ids, Prompt):
            return ids
        if others:
            raise RequestError("a stream answers one prompt; give several to `generate`")
        if isinstance(ids, str):
            return self.encode(ids, question)
        if question is not None:
            raise RequestError(
                "a question goes with a text; with token ids, put its tokens at their end"
            )
        return Prompt(ids)

    def _begin(self, prompt: Prompt, sampling: Sampling, session: Session | None) -> Answer:
        """An answer that the engine has not heard of yet."""
        check(self._setting, prompt, sampling)
        if session is None:
            session = self.session()
        else:
            resume(session, prompt.token_ids, self.support)
        return Answer(self._setting, prompt, sampling, session)

    def _stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        session: Session | None,
        on_progress: Callable[[float], None] | None,
        is_cancelled: threading.Event,
    ) -> Generator[Piece]:
        with self.engine.lock, plain_tensors():
            answer = self._begin(prompt, sampling, session)
            self.engine.submit(answer.request)
        tell = None
        if on_progress is not None:
            tell = answer.progress(on_progress, self.support.num_layers)

        def on_layer(layer: int) -> None:
            if is_cancelled.is_set():
                raise Cancelled
            if tell is not None:
                tell(layer)

        is_finalizing = sys.is_finalizing  # when Python ends, modules are gone
        try:
            with self.engine, suppress(Cancelled):
                while not answer.is_over:
                    with self.engine.lock, plain_tensors():
                        if not answer.pieces:
                            self.engine.step(on_layer)
                    while answer.pieces:
                        yield answer.pieces.popleft()
        finally:
            if not is_finalizing():
                with self.engine.lock, plain_tensors():
                    self.engine.cancel(answer.request)
                answer.end()
