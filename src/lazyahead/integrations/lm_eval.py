"""This engine as a model of lm-eval: `--model lazyahead`, with prefill and decode as arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lazyahead.draft.factory import describe, parse_decode
from lazyahead.errors import ConfigError, RequestError
from lazyahead.hf.attach import dtype_name
from lazyahead.integrations.likelihood import Scored, dictate, score_whole
from lazyahead.llm import LLM
from lazyahead.results import Completion
from lazyahead.sampling import Sampling
from lazyahead.strategies import parse_prefill

log = logging.getLogger(__name__)

NOT_HERE = "cuda:0"
"""The device that lm-eval passes where none was given."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
"""Generation settings that mean the same here; beside them `until`, `max_gen_toks` and `do_sample`
are known."""

NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Settings of tasks that have no effect at these values, and are refused at others."""


@register_model("lazyahead")
class LazyAheadLM(TemplateLM):  # type: ignore[misc]
    """A model under `prefill` (off, a preset, or a profile) and `decode` (off or lookahead).

    `batch_size` requests are answered at once. Raises ConfigError naming an argument that is
    unknown.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        prefill: str = "balanced",
        decode: str = "off",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = "pretrained, prefill, decode, dtype, device, batch_size, "
            known += "max_length, max_gen_toks, seed"
            raise ConfigError(
                f"--model_args {', '.join(unknown)}: not known to lazyahead, which takes {known}"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(
                f"batch_size must be a whole number of at least 1, got {batch_size!r}"
            )
        if device == NOT_HERE and not torch.cuda.is_available():
            log.warning("lazyahead: no %s here, using the processor", device)
            device = None
        if pretrained is None:
            log.warning("lazyahead: no pretrained=... given, using the built-in reader")
        self.llm = LLM(
            pretrained,
            dtype=dtype,
            device=device or "auto",
            prefill=parse_prefill(str(prefill)),
            decode=parse_decode(str(decode)),
        )
        self.tokenizer = self.llm.tokenizer
        self.batch_size = int(batch_size)
        self.max_gen_toks = int(max_gen_toks)
        self._seed = int(seed)
        self.max_length = min(int(max_length or self.llm.max_context), self.llm.max_context)
        self._device = self.llm.model.device
        self._completions: list[Completion] = []
        self._num_drawn = 0

    # --- text and tokens --------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.llm.eos_ids[0] if self.llm.eos_ids else self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return int(self.eot_token_id if bos is None else bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Text to tokens; a text that contains its own first token, as chat templates do, gets no
        second one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(
            self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)[
                "input_ids"
            ]
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text. Raises ConfigError where the tokenizer has no template."""
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{self.llm.name} has no chat template; leave out --apply_chat_template"
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # --- what lm-eval calls -----------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, up to their stop strings. Raises ConfigError naming a generation setting
        that is unknown."""
        asked = [(request.args[0], self._sampling(request.args[1])) for request in requests]
        texts: list[str] = []
        for batch in self._batches(asked, "answering", disable_tqdm, lambda pair: repr(pair[1])):
            sampling = batch[0][1]
            prompts = [
                self._fit(self.tok_encode(text), sampling.max_new_tokens) for text, _ in batch
            ]
            texts += [completion.text for completion in self._answer(prompts, sampling)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts. Raises ConfigError unless prefill is off: without a prompt
        nothing is pruned."""
        if self.llm.prefill is not None:
            raise ConfigError(
                "the likelihood of a whole text has no prompt to prune: it would be the plain "
                "model's under any prefill; pass prefill=off to measure that"
            )
        sums = []
        for request in self._bar(requests, "scoring", disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            sums.append(
                sum(score_whole(self.llm, *make_disjoint_window(window))[0] for window in windows)
            )
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Scored]:
        """Continuations, forced token by token after the prefill of their contexts."""
        found: list[Scored] = []
        for batch in self._batches(requests, "scoring", disable_tqdm):
            pairs = [self._pair(*request) for request in batch]
            if self.llm.prefill is None:
                scored = [
                    score_whole(self.llm, context, continuation) for context, continuation in pairs
                ]
            else:
                scored = dictate(self.llm, pairs)
            for (key, *_rest), result in zip(batch, scored, strict=True):
                self.cache_hook.add_partial("loglikelihood", key, result)
            found += scored
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval records with its results: both strategies, and their measurements."""
        llm = self.llm
        stats = [completion.stats for completion in self._completions]
        info: dict[str, Any] = {
            "version": version("lazyahead"),
            "model": llm.name,
            "prefill": llm.prefill and llm.prefill.to_dict(),
            "decode": describe(llm.decode),
            "device": str(llm.model.device),
            "dtype": dtype_name(llm.model),
            "seed": self._seed,
        }
        if stats:
            info["prompt_tokens"] = fmean(one.prompt_tokens for one in stats)
            info["prompt_tokens_computed"] = fmean(one.prompt_tokens_computed for one in stats)
            info["tokens_per_step"] = fmean(one.tokens_per_step for one in stats)
        return {"lazyahead": info}

    # --- their parts ------------------------------------------------------------------------------

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """Sampling from lm-eval's settings."""
        given = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        stop = tuple(given.pop("until"))
        do_sample = given.pop("do_sample")
        given = {name: value for name, value in given.items() if NEUTRAL.get(name, ...) != value}
        if unknown := [name for name in given if name not in (*SAMPLING, "max_gen_toks")]:
            known = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
            raise ConfigError(
                f"generation setting {', '.join(unknown)} is not known to lazyahead, "
                f"which takes {known}"
            )
        values = {name: given[name] for name in SAMPLING if name in given}
        values["temperature"] = values.get("temperature", 1.0) if do_sample else 0.0
        return Sampling(max_new_tokens=given["max_gen_toks"], stop=stop, **values)

    def _pair(
        self, texts: tuple[str, str], context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        if not continuation:
            raise RequestError(
                f"the continuation {texts[1]!r} has no tokens of its own; nothing can be scored"
            )
        return self._fit(context or [self.prefix_token_id], len(continuation)), continuation

    def _answer(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """Greedy answers in one batch; sampled ones each with a seed of its own, since repeats of a
        prompt must differ."""
        if sampling.temperature == 0:
            completions = self.llm.generate(prompts, sampling=sampling)
        else:
            completions = []
            for prompt in prompts:
                seeded = Sampling(**{**vars(sampling), "seed": self._seed + self._num_drawn})
                self._num_drawn += 1
                completions += self.llm.generate([prompt], sampling=seeded)
        self._completions += completions
        return completions

    def _fit(self, token_ids: list[int], num_more: int) -> list[int]:
        """The end of a context that leaves room for `num_more` tokens, as lm-eval's own models cut
        it."""
        room = self.max_length - num_more
        if room < 1:
            raise ConfigError(
                f"{num_more} new tokens leave no room in a context of {self.max_length}; lower them"
            )
        if len(token_ids) > room:
            log.warning(
                "lazyahead: a context of %d tokens was cut to its last %d", len(token_ids), room
            )
        return token_ids[-room:]

    def _batches(
        self,
        items: Sequence[Any],
        what: str,
        is_quiet: bool,
        kind: Callable[[Any], Any] = lambda item: None,
    ) -> Iterator[list[Any]]:
        """Neighbours of one kind, `batch_size` at a time."""
        batches = []
        for _, group in groupby(items, kind):
            same = list(group)
            batches += [
                same[start : start + self.batch_size]
                for start in range(0, len(same), self.batch_size)
            ]
        yield from self._bar(batches, what, is_quiet)

    def _bar(self, items: Sequence[Any], what: str, is_quiet: bool) -> Iterator[Any]:
        yield from tqdm(items, desc=what, disable=is_quiet)
