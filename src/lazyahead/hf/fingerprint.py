"""Which model and which tokenizer: short hashes that stay the same between processes, machines and
dtypes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from lazyahead.draft.answers import Owner
from lazyahead.hf.ranks import whole

_PASSING = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
    "distributed_config",
}
"""Config fields that may differ between two loads of one model."""
_NUM_SAMPLED = 256
"""Elements of each weight that are looked at."""


def owner_of(model: PreTrainedModel, tokenizer: Any = None) -> Owner:
    """Whose token ids a memory of answers holds."""
    return Owner(model_fingerprint(model), tokenizer_fingerprint(tokenizer))


def model_fingerprint(model: PreTrainedModel) -> str:
    """Of the config and a sample of the embedding weights, rounded so that every dtype gives the
    same."""
    weight = whole(model.get_input_embeddings().weight.detach())
    sample = (
        weight[:: max(1, weight.shape[0] // 64), :64].to(torch.bfloat16).float().cpu().contiguous()
    )
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(sample.numpy().tobytes() + config.encode()).hexdigest()


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Of some elements of every weight, all layers included. Another dtype may give another."""
    digest = hashlib.sha256()
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        if weight.numel() and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            step = max(1, flat.numel() // _NUM_SAMPLED)
            by_device.setdefault(flat.device, []).append(flat[::step][:_NUM_SAMPLED].float())
    for samples in by_device.values():
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


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
