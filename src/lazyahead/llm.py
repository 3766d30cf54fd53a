"""A model, ready to answer: text in, pieces of text with their measurements out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel

from lazyahead.build import engine_for
from lazyahead.cache.session import Session, shared_prefix
from lazyahead.cache.session_file import load_session, save_session
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.engine.request import Request
from lazyahead.errors import ContextLengthError, RequestError
from lazyahead.hf.load import eos_ids, load, max_context
from lazyahead.hf.probe import probe
from lazyahead.hf.processors import picker_for
from lazyahead.reader import reader_path
from lazyahead.results import Completion, Piece, Reach
from lazyahead.sampling import Picker, Sampling
from lazyahead.text import Detokenizer, Message, Prompt, StopStrings, encode_prompt, encode_turn

Text = str | list[int]
Texts = list[str] | list[list[int]]


class LLM:
    """A model with its tokenizer, its engine and its two strategies.

    `model` is a folder, a hub name, or a loaded model (then give its `tokenizer`, or pass prompts
    as token ids); None is the built-in reader. `prefill` and `decode` say how it reads and writes;
    None for plainly. Raises ModelError when it cannot be loaded or does not support what was asked.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | None = None,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str = "auto",
        prefill: LazyPrefill | None = LazyPrefill(),  # noqa: B008 (frozen)
        decode: Lookahead | None = None,
        prefill_chunk_size: int = 512,
    ) -> None:
        is_reader = model is None
        if model is None:
            model = reader_path()
        if isinstance(model, PreTrainedModel):
            self.name, self.model, self.tokenizer = (
                str(model.config.name_or_path or "model"),
                model,
                tokenizer,
            )
        else:
            self.name = "built-in reader" if is_reader else str(model)
            self.model, loaded = load(str(model), dtype, device)
            self.tokenizer = tokenizer or loaded
        self.prefill, self.decode = prefill, decode
        self.support = probe(self.model)
        self.engine = engine_for(self.model, self.tokenizer, prefill, decode, prefill_chunk_size)
        self.max_context = max_context(self.model)
        self.eos_ids = eos_ids(self.model, self.tokenizer)
        self._lock = threading.RLock()
        self._sample: Session | None = None

    def encode(self, prompt: str, question: str | None = None) -> Prompt:
        """Text to tokens through the chat template. Raises RequestError when there is no text."""
        if self.tokenizer is None:
            raise RequestError(
                "this model was given without a tokenizer; pass token ids, or tokenizer=..."
            )
        return encode_prompt(self.tokenizer, prompt, question)

    def session(self) -> Session:
        """A new conversation. Requests on it share what they have in common."""
        return self.engine.new_session()

    def save_session(self, session: Session, path: str | Path) -> None:
        """Writes a session to a safetensors file that `load_session` takes. Raises
        SessionFileError."""
        save_session(session, path, self.model, self.prefill)

    def load_session(self, path: str | Path) -> Session:
        """Reads a session back. Raises SessionFileError for a damaged file or one of another model
        or config."""
        return load_session(path, self.model, self.prefill, self.engine.new_session(), self._like)

    def _like(self) -> Session:
        """A session of two tokens, read as any other, for what its states look like."""
        if self._sample is None:
            session = self.session()
            request = Request([0, 0], Picker(), session=session, max_new_tokens=1, min_tokens=0)
            with self._lock:
                self.engine.answer([request])
            self._sample = session
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
    ) -> Iterator[Piece]:
        """Answers piece by piece, one piece per step. Leaving the iterator early cancels the
        answer.

        With a `session`, what the prompt shares with it from the start is not read again.
        `on_progress` hears the fraction of the prompt that has been read. Raises RequestError,
        ContextLengthError.
        """
        yield from self._stream(self._encode(prompt, question), sampling, session, on_progress)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        session: Session | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Iterator[Piece]:
        """Answers the last of `messages` (role, content), as `stream`; a session brings the earlier
        ones."""
        previous = session.history if session is not None and len(messages) > 1 else []
        turn = encode_turn(self.tokenizer, messages, previous)
        yield from self._stream(turn, sampling, session, on_progress)

    @overload
    def generate(
        self,
        prompts: str,
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
        session: None = None,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | Texts,
        question: str | None = None,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        session: Session | None = None,
    ) -> Completion | list[Completion]:
        """One prompt to its answer, or several at once to theirs, in order. Raises as `stream`."""
        if isinstance(prompts, str):
            return Completion.fold(
                list(self.stream(prompts, question, sampling=sampling, session=session))
            )
        if session is not None:
            raise RequestError(
                "a session is one conversation; give each of several prompts its own call"
            )
        answers = [
            _Answer(self, self._encode(prompt, question), sampling, None) for prompt in prompts
        ]
        with self._lock:
            self.engine.answer([answer.request for answer in answers])
        return [Completion.fold(list(answer.pieces)) for answer in answers]

    def _encode(self, prompt: Text, question: str | None) -> Prompt:
        if isinstance(prompt, str):
            return self.encode(prompt, question)
        if question is not None:
            raise RequestError(
                "a question goes with a text; with token ids, put its tokens at their end"
            )
        token_ids = [int(token) for token in prompt]
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if any(not 0 <= token < vocabulary for token in token_ids):
            raise RequestError(
                f"token ids must be between 0 and {vocabulary - 1}, got {min(token_ids)}..{max(token_ids)}"
            )
        return Prompt(token_ids)

    def _stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        session: Session | None,
        on_progress: Callable[[float], None] | None,
    ) -> Iterator[Piece]:
        with self._lock:
            answer = _Answer(self, prompt, sampling, session)
            self.engine.submit(answer.request)
        try:
            while not answer.is_over:
                with self._lock, self.engine:
                    if on_progress is not None:
                        self.engine.runner.on_layer = answer.progress(
                            on_progress, self.support.num_layers
                        )
                    try:
                        if not answer.pieces:
                            self.engine.step()
                    finally:
                        self.engine.runner.on_layer = None
                while answer.pieces:
                    yield answer.pieces.popleft()
        finally:
            with self._lock:
                self.engine.cancel(answer.request)


