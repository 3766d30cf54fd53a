"""transformers' own entry: `with accelerate(model): model.generate(...)`, or `custom_generate=` for
a single call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput

from lazyahead.build import engine_for
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.engine.engine import Engine
from lazyahead.engine.request import Request
from lazyahead.errors import RequestError
from lazyahead.results import Stats
from lazyahead.sampling import Picker


class Accelerated:
    """What `accelerate` hands out. `stats` has one entry per sequence of the latest call."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stats: list[Stats] = []


@contextmanager
def accelerate(
    model: PreTrainedModel,
    prefill: LazyPrefill | None = LazyPrefill(),  # noqa: B008 (frozen)
    decode: Lookahead | Drafter | None = None,
) -> Iterator[Accelerated]:
    """Inside, `model.generate` reads lazily and writes ahead; every other line stays as it was.

    Generation config, logits processors, stopping criteria, streamers and left-padded batches are
    honoured; what cannot be raises RequestError naming it. Raises UnsupportedModelError on entry
    when the model cannot do what is asked. After the block, also after an exception, the model is
    as before.
    """
    accelerated = Accelerated(engine_for(model, None, prefill, decode))
    before = model.__dict__.get("generate")
    plain = getattr(
        before, "_lazyahead_plain", model.generate
    )  # of nested blocks the inner one counts

    def generate(*args: Any, **kwargs: Any) -> Any:
        kwargs = _with_stop_strings(model, {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs})
        for name in ("custom_generate", "assistant_model", "past_key_values", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise RequestError(
                    f"{name} cannot be used inside accelerate(); call model.generate outside it"
                )
        kwargs["custom_generate"] = _Method(accelerated, kwargs.pop("streamer", None))
        own = model.generation_config
        stop_strings, own.stop_strings = own.stop_strings, None
        try:
            return plain(**kwargs)
        finally:
            own.stop_strings = stop_strings

    generate._lazyahead_plain = plain  # type: ignore[attr-defined]
    model.generate = generate
    try:
        yield accelerated
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


def custom_generate(
    prefill: LazyPrefill | None = LazyPrefill(),  # noqa: B008 (frozen)
    decode: Lookahead | Drafter | None = None,
    streamer: Any = None,
) -> Callable[..., Any]:
    """For `model.generate(..., custom_generate=custom_generate())`. Give the streamer here:
    transformers keeps it."""

    def method(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        return _Method(Accelerated(engine_for(model, None, prefill, decode)), streamer)(
            model, input_ids, **kwargs
        )

    return method


_ARGUMENTS = list(inspect.signature(GenerationMixin.generate).parameters)[1:]


def _with_stop_strings(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers loses the tokenizer on its way to a method that is not its own, so the criterion
    is made here."""
    tokenizer = kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config") or model.generation_config
    strings = kwargs.pop("stop_strings", None) or config.stop_strings
    if not strings:
        return kwargs
    if tokenizer is None:
        raise RequestError(
            f"stop_strings {strings!r} need the model's tokenizer; pass tokenizer=..."
        )
    if config is not model.generation_config and config.stop_strings:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    criteria = [*(kwargs.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
    return {**kwargs, "stopping_criteria": StoppingCriteriaList(criteria)}


class _Method:
    """A decoding method as transformers calls it, with everything prepared."""

    def __init__(self, accelerated: Accelerated, streamer: Any) -> None:
        self.accelerated, self.streamer = accelerated, streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        _refuse(generation_config, logits_processor, model_kwargs)
        if self.streamer is not None and input_ids.shape[0] > 1:
            raise RequestError(
                f"a streamer takes one sequence, got a batch of {input_ids.shape[0]}"
            )
        starts = _starts(input_ids, model_kwargs)
        rows = [
            self._row(
                (row, len(input_ids)),
                ids,
                start,
                logits_processor,
                stopping_criteria,
                generation_config,
            )
            for row, (ids, start) in enumerate(zip(input_ids, starts, strict=True))
        ]
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        self.accelerated.engine.answer(rows)
        if self.streamer is not None:
            self.streamer.end()
        self.accelerated.stats = [request.stats() for request in rows]
        return _output(input_ids, rows, generation_config)

    def _row(
        self,
        place: tuple[int, int],
        ids: Tensor,
        start: int,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> Request:
        engine = self.accelerated.engine
        seed = (
            int(torch.randint(1 << 62, ())) if config.do_sample else None
        )  # from torch's seed, as transformers'
        processors = _of_row(logits_processor, *place)
        prompt = ids[start:].tolist()
        max_new_tokens = (config.max_length or 0) - ids.numel()
        if max_new_tokens < 1:
            raise RequestError(
                f"max_length {config.max_length} leaves no room behind a prompt of {ids.numel()} tokens"
            )

        def accept(token: int, request: Request) -> str | None:
            known = request.scores
            scores = (
                None
                if known is None
                else tuple(score[None] for score in known[: len(request.answer)])
            )
            done = stopping_criteria(request.prefix(()).to(ids.device), scores)
            return "stop" if bool(done.all()) else None

        def emit(tokens: Sequence[int], reason: str | None) -> None:
            if self.streamer is not None:
                for token in tokens:
                    self.streamer.put(torch.tensor([token]))

        request = Request(
            prompt,
            Picker(processors if len(processors) else None, bool(config.do_sample), seed),
            accept=accept,
            emit=emit,
            session=engine.new_session(),
            max_new_tokens=max_new_tokens,
            prefix=ids.tolist(),
            min_tokens=engine.prefill.min_tokens if engine.prefill is not None else None,
        )
        if config.return_dict_in_generate:
            request.scores = [] if config.output_scores else None
            request.logits = [] if config.output_logits else None
        return request


def _refuse(
    config: GenerationConfig, processors: LogitsProcessorList, model_kwargs: dict[str, Any]
) -> None:
    """What would change the outcome and cannot be honoured."""
    asked = {
        "num_beams": (config.num_beams or 1) > 1,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "penalty_alpha": bool(getattr(config, "penalty_alpha", None)),
        "dola_layers": getattr(config, "dola_layers", None) is not None,
        "output_attentions": bool(config.return_dict_in_generate and config.output_attentions),
        "output_hidden_states": bool(
            config.return_dict_in_generate and config.output_hidden_states
        ),
        "guidance_scale": any(
            isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors
        ),
        "cache_implementation": config.cache_implementation
        not in (None, "dynamic", "dynamic_full"),
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        "encoder_outputs": model_kwargs.get("encoder_outputs") is not None,
    }
    named = [name for name, is_asked in asked.items() if is_asked]
    named += [
        name
        for name, value in model_kwargs.items()
        if name not in _KNOWN and _says_something(value)
    ]
    if named:
        raise RequestError(
            f"{', '.join(named)} cannot be combined with lazyahead; leave it out, or call plain generate"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise RequestError(
            "past_key_values that already hold tokens cannot be continued; use a lazyahead Session"
        )


_KNOWN = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "inputs_embeds",
}
"""Model inputs that are heeded, checked elsewhere, or without effect on the text. Pictures and the
like are not."""


def _says_something(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_says_something(part) for part in value.values())
    return (
        bool(value.any()) if isinstance(value, Tensor) else value is not None and value is not False
    )


def _starts(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[int]:
    """Where each row's text begins behind its left padding."""
    num_rows, length = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        starts = [0] * num_rows
    else:
        starts = [length - int(row.sum()) for row in mask]
        for row, start in zip(mask, starts, strict=True):
            if not bool(row[start:].all()):
                raise RequestError(
                    "attention_mask has zeros behind the first one; pad on the left only"
                )
    if max(starts, default=0) >= length:
        raise RequestError("a prompt of the batch is empty; give each at least one token")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        for row, start in zip(positions.expand(num_rows, -1), starts, strict=True):
            if row[start:].tolist() != list(range(length - start)):
                raise RequestError(
                    "position_ids that do not count up from 0 cannot be honoured; leave them out"
                )
    return starts


def _of_row(processors: LogitsProcessorList, row: int, num_rows: int) -> LogitsProcessorList:
    """The processors for one row of the batch, which they see as a batch of one: what they hold per
    row is cut out."""
    if num_rows == 1:
        return processors
    mine = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            mine.append(
                PrefixConstrainedLogitsProcessor(
                    lambda _, ids, allowed=allowed: allowed(row, ids), 1
                )
            )
            continue
        own = copy.deepcopy(processor)
        for name in _PER_ROW & vars(own).keys():
            held = getattr(own, name)
            if isinstance(held, Tensor | list) and len(held) == num_rows:
                setattr(own, name, held[row : row + 1])
        if hasattr(own, "batch_size"):
            own.batch_size = 1
        mine.append(own)
    return mine


_PER_ROW = {"prompt_ignore_length", "encoder_input_ids", "generated_ngrams"}
"""What transformers' own processors hold one of per row."""


def _output(input_ids: Tensor, rows: Sequence[Request], config: GenerationConfig) -> Any:
    """Rows padded to one length, as `generate` returns them."""
    longest = max(len(request.answer) for request in rows)
    pad = config._pad_token_tensor
    pad_id = int(pad) if pad is not None else 0
    answers = [request.answer + [pad_id] * (longest - len(request.answer)) for request in rows]
    sequences = torch.cat([input_ids, torch.tensor(answers, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_stacked([request.scores for request in rows], longest),
        logits=_stacked([request.logits for request in rows], longest),
    )


def _stacked(rows: Sequence[list[Tensor] | None], longest: int) -> tuple[Tensor, ...] | None:
    """Per step (B, V); a row that has ended repeats its last."""
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    return tuple(
        torch.stack([row[min(step, len(row) - 1)] for row in known]) for step in range(longest)
    )
