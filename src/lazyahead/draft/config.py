"""The decoding strategy: the whole of its settings, frozen, validated, printable."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lazyahead.checks import check_count
from lazyahead.draft.budget import MAX_DEPTH
from lazyahead.draft.trie import MIN_CAPACITY_BYTES
from lazyahead.errors import ConfigError


@dataclass(frozen=True)
class Lookahead:
    """How an answer is drafted ahead (Lookahead, arXiv 2312.12728). `None` in its place writes
    token by token.

    Raises ConfigError for a setting that cannot mean anything, naming the value.
    """

    decoding_length: int = 64
    """Most draft tokens in one pass. On a GPU a request that runs alone has 15, as many as its
    recorded steps hold."""
    branch_length: int = 16
    """Depth of the trie: most tokens that one pass can accept, the bonus token apart."""
    mode: Literal["hierarchical", "parallel", "single"] | None = None
    """Branches with shared prefixes merged, side by side, or only the best one. None: the best one
    where several make a pass much dearer (bfloat16 on a CPU), else hierarchical."""
    memory: str | None = None
    """File that stores the token ids of answers, to draft later ones from; off unless named. Of
    prompts it holds what `memory_prompt_tokens` says."""
    memory_prompt_tokens: int = 0
    """Last tokens of each prompt that the memory stores in front of the answer, so that the first
    tokens of an answer can be drafted too. They are text of the prompt, and stand in the file as it
    was written. 0: nothing of a prompt is stored."""
    namespace: str = "default"
    """Whose answers these are. A namespace never sees another's."""
    capacity_bytes: int = 64 << 20
    """Most memory that the remembered answers of a namespace may take, 36 bytes a token. The oldest
    leave first."""

    def __post_init__(self) -> None:
        if self.mode not in ("hierarchical", "parallel", "single", None):
            raise ConfigError(f"mode must be hierarchical, parallel or single, got {self.mode!r}")
        for name in ("decoding_length", "branch_length"):
            check_count(name, getattr(self, name), 1)
        for name in ("capacity_bytes", "memory_prompt_tokens"):
            check_count(name, getattr(self, name), 0)
        if self.branch_length > MAX_DEPTH:
            raise ConfigError(
                f"branch_length must be at most {MAX_DEPTH}, got {self.branch_length}"
            )
        if self.capacity_bytes < MIN_CAPACITY_BYTES and (self.capacity_bytes or self.memory):
            raise ConfigError(
                f"capacity_bytes must be at least {MIN_CAPACITY_BYTES}, got {self.capacity_bytes}"
            )
        if self.memory is not None and not (isinstance(self.memory, str) and self.memory):
            raise ConfigError(
                f"memory is the name of a file, got {self.memory!r}; leave it out to remember "
                "nothing"
            )
        if not (isinstance(self.namespace, str) and self.namespace):
            raise ConfigError(
                f"namespace must be some text, got {self.namespace!r}; leave it out for 'default'"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as benchmarks record them."""
        return asdict(self)
