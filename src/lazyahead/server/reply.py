"""What the server answers, as pydantic models: OpenAI's fields, and ours under `lazyahead`.

With `lazyahead: {"detail": true}` in a request, each choice (of a chunk, or of a whole answer) has
an object `lazyahead`:

- `spans`: the text of this chunk, cut by where its tokens come from: `{"text", "source"}`, source
  `model` (the model's own pick), `prompt`, `answer` or `memory` (drafted from there and accepted).
  Joined, they are the chunk's text.
- `stats`: the measurements so far (see `LiveStats`).
- `reading`, in the first chunk of each choice only: `num_layers`, and for each prompt token its
  text (`tokens`; joined they are the prompt without special tokens) and the number of layers at
  which it was computed when the prefill ended (`depth`).
- `revived`, in chunks where prompt tokens came back: `{"positions", "depth"}`, their places in
  `tokens` and their new depths. In a whole answer it holds all of them.

While a prompt is read, the stream has comments instead: `: waiting`, `: reading 41 %`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lazyahead.results import Stats


class CachedTokens(BaseModel):
    cached_tokens: int


class LazyUsage(BaseModel):
    prompt_tokens_computed: float
    """Mean over layers of the share of prompt tokens that were computed."""
    revived: int
    tokens_per_step: float
    ttft_ms: float


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    lazyahead: LazyUsage


class LiveStats(BaseModel):
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    prompt_tokens_computed: float
    revived: int
    tokens_per_step: float
    tokens_per_s: float
    ttft_ms: float


class Span(BaseModel):
    text: str
    source: Literal["model", "prompt", "answer", "memory"]


class Reading(BaseModel):
    num_layers: int
    tokens: list[str]
    depth: list[int]


class Revived(BaseModel):
    positions: list[int]
    depth: list[int]


class Detail(BaseModel):
    spans: list[Span]
    stats: LiveStats
    reading: Reading | None = None
    revived: Revived | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    """Null where the token is no whole character."""


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    lazyahead: Detail | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    lazyahead: Detail | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    lazyahead: Detail | None = None


class Completion(BaseModel):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ResponseObject(BaseModel):
    """What `/v1/responses` gives, as OpenAI documents it; fields not named here are there too."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    output: list[dict[str, Any]]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str


class Extracted(BaseModel):
    text: str
    pages: int


class Example(BaseModel):
    name: str
    text: str
    questions: list[str]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


def usage(stats: Sequence[Stats], num_prompts: int = 1) -> Usage:
    """Of the answers to one request; prompts count once however many answers they got."""
    each = stats[:: max(1, len(stats) // num_prompts)][:num_prompts]
    prompt_tokens = sum(one.prompt_tokens for one in each)
    tokens = sum(one.answer_tokens for one in stats)
    steps = sum(one.num_steps for one in stats)
    num = max(1, len(stats))
    lazy = LazyUsage(
        prompt_tokens_computed=sum(one.prompt_tokens_computed for one in stats) / num,
        revived=sum(one.revived for one in stats),
        tokens_per_step=(tokens - len(stats)) / steps if steps else 1.0,
        ttft_ms=1000 * min((one.ttft_s for one in stats), default=0.0),
    )
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=tokens,
        total_tokens=prompt_tokens + tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(one.reused_tokens for one in each)),
        lazyahead=lazy,
    )


def live(stats: Stats) -> LiveStats:
    """Of one answer, so far."""
    return LiveStats(
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.reused_tokens,
        answer_tokens=stats.answer_tokens,
        prompt_tokens_computed=stats.prompt_tokens_computed,
        revived=stats.revived,
        tokens_per_step=stats.tokens_per_step,
        tokens_per_s=stats.tokens_per_s,
        ttft_ms=1000 * stats.ttft_s,
    )


def dump(model: BaseModel) -> dict[str, Any]:
    """The fields that were set, for JSON."""
    return model.model_dump(exclude_unset=True)


class DocumentReply(BaseModel):
    object: Literal["document"]
    created: int
    model: str
    tokens: int
    """Of the beginning that is kept."""
    bytes: int
    """Memory that it takes."""
    stored: bool
    """Whether it is on disk too, and need not be read again after a restart."""
    read_ms: float
    """0 where it was on disk already."""
