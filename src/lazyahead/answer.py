"""One request of an LLM: its tokens become text, its end is watched for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lazyahead.cache.session import Session, shared_prefix
from lazyahead.checks import check_kind
from lazyahead.engine.engine import Engine
from lazyahead.engine.request import Request
from lazyahead.errors import ContextLengthError, RequestError
from lazyahead.hf.plain_tensors import plain_tensors
from lazyahead.hf.probe import Support
from lazyahead.hf.processors import picker_for
from lazyahead.results import Piece
from lazyahead.sampling import Picker, Sampling
from lazyahead.text.detokenizer import Detokenizer, StopStrings, special_texts
from lazyahead.text.prompt import Prompt


@dataclass(frozen=True)
class Setting:
    """What answers of one model have in common."""

    model: PreTrainedModel
    tokenizer: Any
    eos_ids: tuple[int, ...]
    max_context: int

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.model.get_input_embeddings().weight.shape[0])


class Answer:
    """The pieces of one answer, until `end` is called. Raises RequestError for a prompt or sampling
    that the model cannot serve."""

    def __init__(
        self, setting: Setting, prompt: Prompt, sampling: Sampling, session: Session
    ) -> None:
        """`session` has read the start of the prompt."""
        own = setting.model.generation_config.stop_strings or ()
        own = (own,) if isinstance(own, str) else tuple(own)
        stops = (*sampling.stop, *prompt.stop, *own)
        self._eos = () if sampling.ignore_eos else setting.eos_ids
        self._text, self._stops = Detokenizer(setting.tokenizer), StopStrings(stops)
        self._special = special_texts(setting.tokenizer) if stops else {}
        self._ready: list[str] = []
        self.pieces: deque[Piece] = deque()
        self.is_over = False
        picker = picker_for(
            sampling, len(prompt.token_ids), setting.eos_ids, setting.model, prompt.token_ids
        )
        self.request = Request(
            prompt.token_ids,
            picker,
            accept=self._accept,
            emit=self._emit,
            session=session,
            max_new_tokens=sampling.max_new_tokens,
            question=prompt.question,
            min_tokens=None if session.prefill is None else session.prefill.min_tokens,
        )

    def end(self) -> None:
        """Nothing comes any more. The request no longer refers to the answer, so that both are
        freed, keys and values included, as soon as the caller forgets them."""
        self.is_over = True
        self.request.accept = _deaf
        self.request.emit = _deaf

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
        if token in self._special:
            self._ready.append(self._stops.add(self._special[token], shown=False))
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


def check(setting: Setting, prompt: Prompt, sampling: Sampling) -> None:
    """Raises RequestError for an empty prompt and for tokens that do not exist, ContextLengthError
    where prompt and answer exceed the model's context."""
    check_kind("sampling", sampling, Sampling, "a Sampling")
    if not prompt.token_ids:
        raise RequestError("the prompt is empty; give some text, or a file")
    end, ids = setting.vocab_size, prompt.token_ids
    if any(not 0 <= token < end for token in ids):
        raise RequestError(f"token ids must be between 0 and {end - 1}, got {min(ids)}..{max(ids)}")
    num, limit = len(ids), setting.max_context
    if num + sampling.max_new_tokens > limit:
        raise ContextLengthError(
            f"prompt of {num} tokens plus max_new_tokens {sampling.max_new_tokens} exceed the "
            f"model's context of {limit}; shorten one of them"
        )
    named = [*sampling.logit_bias, *(token for word in sampling.bad_words for token in word)]
    vocab_size = setting.model.config.get_text_config().vocab_size
    if named and max(named) >= vocab_size:  # the pass would fail for everybody in it
        raise RequestError(
            f"logit_bias and bad_words take token ids below {vocab_size}, got {max(named)}"
        )


def resume(session: Session, token_ids: Sequence[int], support: Support) -> None:
    """Cuts a session back to what the prompt shares with it; at least the prompt's last token is
    read anew."""
    check_kind("session", session, Session, "one of `llm.session()`")
    if session.in_use:
        raise RequestError("another answer is running on this session; let it end first")
    shared = min(shared_prefix(session.token_ids, token_ids), len(token_ids) - 1)
    if shared < len(session) and support.level != "full":
        raise RequestError(
            "this model's state cannot be cut back; continue the session's own text, or begin anew"
        )
    with plain_tensors():
        session.crop(shared)


def shortest_session(engine: Engine) -> Session:
    """A session of two tokens, read as any other."""
    session = engine.new_session()
    engine.answer([Request([0, 0], Picker(), session=session, max_new_tokens=1, min_tokens=0)])
    return session


def _deaf(*_: Any) -> None:
    """Hears nothing, says nothing."""