class _Answer:
    """One request of an LLM: its tokens become text, its end is watched for."""

    def __init__(
        self, llm: LLM, prompt: Prompt, sampling: Sampling, session: Session | None
    ) -> None:
        if not prompt.token_ids:
            raise RequestError("the prompt is empty; give some text, or a file")
        total = len(prompt.token_ids) + sampling.max_new_tokens
        if total > llm.max_context:
            raise ContextLengthError(
                f"prompt of {len(prompt.token_ids)} tokens plus max_new_tokens {sampling.max_new_tokens} exceed the "
                f"model's context of {llm.max_context}; shorten one of them"
            )
        _check_tokens(llm, sampling)
        self._eos = () if sampling.ignore_eos else llm.eos_ids
        self._text, self._stops = Detokenizer(llm.tokenizer), StopStrings(sampling.stop)
        self._ready: list[str] = []
        self.pieces: deque[Piece] = deque()
        self.is_over = False
        session = _resume(llm, session, prompt.token_ids)
        self.request = Request(
            prompt.token_ids,
            picker_for(sampling, len(prompt.token_ids), llm.eos_ids),
            accept=self._accept,
            emit=self._emit,
            session=session,
            max_new_tokens=sampling.max_new_tokens,
            question=prompt.question,
            min_tokens=llm.prefill.min_tokens if llm.prefill is not None else None,
        )

    def progress(self, tell: Callable[[float], None], num_layers: int) -> Callable[[int], None]:
        """Tells how much of the prompt has been read, when a layer begins."""

        def on_layer(layer: int) -> None:
            if self.request.is_prefilling:
                done = self.request.progress
                tell(done if done > 0 else layer / num_layers)

        return on_layer

    def _accept(self, token: int, request: Request) -> str | None:
        if token in self._eos:
            return "stop"
        self._ready.append(self._stops.add(self._text.add(token)))
        return "stop" if self._stops.matched is not None else None

    def _emit(self, tokens: Sequence[int], reason: str | None) -> None:
        if reason is not None:
            if self._stops.matched is None:
                self._ready.append(self._stops.add(self._text.flush()))
            if self._stops.matched is None:
                self._ready.append(self._stops.flush())
            self.is_over = True
        text, request = "".join(self._ready), self.request
        self.pieces.append(Piece(text, tuple(tokens), request.stats(), reason, request.sources))
        self._ready = []


def _check_tokens(llm: LLM, sampling: Sampling) -> None:
    """Token ids that settings name must exist, or the pass would fail for everybody in it."""
    named = [*sampling.logit_bias, *(token for word in sampling.bad_words for token in word)]
    vocabulary = llm.model.config.get_text_config().vocab_size
    if named and max(named) >= vocabulary:
        raise RequestError(
            f"logit_bias and bad_words take token ids below {vocabulary}, got {max(named)}"
        )


def _resume(llm: LLM, session: Session | None, token_ids: Sequence[int]) -> Session:
    """The session, cut back to what the prompt shares with it; at least the prompt's last token is
    read anew."""
    if session is None:
        return llm.session()
    if session.in_use:
        raise RequestError("another answer is running on this session; let it end first")
    shared = min(shared_prefix(session.token_ids, token_ids), len(token_ids) - 1)
    if shared < len(session) and llm.support.level != "full":
        raise RequestError(
            "this model's state cannot be cut back; continue the session's own text, or start a new one"
        )
    session.crop(shared)
    return session
