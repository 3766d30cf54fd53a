"""Verification: which part of a draft the model itself would have written (arXiv 2312.12728,
section 3.3)."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from lazyahead.draft.tree import ROOT, Draft


class Walk(NamedTuple):
    """What one step adds to the answer.

    `tokens` are the answer's next tokens; the last one is new to the model and becomes the root row
    of the next step. `nodes` are the draft nodes, top down, whose rows hold the KV of all of
    `tokens` but the last: `len(tokens) == len(nodes) + 1`.
    """

    tokens: list[int]
    nodes: list[int]


def walk(
    draft: Draft,
    pick: Callable[[int, Sequence[int]], int],
    stop: Callable[[int], bool] | None = None,
    blocked: Collection[int] = (),
) -> Walk:
    """Follow the model's own choices through the draft as far as they agree.

    `pick(node, tokens)` is the token that the model chooses after the row of `node` (-1: the root
    row), where `tokens` are those already accepted in this step; it is asked once a row, top down,
    and never below a disagreement. The last token picked is the paper's bonus. The walk ends with a
    token for which `stop` holds.

    The row of a `blocked` node must not be used (it lacks a revival): a pick that leads there is
    accepted as a token, but the walk ends with it and its node is not in `nodes`, so that it is
    computed anew as the next root.

    Branches with equal prefixes (a draft of mode "parallel") are followed side by side; `nodes` is
    the longest of them.
    """
    tokens: list[int] = []
    node, alive = ROOT, [ROOT]
    while True:
        token = pick(node, tokens)
        tokens.append(token)
        alive = [c for a in alive for c in draft.children[a] if draft.token_ids[c] == token]
        if not alive or alive[0] in blocked or (stop is not None and stop(token)):
            return Walk(tokens, draft.path(node))
        node = alive[0]
