"""The drafter that a config asks for."""

from collections.abc import Callable

from lazyahead.draft.answers import AnswerLog, Owner
from lazyahead.draft.config import Lookahead
from lazyahead.draft.drafter import Drafter, NoDrafter
from lazyahead.draft.trie import TokenTrie
from lazyahead.draft.trie_drafter import TrieDrafter


def drafter_for(decode: Lookahead | None, owner: Callable[[], Owner] = Owner) -> Drafter:
    """A trie for `Lookahead`, nothing for None. Requests share nothing unless the config names a
    memory.

    `owner` tells whose token ids these are, and is called only then. Raises MemoryFileError.
    """
    if decode is None:
        return NoDrafter()
    if decode.memory is None:
        return TrieDrafter(decode.branch_length, decode.mode, capacity_bytes=0)
    log = open_log(decode.memory, owner(), decode.capacity_bytes)
    drafter = TrieDrafter(
        decode.branch_length,
        decode.mode,
        capacity_bytes=decode.capacity_bytes,
        log=log,
        prompt_tokens=decode.memory_prompt_tokens,
    )
    drafter.namespace(decode.namespace)  # read now, not when the first answer waits for it
    return drafter


def open_log(path: str, owner: Owner, capacity_bytes: int) -> AnswerLog:
    """The answers log at `path`, which keeps as many tokens as a trie of `capacity_bytes` holds."""
    num_tokens = TokenTrie(capacity_bytes=capacity_bytes).max_tokens
    return AnswerLog(
        path, model=owner.model, tokenizer=owner.tokenizer, capacity_bytes=4 * num_tokens
    )
