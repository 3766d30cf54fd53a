"""Tiny tokenizers and models on disk, built in code: what the commands are tried with."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

COMMAND = [sys.executable, "-c", "from lazyahead.cli import main; main()"]
"""The installed script, wherever it is installed."""
CORPUS = [
    "The code of the red door is 417.",
    "A question: what is it? Answer: naïve café, 日本語, 😀🇩🇪!",
] * 3
SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, as in GPT-2, Llama 3 and Qwen."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Words that carry their space, bytes for what has no word, as in Llama 2 and Mistral."""
    vocab = {token: index for index, token in enumerate(SPECIAL)}
    letters = ["▁", *sorted(set("".join(CORPUS[:1])) - {" "}), "▁the", "th", "the", "▁code", "日"]
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *letters]:
        vocab.setdefault(token, len(vocab))
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    inner = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token=None))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with a chat template."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    copy.chat_template = CHAT_TEMPLATE
    return copy


def save_model(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A random model and its tokenizer, as `from_pretrained` finds them."""
    tokenizer = byte_level()
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **{**SIZES, **overrides})
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
