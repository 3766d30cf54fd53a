"""Tiny random fp32 models, one per family, built in code: nothing is downloaded and every call
gives the same weights.

Windows (8), chunks (16) and temperature steps (8) are small, so that they bite inside a 40-token
prompt.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

torch.set_num_threads(1)  # models this small only wait for a second thread
VOCAB_SIZE = 101
WINDOW = 8
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
HALF_ROTARY: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
}


def layer_types(pattern: str) -> list[str]:
    """Turn sfcl into the names of sliding, full, chunked and linear attention layers."""
    names = {
        "s": "sliding_attention",
        "f": "full_attention",
        "c": "chunked_attention",
        "l": "linear_attention",
    }
    return [names[letter] for letter in pattern]


@torch.no_grad()
def spread_weights(model: PreTrainedModel, std: float = 0.15) -> None:
    """Give matrices enough scale that attention is peaked and the best logit is far from tied;
    shake every vector."""
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.normal_(0.0, std)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    for module in model.modules():
        if isinstance(
            module, torch.nn.Embedding
        ):  # so that a token still knows itself after the last layer
            module.weight.mul_(4.0)


def build(model_type: str, std: float = 0.15, **overrides: Any) -> PreTrainedModel:
    """A tiny model of this type: the base shape, then what the family calls it or needs besides
    (... leaves it out)."""
    fields = {name: value for name, value in {**BASE, **overrides}.items() if value is not ...}
    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = (
            "eager" if fields.get("attn_logit_softcapping") else None
        )  # older sdpa ignores soft caps
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        ).eval()
        spread_weights(model, std)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, bos_token_id=1)
    return model


def prompt(num_tokens: int = 40, seed: int = 0) -> torch.Tensor:
    """A fixed random prompt that avoids the special tokens 0 and 1."""
    return torch.randint(
        2, VOCAB_SIZE, (1, num_tokens), generator=torch.Generator().manual_seed(seed)
    )


def table(rows: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Callable[[], PreTrainedModel]]:
    """Name -> builder, from name -> (model type, overrides). Types unknown to this transformers are
    left out."""
    return {
        name: partial(build, model_type, **overrides)
        for name, (model_type, overrides) in rows.items()
        if model_type in CONFIG_MAPPING
    }


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = table(
    {
        "llama": ("llama", {}),
        "qwen2": ("qwen2", {}),
        "qwen2_window": (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        ),
        "qwen3": ("qwen3", {}),
        "mistral": ("mistral", {"sliding_window": None}),
        "mistral_window": ("mistral", {"sliding_window": WINDOW}),
        "mixtral": ("mixtral", {**MOE, "num_local_experts": 4}),
        "phi3": ("phi3", {}),
        "gemma2": (
            "gemma2",
            {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        ),
        "gemma3": (
            "gemma3_text",
            {
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 16,
                "layer_types": layer_types("sssfss"),
            }
            | {"num_hidden_layers": 6},
        ),
        "olmo2": ("olmo2", {}),
        "olmo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": layer_types("sssf")}),
        "granite": (
            "granite",
            {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
        ),
        "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
        "qwen3_moe": ("qwen3_moe", {**MOE, "num_experts": 4}),
        "glm4": ("glm4", {"rope_parameters": HALF_ROTARY}),
        "gpt_neox": ("gpt_neox", {"rope_parameters": HALF_ROTARY}),
        "starcoder2": ("starcoder2", {}),
        "starcoder2_window": ("starcoder2", {"sliding_window": WINDOW}),
        "exaone4": ("exaone4", {"sliding_window": WINDOW, "layer_types": layer_types("sssf")}),
        "hunyuan": ("hunyuan_v1_dense", {}),
        "cohere2": (
            "cohere2",
            {"sliding_window": WINDOW, "layer_types": layer_types("sssf"), "logit_scale": 1.0},
        ),
        "gpt_oss": (
            "gpt_oss",
            {
                **MOE,
                "num_local_experts": 4,
                "sliding_window": WINDOW,
                "layer_types": layer_types("sfsf"),
            }
            | {"rope_parameters": YARN},
        ),
        "llama4": (
            "llama4_text",
            {
                **MOE,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 96,
            }
            | {
                "no_rope_layers": [1, 1, 0, 1],
                "attention_chunk_size": 16,
                "floor_scale": 8,
                "attn_scale": 0.5,
            }
            | {"layer_types": layer_types("ccfc")},
        ),
        "stablelm": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
        "nemotron": ("nemotron", {"rope_parameters": HALF_ROTARY}),
        "seed_oss": ("seed_oss", {}),
        "ernie4_5": ("ernie4_5", {}),
        "gpt2": ("gpt2", {}),
        "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    }
)
