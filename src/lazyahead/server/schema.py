"""What requests may say, and what each field means: nothing is accepted that is not honoured.

A field with a `None` value counts as left out. Fields that are known from OpenAI but not honoured
stand here only with the values that ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lazyahead.sampling import Sampling

Count = Annotated[int, Field(ge=1, le=1 << 20)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class Body(BaseModel):
    """Unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {k: value for k, value in values.items() if value is not None or k in required}


class StreamOptions(Body):
    include_usage: bool = False
    """A last chunk with `usage` and no choices."""
    continuous_usage_stats: bool = False
    """`usage` of the choice so far in every chunk, as in vLLM."""

    @model_validator(mode="after")
    def _together(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats goes with include_usage: true")
        return self


class Extension(Body):
    """Fields under `lazyahead`."""

    prefill: str | None = None
    """How the prompt is read: `off` or the name of a preset; left out: the server's own."""
    decode: Literal["off", "lookahead"] | None = None
    namespace: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Whose earlier answers are drafted from. It belongs to the API key, unless the operator
    shares it."""
    cache: bool = True
    """Whether the prompt may begin with what the prefix cache holds, and is kept there."""
    detail: bool = False
    """How deep the prompt was read, and what was drafted, in `lazyahead` of each choice or
    chunk."""


class DocumentExtension(Body):
    """Fields under `lazyahead` of a document: questions over it must say the same."""

    prefill: str | None = None
    namespace: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class Generation(Body):
    """Fields of every request that generates."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """-1 and 0: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float] | None = None
    """Token ids, as texts, to what is added to their logits."""
    min_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    ignore_eos: bool = False
    user: Annotated[str, Field(max_length=512)] | None = None
    """Noted in the request log."""
    lazyahead: Extension = Extension()

    @model_validator(mode="after")
    def _check_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Raises ConfigError for values that cannot go together."""
        names = ("temperature", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in (*names, "repetition_penalty")}
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return Sampling(
            max_new_tokens=max_new_tokens,
            top_k=max(0, self.top_k or 0),
            stop=self.stops,
            logit_bias=bias,
            min_new_tokens=self.min_tokens or 0,
            ignore_eos=self.ignore_eos,
            **{name: value for name, value in given.items() if value is not None},
        )


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is read as `system`."""
    content: str | list[TextPart]
    name: str | None = None
    """Given to the chat template."""

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    # asked for nothing
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self


class DocumentRequest(Body):
    """What `POST /v1/documents` takes."""

    text: Annotated[str, Field(min_length=1)]
    """The document, as the user's message will begin."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """The system message that the questions will come with."""
    model: str | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    lazyahead: DocumentExtension = DocumentExtension()


class CompletionRequest(Generation):
    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=128)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=128),
        ]
    )
    """A text or token ids, or several of either: each gets `n` answers."""
    max_tokens: Count = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    """The prompt in front of the answer; not together with `logprobs`."""
    # asked for nothing
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo with logprobs needs log-probabilities of the prompt, which are "
                "not computed; leave one of them out"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if is_one else given


class ResponsesRequest(Body):
    model: str | None = None
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[InputMessage], Field(min_length=1, max_length=4096)]
    )
    instructions: str | None = None
    """A system message of this response only."""
    previous_response_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool = False
    store: bool = True
    """Whether it can be continued."""
    user: Annotated[str, Field(max_length=512)] | None = None
    lazyahead: Extension = Extension()
    # asked for nothing
    text: ResponseText | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] = False
    service_tier: Literal["auto", "default"] | None = None


class ResponseText(Body):
    format: TextFormat | None = None


class InputPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    type: Literal["message"] = "message"
    id: Annotated[str, Field(max_length=64)] | None = None
    """Of an earlier output; it is not looked up."""
    status: Literal["completed", "incomplete"] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


ResponsesRequest.model_rebuild()


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    """Through the chat template, ready for the answer."""
    add_special_tokens: bool = True
    """Of a `prompt`."""
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]
