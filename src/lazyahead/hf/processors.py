"""Sampling settings as transformers' own logits processors, in the order that `generate` applies
them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
)

from lazyahead.errors import RequestError
from lazyahead.sampling import Picker, Sampling

_SAMPLING_ONLY = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""Settings of generation configs that shape a draw, and that `Sampling` does not have."""


class CountPenalty:
    """OpenAI's presence and frequency penalties: on tokens of the answer, once, and once per
    occurrence."""

    def __init__(self, presence: float, frequency: float, prompt_len: int) -> None:
        self.presence, self.frequency, self.prompt_len = presence, frequency, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Token ids (1, N) and logits (1, V) to logits (1, V)."""
        answer = input_ids[0, self.prompt_len :].to(scores.device)
        counts = torch.zeros_like(scores[0]).index_add_(
            0, answer, torch.ones_like(answer, dtype=scores.dtype)
        )
        return scores - self.frequency * counts - self.presence * (counts > 0)


def picker_for(
    sampling: Sampling,
    prompt_len: int,
    eos_ids: tuple[int, ...],
    model: PreTrainedModel | None = None,
    prompt: Sequence[int] = (),
) -> Picker:
    """What chooses the tokens of one answer to a prompt of `prompt_len` tokens.

    With a `model`, what its generation config says of tokens is honoured as `generate` would; what
    `sampling` sets wins, and whether and how it samples is `sampling`'s alone. Raises RequestError
    for a generation config that needs a second pass of the model.
    """
    config = _merged(sampling, prompt_len, None if model is None else model.generation_config)
    device = None if model is None else model.device
    config._eos_token_tensor = torch.tensor(eos_ids, device=device) if eos_ids else None
    if sampling.ignore_eos:
        _never_end(config, eos_ids)
    own = LogitsProcessorList()
    if sampling.presence_penalty or sampling.frequency_penalty:
        own.append(CountPenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_len))
    found = GenerationMixin._get_logits_processor(
        _Bare() if model is None else model,
        config,
        input_ids_seq_length=prompt_len,
        encoder_input_ids=torch.tensor([[*prompt]], device=device) if prompt else None,
        logits_processor=own,
        device=device,
    )
    return Picker(found if len(found) else None, sampling.temperature > 0, sampling.seed)


def _merged(sampling: Sampling, prompt_len: int, own: GenerationConfig | None) -> GenerationConfig:
    """The model's generation config, and over it what `sampling` says."""
    config = GenerationConfig() if own is None else copy.copy(own)
    if config.guidance_scale not in (None, 1):
        raise RequestError(
            f"the model's generation config asks for guidance_scale {config.guidance_scale}, which "
            "needs a second pass; set it to None, or call plain generate"
        )
    for name in _SAMPLING_ONLY:
        setattr(config, name, None)
    config.do_sample = sampling.temperature > 0
    config.temperature, config.top_k = sampling.temperature, sampling.top_k
    config.top_p, config.min_p = sampling.top_p, sampling.min_p or None
    config.max_length = prompt_len + sampling.max_new_tokens
    config.num_beams = 1
    if sampling.repetition_penalty != 1.0:
        config.repetition_penalty = sampling.repetition_penalty
    if sampling.no_repeat_ngram_size:
        config.no_repeat_ngram_size = sampling.no_repeat_ngram_size
    if sampling.bad_words:
        config.bad_words_ids = [list(word) for word in sampling.bad_words]
    if sampling.min_new_tokens:
        config.min_new_tokens = sampling.min_new_tokens
    if sampling.logit_bias:
        _add_bias(config, sampling.logit_bias)
    return config


def _add_bias(config: GenerationConfig, bias: Mapping[int, float]) -> None:
    """Biases of single tokens, over those that the config has."""
    known = config.sequence_bias or {}
    if not isinstance(known, dict):
        known = {tuple(words): value for words, value in known}
    config.sequence_bias = {**known, **{(token,): value for token, value in bias.items()}}


def _never_end(config: GenerationConfig, eos_ids: Sequence[int]) -> None:
    """Nothing forces the end, and no token of the end is chosen."""
    config.forced_eos_token_id = config.exponential_decay_length_penalty = None
    _add_bias(config, dict.fromkeys(eos_ids, float("-inf")))
    config.sequence_bias = config.sequence_bias or None


class _Bare(GenerationMixin):  # type: ignore[misc]  # transformers has no types
    """Stands for a model where none is given: no encoder, no generation config."""

    config = PretrainedConfig()
