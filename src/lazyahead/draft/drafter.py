"""Drafters: strategies that guess what an answer goes on with. One strategy, one class; one object
per request.

    drafter = TrieDrafter() request = drafter.start(prompt_ids)             # may go on:
    request.extend(more, Source.PROMPT) while ...: draft = request.propose(max_nodes=16) tokens =
    ...                                # what the model says, the first `len(tokens) - 1` of them
    drafted request.extend(tokens) request.feedback(draft, tokens)
    request.stop()

Implementations: `NoDrafter`, `PromptLookupDrafter` here, `TrieDrafter` in trie_drafter.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lazyahead.draft.budget import Step
from lazyahead.draft.tree import Draft, Source
from lazyahead.errors import ConfigError


class DraftRequest(Protocol):
    """What a drafter knows of one running answer."""

    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        """The text has grown: a part of the prompt, or what the model has written."""

    def propose(self, max_nodes: int, step: Step | None = None) -> Draft:
        """Guess what follows the last token, in at most `max_nodes` nodes; `Draft.EMPTY` for no
        guess. Guesses that cannot pay in the `step` may be left out."""

    def feedback(self, draft: Draft, tokens: Sequence[int]) -> None:
        """The text went on with `tokens` where `draft` (as proposed, verified in full, in part or
        not) was guessed."""

    def stop(self, *, remember: bool = False) -> None:
        """The request has ended: its branches leave; its answer stays for later requests where
        asked for."""


class Drafter(Protocol):
    """A strategy. A namespace never influences the drafts of another."""

    def start(self, prompt: Sequence[int] = (), namespace: str = "default") -> DraftRequest:
        """A new request."""


class NoDrafter:
    """Guesses nothing: plain decoding."""

    def start(self, prompt: Sequence[int] = (), namespace: str = "default") -> DraftRequest:
        return _NoRequest()


class _NoRequest:
    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        pass

    def propose(self, max_nodes: int, step: Step | None = None) -> Draft:
        return Draft.EMPTY

    def feedback(self, draft: Draft, tokens: Sequence[int]) -> None:
        pass

    def stop(self, *, remember: bool = False) -> None:
        pass


class PromptLookupDrafter:
    """What transformers' `prompt_lookup_num_tokens` guesses, for comparison: one branch, after the
    earliest occurrence in prompt and answer of the last `max_ngram` tokens, or fewer, always
    `num_tokens` long."""

    def __init__(self, num_tokens: int = 10, max_ngram: int = 2) -> None:
        if num_tokens < 1 or max_ngram < 1:
            raise ConfigError(
                f"num_tokens {num_tokens} and max_ngram {max_ngram} must be at least 1"
            )
        self.num_tokens = num_tokens
        self.max_ngram = max_ngram

    def start(self, prompt: Sequence[int] = (), namespace: str = "default") -> DraftRequest:
        request = _PromptLookupRequest(self)
        request.extend(prompt)
        return request


@dataclass
class _PromptLookupRequest(_NoRequest):
    drafter: PromptLookupDrafter
    text: list[int] = field(default_factory=list)
    first: dict[tuple[int, ...], int] = field(
        default_factory=dict
    )  # n-gram -> where its first occurrence ends

    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        for token in tokens:
            for n in range(1, min(self.drafter.max_ngram, len(self.text)) + 1):
                self.first.setdefault(tuple(self.text[-n:]), len(self.text))
            self.text.append(token)

    def propose(self, max_nodes: int, step: Step | None = None) -> Draft:
        for n in range(min(self.drafter.max_ngram, len(self.text) - 1), 0, -1):
            found = self.first.get(tuple(self.text[-n:]))
            if found is not None:
                tokens = self.text[found : found + min(self.drafter.num_tokens, max_nodes)]
                return Draft(tokens, range(-1, len(tokens) - 1))
        return Draft.EMPTY
