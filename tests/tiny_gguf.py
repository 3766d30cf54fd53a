"""A tiny llama as a GGUF file, written with the `gguf` package as llama.cpp converters write it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import CHAT_TEMPLATE, SIZES, byte_level
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

gguf = pytest.importorskip("gguf")

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL = 1, 3  # kinds of tokens


def tiny_llama(is_tied: bool = True, **overrides: Any) -> PreTrainedModel:
    """Two layers with random weights that a GGUF file can hold."""
    sizes = {**SIZES, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1, **overrides}
    vocabulary = len(byte_level())
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, tie_word_embeddings=is_tied, **sizes
    )
    return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    factors: NDArray[Any] | None = None,
    **changes: Any,
) -> Path:
    """The model with the suite's byte-level tokenizer. `factors` divide its rotary frequencies;
    `changes` are further fields, text each."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, value in changes.items():
        writer.add_string(name.replace("__", "."), value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(*_tensor(name, weight.float().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any) -> None:
    inner = json.loads(byte_level().backend_tokenizer.to_str())
    tokens = sorted(inner["model"]["vocab"], key=inner["model"]["vocab"].__getitem__)
    special = {token["content"] for token in inner["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in inner["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensor(name: str, weight: NDArray[np.float32], config: Any) -> tuple[str, NDArray[np.float32]]:
    """A weight under its name in GGUF; queries and keys with their rotary halves interleaved."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    bare = name.removesuffix(".weight")
    if bare in top:
        return f"{top[bare]}.weight", weight
    layer, part = bare.removeprefix("model.layers.").split(".", 1)
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    if part in heads:
        halves = weight.reshape(heads[part], 2, -1, weight.shape[1])
        weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
    return f"blk.{layer}.{NAMES[part]}.weight", weight
