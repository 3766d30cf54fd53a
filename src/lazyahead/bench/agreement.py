"""Whether two configurations generate the same tokens: nothing deferred against plain transformers,
drafts against none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lazyahead.bench import baseline
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.hf.attach import dtype_name
from lazyahead.integrations.hf_generate import accelerate
from lazyahead.llm import LLM
from lazyahead.reader import CATEGORIES, samples
from lazyahead.results import Completion
from lazyahead.sampling import Sampling

Tokens = tuple[int, ...]
TEMPERATURE = 0.8
CHECKS = ("keep_all", "drafting", "sampled")


class Divergence(NamedTuple):
    """The first difference between two answers to one prompt."""

    check: str
    prompt: int
    token: int
    left: int | None
    right: int | None
    """The two tokens there; None where one answer had ended."""


class Agreement:
    """Compares configurations on batches of prompts. It keeps counts and the first differences.

    `keep_all`: nothing deferred, all prompts of a batch at once, against transformers' `generate`,
    one by one. `drafting`: with drafts and in a batch against no drafts one by one, both under the
    prefill strategy `rule`. `sampled`: the same, sampled with a seed. A model that can only decode
    gets the first check alone.
    """

    def __init__(
        self,
        llm: LLM,
        rule: LazyPrefill | None,
        max_new_tokens: int,
        checks: Sequence[str] = CHECKS,
    ) -> None:
        """`llm` defers nothing and drafts nothing."""
        self._llm = llm
        self._rule = rule
        self._greedy = Sampling(max_new_tokens=max_new_tokens)
        self._seeded = Sampling(max_new_tokens=max_new_tokens, temperature=TEMPERATURE, seed=0)
        possible = CHECKS if llm.support.level == "full" else CHECKS[:1]
        self.divergences: dict[str, list[Divergence]] = {
            check: [] for check in possible if check in checks
        }
        self.num_prompts = self.num_tokens = self._num_drafted = self._num_steps = 0
        self._first: dict[str, Any] | None = None
        if llm.support.level == "full":
            self._plain, self._drafting = (
                LLM(llm.model, tokenizer=llm.tokenizer, prefill=rule, decode=decode)
                for decode in (None, Lookahead())
            )

    def add(self, prompts: list[list[int]]) -> None:
        """Compares all configurations on a batch of prompts, token ids each. Raises RequestError,
        ContextLengthError."""
        lengths = []
        for check in self.divergences:
            if check == "keep_all":
                expected, found = self._kept(prompts)
            else:
                sampling = self._greedy if check == "drafting" else self._seeded
                expected, found = self._drafted(prompts, sampling)
            self._compare(check, prompts, expected, found)
            lengths.append(sum(map(len, expected)))
        self.num_prompts += len(prompts)
        self.num_tokens += sum(lengths[:1])

    def _kept(self, prompts: list[list[int]]) -> tuple[list[Tokens], list[Tokens]]:
        """Answers of transformers, and ours with nothing deferred."""
        llm, sampling = self._llm, self._greedy
        expected = [
            baseline.run_baseline(llm.model, token_ids, sampling, llm.tokenizer).token_ids
            for token_ids in prompts
        ]
        return expected, _answers(llm.generate(prompts, sampling=sampling))

    def _drafted(
        self, prompts: list[list[int]], sampling: Sampling
    ) -> tuple[list[Tokens], list[Tokens]]:
        """Answers without drafts, each alone, and with drafts in a batch."""
        drafted = self._drafting.generate(prompts, sampling=sampling)
        self._num_steps += sum(completion.stats.num_steps for completion in drafted)
        self._num_drafted += sum(completion.stats.answer_tokens - 1 for completion in drafted)
        alone = [self._plain.generate(prompt, sampling=sampling) for prompt in prompts]
        return _answers(alone), _answers(drafted)

    def fields(self) -> dict[str, Any]:
        """The fields of `verify --json`: how many answers diverge, and where the first one does."""
        return {
            "prompts": self.num_prompts,
            "tokens": self.num_tokens,
            "diverged": sum(map(len, self.divergences.values())),
            "first_divergence": self._first,
            "first_gap": None if self._first is None else self._first["logit_gap"],
            "dtype": dtype_name(self._llm.model),
            "checks": {check: len(found) for check, found in self.divergences.items()},
            "not_checked": None if self._llm.support.level == "full" else self._llm.support.reason,
            "tokens_per_step": self._num_drafted / self._num_steps if self._num_steps else 1.0,
        }

    def _compare(
        self,
        check: str,
        prompts: Sequence[Sequence[int]],
        left: Sequence[Tokens],
        right: Sequence[Tokens],
    ) -> None:
        found = divergences(check, left, right, self.num_prompts)
        self.divergences[check] += found
        if found and self._first is None:
            index = found[0].prompt - self.num_prompts
            gap = self._logit_gap(found[0], prompts[index], left[index])
            self._first = {**found[0]._asdict(), "logit_gap": gap}

    def _logit_gap(
        self, divergence: Divergence, prompt: Sequence[int], answer: Tokens
    ) -> float | None:
        """How far apart the left side's logits of the two tokens are: small means that rounding
        tipped a near tie.

        None where one answer had ended, where the noise of a draw decided, and where the prompt
        alone is answered otherwise than in its batch before that place.
        """
        if divergence.check == "sampled" or divergence.left is None or divergence.right is None:
            return None
        generated = list(answer[: divergence.token])
        logits = (self._logits if divergence.check == "keep_all" else self._lazy_logits)(
            list(prompt), generated
        )
        return None if logits is None else float(logits[divergence.left] - logits[divergence.right])

    def _logits(self, prompt: list[int], generated: list[int]) -> Tensor:
        """Of the plain model, (V,), after a prompt and the first tokens of its answer."""
        with torch.no_grad():
            logits: Tensor = self._llm.model(
                torch.tensor([prompt + generated], device=self._llm.model.device)
            ).logits
        return logits[0, -1].float()

    def _lazy_logits(self, prompt: list[int], generated: list[int]) -> Tensor | None:
        """The same under the prefill strategy; None where the answer differs before that place."""
        input_ids = torch.tensor([prompt], device=self._llm.model.device)
        with accelerate(self._llm.model, prefill=self._rule):
            output = self._llm.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                tokenizer=self._llm.tokenizer,
                max_new_tokens=len(generated) + 1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        again = output.sequences[0, len(prompt) :].tolist()[: len(generated)]
        return output.logits[-1][0].float() if again == generated else None


def divergences(
    check: str, left: Sequence[Tokens], right: Sequence[Tokens], start: int = 0
) -> list[Divergence]:
    """The first place of each prompt where two answers differ. Prompts count from `start`."""
    places = []
    for index, tokens in enumerate(zip(left, right, strict=True), start):
        pairs = enumerate(zip_longest(*tokens))
        places += [Divergence(check, index, place, a, b) for place, (a, b) in pairs if a != b][:1]
    return places


def own_prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Questions of the reader's world as token ids, its six categories in turn, of about `length`
    of its tokens."""
    rounds = [samples(category, length, n=-(-count // len(CATEGORIES))) for category in CATEGORIES]
    drawn = [sample for one_of_each in zip(*rounds, strict=True) for sample in one_of_each]
    return [llm.encode(sample.document, sample.question).token_ids for sample in drawn[:count]]


def _answers(completions: Sequence[Completion]) -> list[Tokens]:
    return [completion.token_ids for completion in completions]
