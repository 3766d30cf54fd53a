"""Which model and which tokenizer: short hashes that stay the same between processes, machines and
dtypes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from lazyahead.draft.answers import Owner

_PASSING = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}
"""Config fields that may differ between two loads of one model."""


def owner_of(model: PreTrainedModel, tokenizer: Any = None) -> Owner:
    """Whose token ids a memory of answers holds."""
    return Owner(model_fingerprint(model), tokenizer_fingerprint(tokenizer))


def model_fingerprint(model: PreTrainedModel) -> str:
    """Of the config and a sample of the embedding weights, rounded so that every dtype gives the
    same."""
    weight = model.get_input_embeddings().weight.detach()
    sample = (
        weight[:: max(1, weight.shape[0] // 64), :64].to(torch.bfloat16).float().cpu().contiguous()
    )
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(sample.numpy().tobytes() + config.encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Of the vocabulary; None where there is no tokenizer."""
    if tokenizer is None:
        return None
    vocabulary = sorted((int(index), token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    """A config without what may differ, in its parts too."""
    kept = {name: value for name, value in values.items() if name not in _PASSING}
    return {
        name: _lasting(value) if isinstance(value, dict) else value for name, value in kept.items()
    }
