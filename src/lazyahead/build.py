"""An engine for a model: the one place where a front learns what the model can do and gets what
runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from lazyahead.cache.prefix import PrefixCache
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.draft.factory import strategy_for
from lazyahead.engine.engine import Engine
from lazyahead.engine.row_cost import row_cost_of
from lazyahead.errors import UnsupportedModelError
from lazyahead.hf.fingerprint import owner_of
from lazyahead.hf.plain_runner import PlainRunner
from lazyahead.hf.probe import examine
from lazyahead.hf.ranks import num_ranks
from lazyahead.hf.runner import Runner
from lazyahead.hf.steady import fewest_rows


def engine_for(
    model: PreTrainedModel,
    tokenizer: Any,
    prefill: LazyPrefill | None,
    decode: Lookahead | Drafter | None,
    prefill_chunk_size: int = 512,
    packed: bool | None = None,
    prefix_cache: PrefixCache | None = None,
    make: Callable[..., Engine] = Engine,
) -> Engine:
    """`packed`: whether linear layers use packed weights (None: where memory allows). `make`: the
    kind of engine.

    Raises UnsupportedModelError, naming the family and the reason, when the model cannot do what
    is asked."""
    if num_ranks(model) > 1 and make is Engine:
        raise UnsupportedModelError(
            f"{model.config.name_or_path} is shared out to {num_ranks(model)} ranks, which must "
            f"be led; load it with LLM(..., tp={num_ranks(model)})"
        )
    support, spec = examine(model)
    name = f"{model.config.name_or_path or type(model).__name__} ({support.model_type})"
    if support.level == "none":
        raise UnsupportedModelError(f"{name}: {support.reason}")
    if spec is None:
        if prefill is not None or decode is not None:
            remedy = (
                "pass prefill=None and decode=None (--prefill off --decode off) to run it plainly"
            )
            raise UnsupportedModelError(f"{name} can only decode: {support.reason}; {remedy}")
        return make(PlainRunner(model), None, None)
    runner = Runner(model, spec)
    runner.pack(packed)
    owner = partial(owner_of, model, tokenizer)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if isinstance(decode, Lookahead) and decode.mode is None:
        branches_are_dear = fewest_rows(model.device, model.dtype) > 1
        decode = replace(decode, mode="single" if branches_are_dear else "hierarchical")
    strategy = strategy_for(decode, owner, vocab_size)
    return make(
        runner,
        prefill,
        strategy.config,
        drafter=strategy.drafter,
        row_cost=row_cost_of(model) if decode is not None else None,
        prefill_chunk_size=prefill_chunk_size,
        prefix_cache=prefix_cache,
    )
