"""What `generate` was asked for, looked at before anything runs: what cannot be honoured is refused
by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from lazyahead.errors import RequestError

CACHES = ("past_key_values", "cache_params", "state")
"""Names under which models take what they remember."""


def refuse(
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
            f"{', '.join(named)} cannot be combined with lazyahead; leave it out, or call plain "
            "generate"
        )
    for name in CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and not _is_transformers_own(cache):
            raise RequestError(f"{name} cannot be continued; leave it out, use a lazyahead Session")


def _is_transformers_own(cache: Any) -> bool:
    """Whether `generate` made it for this call: it marks what it was given, where it is new enough,
    and its own is empty."""
    is_own = isinstance(cache, Cache) and not getattr(cache, "_is_user_defined", False)
    return is_own and not any(map(_remembers, cache.layers))


def _remembers(layer: Any) -> bool:
    """Whether a layer of a cache holds keys or a state."""
    states = getattr(layer, "has_previous_state", {})
    known = states.values() if isinstance(states, dict) else states
    return any(known) or (bool(getattr(layer, "is_initialized", False)) and _length(layer) > 0)


def _length(layer: Any) -> int:
    try:
        return int(layer.get_seq_length())
    except (AttributeError, NotImplementedError):  # a state alone has none
        return 0


_KNOWN = {
    "attention_mask",
    "position_ids",
    *CACHES,
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


def starts_of(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[int]:
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
