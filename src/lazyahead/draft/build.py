"""The drafter that a config asks for."""

from lazyahead.config import Lookahead
from lazyahead.draft.drafter import Drafter, NoDrafter
from lazyahead.draft.trie_drafter import TrieDrafter


def drafter_for(decode: Lookahead | None) -> Drafter:
    """A trie for `Lookahead`, nothing for None."""
    if decode is None:
        return NoDrafter()
    return TrieDrafter(decode.branch_length, decode.mode, capacity_bytes=decode.capacity_bytes)
