"""The paper's drafter: a trie of the request's own text, and one of what earlier requests left."""

import warnings
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lazyahead.draft.answers import AnswerLog
from lazyahead.draft.budget import MAX_DEPTH, Acceptance, Step
from lazyahead.draft.grow import Branch, Mode, grow
from lazyahead.draft.tree import Draft, Source
from lazyahead.draft.trie import SEPARATOR, Match, TokenTrie
from lazyahead.errors import ConfigError, MemoryFileError


class TrieDrafter:
    """The paper's drafter: branches of prompt, answer and remembered answers, merged, likeliest
    first.

    Args:
        branch_length: depth of a draft, tokens.
        mode: "hierarchical", "parallel" or "single", see `grow`.
        capacity_bytes: of what is remembered, per namespace; least recently used leaves first. 0:
            remember nothing, so that requests have no influence on each other at all.
        log: where what is remembered outlives this object; a namespace is read from it when it is
        first used.
        max_matches: occurrences looked at per lookup, in the request's text and in the remembered
        ones each.
        decay: vote of an occurrence against the next newer one of the same kind.
        prompt_tokens: last tokens of a prompt that are remembered in front of its answer, so that
            the first tokens of the answer can be drafted. They are prompt text. 0: none.

    `remember` adds documents and earlier answers; a request's own text is dropped when the request
    stops. Not thread-safe. Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        branch_length: int = 16,
        mode: Mode = "hierarchical",
        *,
        capacity_bytes: int = 64 << 20,
        log: AnswerLog | None = None,
        max_matches: int = 8,
        decay: float = 0.9,
        prompt_tokens: int = 0,
    ) -> None:
        if mode not in ("hierarchical", "parallel", "single"):
            raise ConfigError(f"mode {mode!r} must be 'hierarchical', 'parallel' or 'single'")
        if max_matches < 1 or not 0.0 < decay <= 1.0:
            raise ConfigError(
                f"max_matches {max_matches} must be at least 1, decay {decay} above 0 and at most 1"
            )
        if branch_length > MAX_DEPTH:
            raise ConfigError(f"branch_length {branch_length} must be at most {MAX_DEPTH}")
        TokenTrie(
            branch_length, capacity_bytes=capacity_bytes or None
        )  # refuses what it could not hold
        self.branch_length = branch_length
        self.mode = mode
        self.capacity_bytes = capacity_bytes
        self.log = log
        self.max_matches = max_matches
        self.decay = decay
        self.prompt_tokens = prompt_tokens
        self._namespaces: dict[str, Namespace] = {}

    def start(self, prompt: Sequence[int] = (), namespace: str = "default") -> "TrieRequest":
        request = TrieRequest(self, namespace)
        request.extend(prompt, Source.PROMPT)
        return request

    def remember(self, tokens: Sequence[int], namespace: str = "default") -> None:
        """Add an earlier answer or a document to what requests of this namespace are drafted from.

        A log that cannot be written any more (a full disk) gets a warning, and no further answers.
        """
        self.namespace(namespace).remember(tokens)
        if self.log is not None:
            try:
                self.log.append(tokens, namespace)
            except MemoryFileError as error:
                self.log = None
                warnings.warn(
                    f"answers are no longer kept on disk: {error}", RuntimeWarning, stacklevel=2
                )

    def forget(self, namespace: str = "default") -> None:
        """Drop what the namespace remembers, learned acceptance included."""
        self._namespaces.pop(namespace, None)
        if self.log is not None:
            self.log.clear(namespace)

    def nbytes(self, namespace: str = "default") -> int:
        """Bytes that the namespace remembers with."""
        shared = self.namespace(namespace).shared
        return shared.nbytes if shared else 0

    def namespace(self, name: str = "default") -> "Namespace":
        """What the namespace remembers, read from the log where it was not yet. Raises
        MemoryFileError."""
        if name not in self._namespaces:
            capacity = self.capacity_bytes
            namespace = Namespace(
                TokenTrie(self.branch_length, capacity_bytes=capacity) if capacity else None
            )
            if self.log is not None:
                namespace.load(self.log.answers(name))
            self._namespaces[name] = namespace
        return self._namespaces[name]


@dataclass
class Namespace:
    """What the requests of one tenant have in common."""

    shared: TokenTrie | None  # earlier answers and indexed documents
    acceptance: Acceptance = field(default_factory=Acceptance)

    def remember(self, tokens: Sequence[int]) -> None:
        if self.shared is not None:
            self.shared.extend(tokens)
            self.shared.end_sequence()

    def load(self, answers: Iterable[Sequence[int]]) -> None:
        """Remember many, several at a time: long sequences are indexed ten times as fast as short
        ones."""
        together: list[int] = []
        num_at_once = min(self.shared.max_tokens // 8, 1 << 14) if self.shared is not None else 0
        for tokens in answers:
            together += (*tokens, SEPARATOR)
            if len(together) > num_at_once:
                self.remember(together)
                together = []
        self.remember(together)


_PATIENCE = 8  # misses in a row before the last token alone is looked up once in as many steps
_NUM_UNREAD = 4  # tokens that are indexed together
_HEADROOM = 2048  # tokens of answer that the prompt's index has room for
_NUM_REMATCHES = 3  # occurrences looked at for a guess
_REMATCH_LEN = 4  # a guess is looked up where this many tokens agree
_USED_MATCH_LEN = 4  # a shorter match in a remembered text does not count as a use of it


class TrieRequest:
    """One running answer of a TrieDrafter.

    Where drafts bring nothing any more (none found, none right, or none worth their rows, 8 steps
    in a row), only the last two tokens and more are looked up, and the last one alone at every
    eighth step, until a draft brings a token again.
    """

    def __init__(self, drafter: TrieDrafter, name: str) -> None:
        self._drafter = drafter
        self._name, self._namespace = name, drafter.namespace(name)
        self.own = TokenTrie(drafter.branch_length)  # prompt and answer
        self._sources: list[Source] = []  # of the run that begins at ...
        self._run_starts: list[int] = []
        self._recent: list[int] = []
        self._answer: list[int] = []  # and the `prompt_tokens` before it
        self._num_indexed = 0  # of these, in `own` already
        self._num_misses = 0

    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        if not tokens:
            return
        if source is Source.PROMPT:
            self.index()
            self.own.reserve(len(tokens) + _HEADROOM)
            self._index(tokens, source)
            self._keep_prompt_end(tokens)
            self._recent += tokens[-self.own.query_length :]
        else:
            self._answer += tokens
            self._recent += tokens

    def _keep_prompt_end(self, tokens: Sequence[int]) -> None:
        """Of a prompt, as many last tokens as the drafter may remember in front of the answer."""
        num_kept = self._drafter.prompt_tokens
        text = [*self._answer, *tokens]
        self._answer = text[len(text) - min(num_kept, len(text)) :]
        self._num_indexed = len(self._answer)

    def index(self) -> None:
        """Index what was written since the last time."""
        num_written = len(self._answer)
        if num_written > self._num_indexed:
            self._index(self._answer[self._num_indexed :], Source.OUTPUT)
            self._num_indexed = num_written

    def _index(self, tokens: Sequence[int], source: Source) -> None:
        if not self._sources or self._sources[-1] is not source:
            self._sources.append(source)
            self._run_starts.append(self.own.end)
        self.own.extend(tokens)
        del self._recent[: -self.own.query_length]

    def propose(self, max_nodes: int, step: Step | None = None) -> Draft:
        if max_nodes < 1:
            return Draft.EMPTY
        if len(self._answer) - self._num_indexed >= _NUM_UNREAD:
            self.index()
        misses = self._num_misses
        min_length = 1 if misses < _PATIENCE or misses % _PATIENCE == 0 else 2
        branches = self._own_branches(min_length) + self._shared_branches(min_length)
        if not branches:
            return Draft.EMPTY
        drafter, acceptance = self._drafter, self._namespace.acceptance
        return grow(
            branches,
            acceptance,
            max_nodes,
            drafter.mode,
            drafter.decay,
            self,
            drafter.branch_length,
            step,
        )

    def find(self, path: Sequence[int]) -> list[Branch]:
        """What follows the text and these guesses elsewhere, where several tokens agree."""
        found = self.own.match([*self._recent, *path], _NUM_REMATCHES, 8, _REMATCH_LEN)
        return self._read(found, len(path))

    def feedback(self, draft: Draft, tokens: Sequence[int]) -> None:
        if len(draft):
            self._namespace.acceptance.learn(draft, tokens)
        self._num_misses = 0 if len(draft) and len(tokens) > 1 else self._num_misses + 1

    def stop(self, *, remember: bool = False) -> None:
        if remember and self._drafter.capacity_bytes:
            self._drafter.remember(self._answer, self._name)
        self.own.clear()
        for tokens in (self._recent, self._answer):
            tokens.clear()
        self._num_indexed = 0
        self._sources.clear()
        self._run_starts.clear()

    def _own_branches(self, min_length: int) -> list[Branch]:
        max_matches = self._drafter.max_matches
        return self._read(self.own.match(self._recent, max_matches, min_length=min_length))

    def _read(self, matches: list[Match], depth: int = 0) -> list[Branch]:
        branch, sources, starts = self.own.branch, self._sources, self._run_starts
        return [
            Branch(branch(at), sources[bisect(starts, at) - 1], match_len, at, depth)
            for at, match_len in matches
        ]

    def _shared_branches(self, min_length: int) -> list[Branch]:
        shared = self._namespace.shared
        if shared is None or not len(shared):
            return []
        max_matches = self._drafter.max_matches
        matches = shared.match(self._recent, max_matches, min_length=min_length)
        if matches and matches[0][1] >= _USED_MATCH_LEN:
            shared.touch(matches[0][0])
        return [
            Branch(shared.branch(position), Source.MEMORY, match_len, position)
            for position, match_len in matches
        ]
