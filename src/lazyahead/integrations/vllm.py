"""The trie drafter inside vLLM, as its custom proposer class:

    vllm serve MODEL --speculative-config '{"method": "custom_class",
        "model": "lazyahead.integrations.vllm.TrieProposer", "num_speculative_tokens": 8}'

Settings go into `additional_config={"lazyahead": {...}}`. Written against vLLM 0.33.0
(`vllm/v1/spec_decode/custom_class_proposer.py` and its call in `gpu_model_runner.py`), which calls
the interface experimental; 0.22.1, 0.27.1 and 0.31.0 make the same call. Nothing of vLLM or torch
is imported.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import Any

from lazyahead.draft.proposer import ChainProposer, Tokens, settings_of
from lazyahead.errors import ConfigError

SETTINGS = ("memory", "namespace", "capacity_bytes", "branch_length", "min_prob")


class TrieProposer:
    """Drafts one chain for each running request, on the CPU.

    The settings are those of `ChainProposer`, and `namespace`: whose answers the memory holds. vLLM
    tells proposers no tenant, so that all requests of an engine share one; leave `memory` and
    `capacity_bytes` out where tenants must not influence each other's speed. Raises ConfigError for
    a setting that does not exist.
    """

    def __init__(self, vllm_config: Any) -> None:
        speculative = vllm_config.speculative_config
        extra = getattr(vllm_config, "additional_config", None)
        given = extra.get("lazyahead") if isinstance(extra, dict) else None
        settings = settings_of(given, SETTINGS, "additional_config['lazyahead']")
        self.num_speculative_tokens = int(speculative.num_speculative_tokens)
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        self.vocab_size = _vocab_size(vllm_config.model_config)
        self.namespace = settings.pop("namespace", "default")
        if not (isinstance(self.namespace, str) and self.namespace):
            raise ConfigError(f"namespace must be some text, got {self.namespace!r}")
        settings.setdefault("branch_length", max(16, self.num_speculative_tokens))
        settings["model"] = str(getattr(vllm_config.model_config, "model", "unknown"))
        settings["may_write"] = _is_first_rank(vllm_config)
        self.proposer = ChainProposer(**settings)
        atexit.register(self.proposer.close)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
        **_: Any,
    ) -> list[list[int]]:
        """For each row of the batch the tokens that may follow its text.

        A row without sampled tokens is still reading its prompt. `token_ids_cpu` (rows, context)
        holds the texts, `num_tokens_no_spec` their lengths, the sampled tokens included; both may
        have more rows than the batch.
        """
        drafts: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            text = token_ids_cpu[row, : int(num_tokens_no_spec[row])]
            drafts.append(self._propose(text, len(sampled)) if len(sampled) else [])
        return drafts

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no draft model."""

    def _propose(self, text: Tokens, num_answered: int) -> list[int]:
        room = self.max_model_len - len(text) - 1
        num = min(self.num_speculative_tokens, room)
        draft = self.proposer.propose(
            text, num, namespace=self.namespace, num_answered=num_answered
        )
        return draft[: _first_beyond(draft, self.vocab_size)]


def _first_beyond(draft: Sequence[int], vocab_size: int) -> int:
    """A memory of another model may hold tokens that this one lacks."""
    return next((i for i, token in enumerate(draft) if token >= vocab_size), len(draft))


def _vocab_size(model_config: Any) -> int:
    ask = getattr(model_config, "get_vocab_size", None)
    return int(ask()) if callable(ask) else 1 << 31


def _is_first_rank(vllm_config: Any) -> bool:
    """Under tensor parallelism each worker has a proposer; one of them writes the memory."""
    parallel = getattr(vllm_config, "parallel_config", None)
    rank = int(getattr(parallel, "rank", 0) or 0)
    return rank % int(getattr(parallel, "tensor_parallel_size", 1) or 1) == 0
