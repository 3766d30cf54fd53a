"""The other families of transformers as tiny models: attention families first, then those with
recurrent layers."""

from collections.abc import Callable
from typing import Any

from families import BASE, HALF_ROTARY, WINDOW, YARN, layer_types, table
from transformers import PreTrainedModel

EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
E_NUM: dict[str, Any] = {**EXPERTS, "num_experts": 4}
E_LOCAL: dict[str, Any] = {**EXPERTS, "num_local_experts": 4}
E_ROUTED: dict[str, Any] = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1}
MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
DENSE_FIRST: dict[str, Any] = {"first_k_dense_replace": 1}
MLP_TYPES: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
SWA: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": layer_types("sssf")}
M3: dict[str, Any] = {
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 32,
    "rotary_dim": 8,
}
FFN: dict[str, Any] = {"ffn_dim": 96}
DECODER: dict[str, Any] = {"is_decoder": True, "type_vocab_size": 2, "pad_token_id": 0}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
SWA_MLA: dict[str, Any] = {f"swa_{name}": value for name, value in MLA.items()} | {
    "swa_num_attention_heads": 4
}
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
EARLY: dict[str, Any] = {"original_max_position_embeddings": 16}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    **EARLY,
} | {
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.5 * pair for pair in range(8)],
}
GEMMA: dict[str, Any] = {
    "sliding_window": WINDOW,
    "vocab_size_per_layer_input": 101,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 32,
}

SHARED: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": layer_types("sfsfsf"),
    "num_kv_shared_layers": 3,
}
TEXT_INSIDE: dict[str, Any] = {
    name: ... for name in BASE if not name.endswith("token_id") and name[:3] != "tie"
}
"""For configs of models with eyes or ears, which keep the text model's shape in `text_config`."""
EYES: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    | {"image_size": 28, "patch_size": 14}
}

