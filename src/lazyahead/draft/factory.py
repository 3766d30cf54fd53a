"""The drafter that a config asks for."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lazyahead.draft.adapter import as_drafter
from lazyahead.draft.answers import AnswerLog, Owner
from lazyahead.draft.config import Lookahead
from lazyahead.draft.drafter import Drafter, NoDrafter
from lazyahead.draft.trie import TokenTrie
from lazyahead.draft.trie_drafter import TrieDrafter
from lazyahead.errors import ConfigError

_NAMES: dict[str, Lookahead | None] = {"lookahead": Lookahead(), "off": None}


class Strategy(NamedTuple):
    """What an engine decodes by. `config` None: token by token."""

    config: Lookahead | None
    drafter: Drafter


def parse_decode(decode: str | Lookahead | Drafter | None) -> Lookahead | Drafter | None:
    """`decode` as it is, "lookahead" and "off" as what they stand for. Raises ConfigError for any
    other string."""
    if not isinstance(decode, str):
        return decode
    if decode not in _NAMES:
        raise ConfigError(f"decode is {' or '.join(map(repr, _NAMES))}, got {decode!r}")
    return _NAMES[decode]


def strategy_for(
    decode: Lookahead | Drafter | None,
    owner: Callable[[], Owner] = Owner,
    vocab_size: int | None = None,
) -> Strategy:
    """The config and the drafter of `decode`; a drafter of the caller's own goes with the defaults
    of `Lookahead`. Raises ConfigError for what is none of these, and MemoryFileError."""
    if decode is None or isinstance(decode, Lookahead):
        return Strategy(decode, drafter_for(decode, owner))
    return Strategy(Lookahead(), as_drafter(decode, vocab_size))


def describe(decode: Lookahead | Drafter | None) -> dict[str, Any] | None:
    """Plain values, as benchmarks record them: of a drafter of the caller's own its class and
    `repr`."""
    if decode is None:
        return None
    if isinstance(decode, Lookahead):
        return decode.to_dict()
    kind = type(decode)
    return {"drafter": f"{kind.__module__}:{kind.__qualname__}", "repr": repr(decode)}


def drafter_for(decode: Lookahead | None, owner: Callable[[], Owner] = Owner) -> Drafter:
    """A trie for `Lookahead`, nothing for None. Requests share nothing unless the config names a
    memory.

    `owner` tells whose token ids these are, and is called only then. Raises MemoryFileError.
    """
    if decode is None:
        return NoDrafter()
    mode = decode.mode or "hierarchical"
    if decode.memory is None:
        return TrieDrafter(decode.branch_length, mode, capacity_bytes=0)
    log = open_log(decode.memory, owner(), decode.capacity_bytes)
    drafter = TrieDrafter(
        decode.branch_length,
        mode,
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
