"""transformers' own entry: `with accelerate(model): model.generate(...)`, or `custom_generate=` for
a single call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from lazyahead.build import engine_for
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.engine.engine import Engine
from lazyahead.engine.request import Request
from lazyahead.errors import RequestError
from lazyahead.hf.plain_tensors import plain_tensors
from lazyahead.hf.unwrap import unwrap
from lazyahead.inputs import as_decode, as_prefill
from lazyahead.integrations.hf_batch import (
    across_rows,
    check_reads_whole,
    of_row,
    padded,
    sample_together,
)
from lazyahead.integrations.hf_inputs import CACHES, refuse, starts_of
from lazyahead.integrations.hf_patch import open_block
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
    prefill: LazyPrefill | str | None = LazyPrefill(),  # noqa: B008 (frozen)
    decode: Lookahead | Drafter | str | None = None,
) -> Iterator[Accelerated]:
    """Inside, `model.generate` reads lazily and writes ahead; every other line stays as it was.
    `prefill` and `decode` as for `LLM`.

    Generation config, logits processors, stopping criteria, streamers and left-padded batches are
    honoured; what cannot be raises RequestError naming it. Processors and criteria that are not
    transformers' own see a batch as a whole: it is then written a token per step, by transformers'
    own loop, and refused where a prompt is not read whole. Blocks may overlap; the one opened last
    counts. Raises UnsupportedModelError on entry when the model cannot do what is asked. After the
    block, also after an exception, the model is as before.
    """
    inner, reading, writing = unwrap(model), as_prefill(prefill), as_decode(decode)
    with plain_tensors():
        accelerated = Accelerated(engine_for(inner, None, reading, writing))
    patch = open_block(inner, accelerated, partial(_generate, inner))
    try:
        yield accelerated
    finally:
        patch.close(accelerated)


def _generate(
    model: PreTrainedModel,
    accelerated: Accelerated,
    plain: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`model.generate` inside a block: `plain` is the model's own."""
    kwargs = _with_stop_strings(model, {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs})
    for name in _REFUSED:
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


def custom_generate(
    prefill: LazyPrefill | str | None = LazyPrefill(),  # noqa: B008 (frozen)
    decode: Lookahead | Drafter | str | None = None,
    streamer: Any = None,
) -> Callable[..., Any]:
    """For `model.generate(..., custom_generate=custom_generate())`. Give the streamer here:
    transformers keeps it."""

    reading, writing = as_prefill(prefill), as_decode(decode)

    def method(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        with plain_tensors():
            accelerated = Accelerated(engine_for(model, None, reading, writing))
        return _Method(accelerated, streamer)(model, input_ids, **kwargs)

    return method


_REFUSED = ("custom_generate", "assistant_model", *CACHES, "inputs_embeds")
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
        refuse(generation_config, logits_processor, model_kwargs)
        if self.streamer is not None and input_ids.shape[0] > 1:
            raise RequestError(
                f"a streamer takes one sequence, got a batch of {input_ids.shape[0]}"
            )
        starts = starts_of(input_ids, model_kwargs)
        names = across_rows(logits_processor, stopping_criteria)
        if names and len(input_ids) > 1:
            lengths = [input_ids.shape[1] - start for start in starts]
            check_reads_whole(names, self.accelerated.engine.prefill, lengths)
            output, self.accelerated.stats = sample_together(
                model,
                input_ids,
                starts,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
            )
            return output
        with plain_tensors():
            return self._answer(
                input_ids, starts, logits_processor, stopping_criteria, generation_config
            )

    def _answer(
        self,
        input_ids: Tensor,
        starts: Sequence[int],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> Any:
        """Each row as a request of its own."""
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
        return padded(input_ids, rows, generation_config)

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
        processors = of_row(logits_processor, *place)
        prompt = ids[start:].tolist()
        max_new_tokens = (config.max_length or 0) - ids.numel()
        if max_new_tokens < 1:
            raise RequestError(
                f"max_length {config.max_length} leaves no room behind a prompt of {ids.numel()} "
                "tokens"
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