MORE_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = table(
    {
        "afmoe": ("afmoe", {**E_NUM, **SWA, "num_dense_layers": 1, "num_shared_experts": 1}),
        "apertus": ("apertus", {"rope_parameters": PLAIN}),
        "arcee": ("arcee", {}),
        "aria_text": ("aria_text", {"moe_num_experts": 4, "moe_topk": 2}),
        "axk1": ("axk1", {**E_ROUTED, **MLA, **MLP_TYPES}),
        "axk2": ("axk2", {**E_ROUTED, **MLA, **MLP_TYPES, **INDEXER}),
        "beam": ("beam", {**E_NUM, **SWA}),
        "biogpt": ("biogpt", {}),
        "bitnet": ("bitnet", {}),
        "bloom": ("bloom", {}),
        "codegen": ("codegen", {"n_ctx": 512, "rotary_dim": 8}),
        "cohere": ("cohere", {"logit_scale": 1.0}),
        "cohere2_moe": ("cohere2_moe", {**E_NUM, **SWA, "logit_scale": 1.0}),
        "cohere_compass": (
            "cohere_compass_text",
            {
                **SWA,
                "logit_scale": 1.0,
                "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
            },
        ),
        "cpmant": ("cpmant", {"dim_head": 16, "dim_ff": 96, "prompt_types": 4, "prompt_length": 4}),
        "ctrl": ("ctrl", {"dff": 96}),
        "cwm": ("cwm", {**SWA, "rope_parameters": PLAIN}),
        "dbrx": (
            "dbrx",
            {
                "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 3.0},
                "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
                "hidden_size": ...,
                "d_model": 64,
            },
        ),
        "deepseek_v2": ("deepseek_v2", {**E_ROUTED, **MLA, **DENSE_FIRST}),
        "deepseek_v3": ("deepseek_v3", {**E_ROUTED, **MLA, **DENSE_FIRST}),
        "deepseek_v32": ("deepseek_v32", {**E_ROUTED, **MLA, **MLP_TYPES, **INDEXER}),
        "deepseek_v4": (
            "deepseek_v4",
            {**E_ROUTED, **INDEXER, "sliding_window": WINDOW, "num_key_value_heads": 1}
            | {"q_lora_rank": 24, "o_lora_rank": 16, "o_groups": 2, "hc_mult": 2},
        ),
        "diffllama": ("diffllama", {}),
        "doge": ("doge", {"keep_window_size": 16}),
        "dots1": ("dots1", {**E_ROUTED, **DENSE_FIRST, **SWA}),
        "dots3_note": (
            "dots3_note_text",
            {**E_ROUTED, **MLA, **SWA_MLA, **MLP_TYPES, **INDEXER}
            | {
                "sliding_window": WINDOW,
                "shared_experts_intermediate_size": 32,
                "swa_head_dim": 24,
            },
        ),
        "ernie4_5_moe": ("ernie4_5_moe", {**EXPERTS, "moe_num_experts": 4, "moe_k": 2}),
        "exaone_moe": ("exaone_moe", {**E_NUM, **SWA, "num_shared_experts": 1}),
        "falcon": ("falcon", {"head_dim": ...}),
        "falcon_alibi": ("falcon", {"head_dim": ..., "alibi": True}),
        "flex_olmo": ("flex_olmo", E_NUM),
        "flint": ("flint", {**E_NUM, **SWA}),
        "gemma": ("gemma", {}),
        "gemma3n": ("gemma3n_text", {**GEMMA, **SHARED}),
        "gemma4": (
            "gemma4_text",
            {**GEMMA, "num_hidden_layers": 6, "layer_types": layer_types("sfsfsf")},
        ),
        "gemma4_shared": ("gemma4_text", {**GEMMA, **SHARED}),
        "gemma4_unified": ("gemma4_unified_text", {**GEMMA, "layer_types": layer_types("sssf")}),
        "glm": ("glm", {"rope_parameters": HALF_ROTARY}),
        "glm4_moe": ("glm4_moe", {**E_ROUTED, **DENSE_FIRST, "rope_parameters": HALF_ROTARY}),
        "glm4_moe_lite": ("glm4_moe_lite", {**E_ROUTED, **MLA, **MLP_TYPES}),
        "glm_moe_dsa": ("glm_moe_dsa", {**E_ROUTED, **MLA, **MLP_TYPES, **INDEXER}),
        "gpt_bigcode": ("gpt_bigcode", {}),
        "gpt_neo": (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
        ),
        "gpt_neox_japanese": ("gpt_neox_japanese", {}),
        "gptj": ("gptj", {"rotary_dim": 8}),
        "granite_swa": ("granite_swa", SWA),
        "granitemoe": ("granitemoe", E_LOCAL),
        "granitemoe_swa": ("granitemoe_swa", {**E_LOCAL, **SWA}),
        "granitemoeshared": ("granitemoeshared", {**E_LOCAL, "shared_intermediate_size": 32}),
        "helium": ("helium", {}),
        "hrm_text": ("hrm_text", {}),
        "hunyuan_moe": ("hunyuan_v1_moe", {**E_NUM, "moe_topk": 2}),
        "hy_v3": ("hy_v3", {**E_NUM, **MLP_TYPES}),
        "hy_v4": ("hy_v4", {**E_ROUTED, **MLA, **MLP_TYPES, **INDEXER}),
        "hyperclovax": ("hyperclovax", {}),
        "jais2": ("jais2", {}),
        "jetmoe": ("jetmoe", {**E_LOCAL, "kv_channels": 16}),
        "kolibri1": ("kolibri1", {**E_NUM, **SWA}),
        "laguna": ("laguna", {**E_NUM, **SWA}),
        "llama_dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
        "llama_yarn": ("llama", {"rope_parameters": YARN}),
        "longcat_flash": (
            "longcat_flash",
            {
                **MLA,
                "num_layers": 4,
                "ffn_hidden_size": 96,
                "expert_ffn_hidden_size": 32,
                "n_routed_experts": 4,
            }
            | {"zero_expert_num": 2, "moe_topk": 2},
        ),
        "mellum": ("mellum", {**E_LOCAL, **SWA}),
        "mimo_v2_flash": ("mimo_v2_flash", {**E_ROUTED, **SWA, "v_head_dim": 12}),
        "minicpm3": ("minicpm3", {**MLA}),
        "minimax_m2": ("minimax_m2", E_LOCAL),
        "minimax_m3_sparse": (
            "minimax_m3_vl_text",
            {
                **E_LOCAL,
                **M3,
                "index_block_size": 4,
                "index_topk_blocks": 2,
                "index_n_heads": 2,
                "index_head_dim": 16,
            }
            | {"layer_types": ["full_attention", *["minimax_m3_sparse"] * 3]},
        ),
        "minimax_m3": ("minimax_m3_vl_text", {**E_LOCAL, **M3}),
        "ministral": ("ministral", SWA),
        "ministral3": (
            "ministral3",
            {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5, **EARLY}},
        ),
        "modernbert_decoder": ("modernbert-decoder", {"local_attention": WINDOW}),
        "moshi": ("moshi", FFN),
        "mpt": ("mpt", {}),
        "nanochat": ("nanochat", {}),
        "olmo": ("olmo", {"clip_qkv": 2.0}),
        "olmoe": ("olmoe", E_NUM),
        "openai_gpt": ("openai-gpt", {}),
        "persimmon": ("persimmon", {}),
        "phi": ("phi", {"rope_parameters": HALF_ROTARY, "qk_layernorm": True}),
        "phi3_longrope": ("phi3", {**EARLY, "rope_parameters": LONGROPE}),
        "phi3_window": ("phi3", {"sliding_window": WINDOW}),
        "phimoe": ("phimoe", {**E_LOCAL, "sliding_window": WINDOW}),
        "qwen2_moe": ("qwen2_moe", E_NUM),
        "qwen2_moe_window": ("qwen2_moe", {**E_NUM, **SWA, "use_sliding_window": True}),
        "solar_open": ("solar_open", E_ROUTED),
        "vaultgemma": (
            "vaultgemma",
            {**SWA, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        ),
        "xglm": ("xglm", FFN),
        "youtu": ("youtu", MLA),
        "emu3": (
            "emu3",
            {**TEXT_INSIDE, "text_config": BASE, "vq_config": {}, "vocabulary_map": {}},
        ),
        "gemma3_vl": (
            "gemma3",
            {**TEXT_INSIDE, **EYES, "mm_tokens_per_image": 1}
            | {"text_config": {**BASE, **SWA, "query_pre_attn_scalar": 16}},
        ),
        "gemma4_vl": (
            "gemma4",
            {**TEXT_INSIDE, **EYES, "audio_config": None}
            | {"text_config": {**BASE, **GEMMA, "layer_types": layer_types("sssf")}},
        ),
        "mllama": (
            "mllama",
            {**TEXT_INSIDE, **EYES}
            | {"text_config": {**BASE, "cross_attention_layers": [1], "rope_parameters": PLAIN}},
        ),
        "bert_decoder": ("bert", DECODER),
        "roberta_decoder": ("roberta", DECODER),
        "bart_decoder": (
            "bart",
            {"decoder_ffn_dim": 96, "decoder_layers": 4, "decoder_attention_heads": 4},
        ),
    }
)

DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": layer_types("lllf"),
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 16,
    "use_mamba_kernels": False,
}

INKLING: dict[str, Any] = {
    **E_ROUTED,
    "sliding_window_size": WINDOW,
    "d_rel": 4,
    "rel_extent": 64,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
}

HYBRID_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = table(
    {
        "bailing_hybrid": (
            "bailing_hybrid",
            {**MLA, **E_LOCAL, **DENSE_FIRST, "n_shared_experts": 1, "layer_group_size": 2},
        ),
        "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1, 3]}),
        "falcon_h1": ("falcon_h1", MAMBA),
        "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
        "granitemoehybrid": (
            "granitemoehybrid",
            {**MAMBA, **E_LOCAL, "shared_intermediate_size": 32}
            | {"layer_types": ["mamba", "attention", "mamba", "attention"]},
        ),
        "inkling": ("inkling_text", INKLING),
        "inkling2": ("inkling2_text", INKLING),
        "jamba": ("jamba", {**MAMBA, **E_NUM, "attn_layer_period": 2, "attn_layer_offset": 1}),
        "kimi_linear": (
            "kimi_linear",
            {
                **MLA,
                **E_LOCAL,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "layer_types": layer_types("llfl"),
            },
        ),
        "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
        "lfm2_moe": (
            "lfm2_moe",
            {
                **E_NUM,
                "num_dense_layers": 1,
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            },
        ),
        "lfm3": ("lfm3", {"sliding_window": WINDOW}),
        "mamba": ("mamba", {"state_size": 8}),
        "mamba2": (
            "mamba2",
            {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
        ),
        "minimax": ("minimax", {**E_LOCAL, "layer_types": layer_types("lflf"), "block_size": 16}),
        "nemotron_h": (
            "nemotron_h",
            {
                "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
                "mamba_num_heads": 8,
                "mamba_head_dim": 16,
            }
            | {"ssm_state_size": 8, "n_groups": 1, "use_mamba_kernels": False, "chunk_size": 16},
        ),
        "olmo_hybrid": ("olmo_hybrid", DELTA),
        "qwen3_5": ("qwen3_5_text", DELTA),
        "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA, **E_NUM}),
        "qwen3_next": ("qwen3_next", {**DELTA, **E_NUM}),
        "qwen4_exp": (
            "qwen4_exp_text",
            {
                **DELTA,
                **E_NUM,
                "layer_types": [*layer_types("lll"), "indexed_attention"],
                "hc_count": 2,
            }
            | {
                "hc_lowrank": 16,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
            }
            | {"indexer_budget": 16, "indexer_compress_ratio": 4},
        ),
        "recurrent_gemma": (
            "recurrent_gemma",
            {"num_hidden_layers": 6, "attention_window_size": WINDOW},
        ),
        "rwkv": ("rwkv", {}),
        "xlstm": ("xlstm", {"num_heads": 4, "qk_dim_factor": 1.0}),
        "zamba": ("zamba", {**MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}),
        "zamba2": (
            "zamba2",
            {**MAMBA, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
        ),
        "zaya": ("zaya", {**E_NUM, "num_experts_per_tok": 1, "router_hidden_size": 16}),
    }
)
