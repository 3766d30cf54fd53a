"""The model of transformers inside what others have put around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lazyahead.errors import UnsupportedModelError


def unwrap(model: Any) -> PreTrainedModel:
    """The model itself, out of `torch.compile`, a parallel wrapper or PEFT's adapters, which stay
    active inside it.

    Raises UnsupportedModelError, naming what was given, when there is none or when what is around
    it cannot be left out.
    """
    given = type(model).__name__
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        inner = _inside(model)
        if not isinstance(inner, nn.Module) or inner is model:
            break
        model = inner
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"a {given} is no model of transformers, nor does one stand inside it; give a "
            "PreTrainedModel, a folder or a hub name"
        )
    return model


def _inside(model: Any) -> Any:
    """What a module is wrapped around; None where nothing is known of it."""
    for name in ("_orig_mod", "module"):  # as torch.compile and parallel wrappers call it
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return inner
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        _check_adapters(model)
        return model.get_base_model()
    return None


def _check_adapters(model: Any) -> None:
    """Adapters that change the weights stand inside the base model; learned prompts do not."""
    config = model.peft_config
    active = getattr(model, "active_adapter", None)
    settings = config.get(active) if isinstance(config, dict) else config
    if getattr(settings, "is_prompt_learning", False):
        kind = type(settings).__name__
        raise UnsupportedModelError(
            f"{kind} puts learned tokens before the prompt, which cannot be honoured; use adapters "
            "that change weights (LoRA and the like), or call plain generate"
        )
