"""The trie drafter for engines of others: they hand over the whole text of an answer, and get back
a chain of tokens that may follow.

    proposer = ChainProposer()
    proposer.propose(token_ids, 8)              # at every step, for every running text

No ids of requests are needed: a text is recognised as the continuation of one seen before.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazyahead.checks import check_count
from lazyahead.draft.answers import AnswerLog
from lazyahead.draft.config import Lookahead
from lazyahead.draft.tree import Draft
from lazyahead.draft.trie import TokenTrie
from lazyahead.draft.trie_drafter import TrieDrafter, TrieRequest
from lazyahead.errors import ConfigError

Tokens = npt.NDArray[np.int32]

_END_LEN = 16
"""Last tokens by which a text is looked up; the rest is then compared."""
_MAX_STEP = 64
"""Tokens that a text may have grown by since it was last seen, to be recognised."""


@dataclass
class _Text:
    """One running answer."""

    namespace: str
    tokens: Tokens
    """With room behind the first `num_tokens`."""
    num_tokens: int
    request: TrieRequest
    draft: Draft = Draft.EMPTY
    last_call: int = 0
    key: Hashable = field(default=None)

    def grow(self, new: Tokens) -> None:
        """Appends tokens."""
        end = self.num_tokens + len(new)
        if end > len(self.tokens):
            room = np.empty(max(end, len(self.tokens)), np.int32)
            self.tokens = np.concatenate([self.tokens[: self.num_tokens], room])
        self.tokens[self.num_tokens : end] = new
        self.num_tokens = end


class ChainProposer:
    """Proposes what texts go on with: what followed the same tokens earlier in the text, or in
    remembered answers.

    Args:
        branch_length: longest proposal.
        min_prob: a chain ends before a token that is accepted with less than this probability, as
            learned from how earlier proposals fared.
        memory: file that stores finished answers (token ids), to propose later ones from.
        model: what a file that is new is said to belong to; of one that exists it is not asked,
            as any engine's name for a model may differ. Tokens of another model only cost time.
        capacity_bytes: memory that the remembered answers of a namespace may take. 0: nothing is
            remembered, so that texts have no influence on each other.
        may_write: whether finished answers are added to the file.
        idle_rounds: a text ends when it was not seen while the others were seen so many times.

    Not thread-safe. Raises ConfigError for values out of range, MemoryFileError.
    """

    def __init__(
        self,
        *,
        branch_length: int = 16,
        min_prob: float = 0.1,
        memory: str | None = None,
        model: str = "unknown",
        capacity_bytes: int | None = None,
        may_write: bool = True,
        idle_rounds: int = 64,
    ) -> None:
        if capacity_bytes is None:
            capacity_bytes = 0 if memory is None else Lookahead().capacity_bytes
        Lookahead(branch_length=branch_length, memory=memory, capacity_bytes=capacity_bytes)
        if not 0.0 <= min_prob <= 1.0:
            raise ConfigError(f"min_prob must be between 0 and 1, got {min_prob}")
        check_count("idle_rounds", idle_rounds, 1)
        self.min_prob = min_prob
        self.idle_rounds = idle_rounds
        log = None
        if memory is not None:
            log = _open(memory, model, capacity_bytes, AnswerLog if may_write else _ReadOnlyLog)
        self._drafter = TrieDrafter(branch_length, "single", capacity_bytes=capacity_bytes, log=log)
        self._texts: dict[Hashable, _Text] = {}
        self._num_calls = 0

    @property
    def num_running(self) -> int:
        """Texts that have not ended."""
        return len(self._texts)

    def propose(
        self,
        token_ids: Sequence[int] | Tokens,
        n: int,
        *,
        namespace: str = "default",
        num_answered: int = 0,
    ) -> list[int]:
        """At most `n` tokens that may follow `token_ids`, likely ones; often none. Of a text that
        is new the last `num_answered` tokens are answer, those before are prompt."""
        tokens = np.asarray(token_ids, np.int32)
        if not len(tokens) or n < 1:
            return []
        self._num_calls += 1
        text = self._recognise(tokens, namespace)
        if text is None:
            text = self._begin(tokens, namespace, len(tokens) - num_answered)
        text.last_call = self._num_calls
        if self._num_calls % self.idle_rounds == 0:
            self._end_idle()
        text.draft = _chain(text.request.propose(n), self.min_prob)
        return list(text.draft.token_ids)

    def finish(self, token_ids: Sequence[int] | Tokens, *, namespace: str = "default") -> None:
        """This text has ended; its answer is remembered. Without it a text ends when it is not
        seen for a while."""
        text = self._recognise(np.asarray(token_ids, np.int32), namespace)
        if text is not None:
            self._end(text)

    def remember(self, token_ids: Sequence[int], *, namespace: str = "default") -> None:
        """Adds an earlier answer or a document to what texts of this namespace are continued
        from."""
        self._drafter.remember(list(token_ids), namespace)

    def close(self) -> None:
        """All texts have ended."""
        for text in list(self._texts.values()):
            self._end(text)
        if self._drafter.log is not None:
            self._drafter.log.close()

    # --- texts --------------------------------------------------------------------------------

    def _recognise(self, tokens: Tokens, namespace: str) -> _Text | None:
        """The text that these tokens are, or continue; it is then up to date."""
        for num_new in range(min(_MAX_STEP, len(tokens) - 1) + 1):
            num_known = len(tokens) - num_new
            text = self._texts.get(_key(tokens[:num_known], namespace))
            if text is not None and np.array_equal(text.tokens[:num_known], tokens[:num_known]):
                if num_new:
                    self._advance(text, tokens[num_known:])
                return text
        return None

    def _begin(self, tokens: Tokens, namespace: str, num_prompt: int) -> _Text:
        request = self._drafter.start(tokens[:num_prompt].tolist(), namespace)
        request.extend(tokens[num_prompt:].tolist())
        text = _Text(namespace, tokens.copy(), len(tokens), request)
        self._place(text)
        return text

    def _advance(self, text: _Text, new: Tokens) -> None:
        written = new.tolist()
        text.request.extend(written)
        text.request.feedback(text.draft, written)
        text.draft = Draft.EMPTY
        del self._texts[text.key]
        text.grow(new)
        self._place(text)

    def _place(self, text: _Text) -> None:
        text.key = _key(text.tokens[: text.num_tokens], text.namespace)
        replaced = self._texts.get(text.key)
        if replaced is not None:  # two texts have become one
            self._end(replaced)
        self._texts[text.key] = text

    def _end_idle(self) -> None:
        oldest = self._num_calls - self.idle_rounds * len(self._texts)
        for text in [text for text in self._texts.values() if text.last_call < oldest]:
            self._end(text)

    def _end(self, text: _Text) -> None:
        del self._texts[text.key]
        text.request.stop(remember=True)


def _key(tokens: Tokens, namespace: str) -> Hashable:
    return namespace, len(tokens), tokens[-_END_LEN:].tobytes()


def _chain(draft: Draft, min_prob: float) -> Draft:
    """The draft up to where it becomes unlikely."""
    length = len(draft)
    if draft.probs:
        length = next((i for i, prob in enumerate(draft.probs) if prob < min_prob), length)
    return draft.within(length) if length else Draft.EMPTY


class _ReadOnlyLog(AnswerLog):
    """Answers are read from it; others write them."""

    def append(self, tokens: Sequence[int], namespace: str = "default") -> None:
        """Nothing is written."""


def _open(path: str, model: str, capacity_bytes: int, kind: type[AnswerLog]) -> AnswerLog:
    num_tokens = TokenTrie(capacity_bytes=capacity_bytes).max_tokens
    owner = None if Path(path).exists() else model
    return kind(path, model=owner, capacity_bytes=4 * num_tokens)


def settings_of(given: Any, allowed: Sequence[str], where: str) -> dict[str, Any]:
    """A mapping of settings by name. Raises ConfigError naming one that does not exist."""
    settings = dict(given or {})
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise ConfigError(f"{where} has no setting {unknown[0]!r}; it takes {', '.join(allowed)}")
    return settings
