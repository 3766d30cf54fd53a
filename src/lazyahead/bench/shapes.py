"""Models of known sizes with random weights: as fast and as large as the real ones, without a
download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lazyahead.errors import ConfigError

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "rope_theta",
)
_SHAPES: dict[str, tuple[str, tuple[int | bool | float, ...]]] = {
    "tiny": ("llama", (64, 128, 4, 4, 2, 512, True, 10_000.0)),
    "smollm2-135m": ("llama", (576, 1536, 30, 9, 3, 49_152, True, 100_000.0)),
    "qwen2.5-0.5b": ("qwen2", (896, 4864, 24, 14, 2, 151_936, True, 1_000_000.0)),
    "qwen3-0.6b": ("qwen3", (1024, 3072, 28, 16, 8, 151_936, True, 1_000_000.0)),
    "llama-1b": ("llama", (2048, 8192, 16, 32, 8, 128_256, True, 500_000.0)),
    "tinyllama-1.1b": ("llama", (2048, 5632, 22, 32, 4, 32_000, False, 10_000.0)),
    "qwen2.5-1.5b": ("qwen2", (1536, 8960, 28, 12, 2, 151_936, True, 1_000_000.0)),
    "qwen2.5-3b": ("qwen2", (2048, 11_008, 36, 16, 2, 151_936, True, 1_000_000.0)),
    "llama-3b": ("llama", (3072, 8192, 28, 24, 8, 128_256, True, 500_000.0)),
    "qwen3-4b": ("qwen3", (2560, 9728, 36, 32, 8, 151_936, True, 1_000_000.0)),
    "llama-7b": ("llama", (4096, 11_008, 32, 32, 32, 32_000, False, 10_000.0)),
    "mistral-7b": ("mistral", (4096, 14_336, 32, 32, 8, 32_768, False, 1_000_000.0)),
    "qwen2.5-7b": ("qwen2", (3584, 18_944, 28, 28, 4, 152_064, False, 1_000_000.0)),
    "llama-8b": ("llama", (4096, 14_336, 32, 32, 8, 128_256, False, 500_000.0)),
    "qwen3-8b": ("qwen3", (4096, 12_288, 36, 32, 8, 151_936, False, 1_000_000.0)),
}
_EXTRA: dict[str, dict[str, int | None]] = {
    "qwen3": {"head_dim": 128},
    "mistral": {"sliding_window": None},
}
SHAPES = tuple(_SHAPES)
"""Names that `build_shape` takes, smallest first."""


def build_shape(
    name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", max_context: int = 32_768
) -> PreTrainedModel:
    """A random model of this shape with a context of `max_context` tokens, whatever the original
    has.

    Raises ConfigError for a name that is not in `SHAPES`.
    """
    if name not in _SHAPES:
        raise ConfigError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")
    model_type, values = _SHAPES[name]
    fields: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    extra = _EXTRA.get(model_type, {})
    config = AutoConfig.for_model(
        model_type, **fields, **extra, rope_parameters=rope, max_position_embeddings=max_context,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(
        device
    )  # its tables were on meta too
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, std: float = 0.02, seed: int = 0) -> None:
    """Random matrices at the speed of a copy: one block, repeated; its length is prime, so no two
    rows agree."""
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)) * std
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(float(name.endswith("weight")))
            continue
        block = noise.to(weight)
        flat = weight.view(-1)
        num_whole = flat.numel() // block.numel() * block.numel()
        flat[:num_whole].view(-1, block.numel()).copy_(block)
        flat[num_whole:].copy_(block[: flat.numel() - num_whole])
