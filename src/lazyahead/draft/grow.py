"""From matches to a draft: the counted sub-trie under the matched suffixes, grown from its
likeliest node outwards."""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Literal, Protocol

from lazyahead.draft.budget import (
    DEPTH_CLASS,
    MAX_DEPTH,
    Acceptance,
    AcceptanceBucket,
    GainTracker,
    Step,
)
from lazyahead.draft.tree import ROOT, Draft, Source

Mode = Literal["hierarchical", "parallel", "single"]

MIN_PROB = 0.02
"""A node less likely than this is not worth its row."""
REMATCH_PROB = 0.1
"""A node less likely than this is not worth a lookup of its own."""

_Node = tuple[float, int, int, int, int, "list[Branch]"]
"""(-probability, number, parent, depth, token, branches through it, most trusted first): the
likeliest sorts first."""


class Finder(Protocol):
    """Looks guesses up as if they had been written."""

    def find(self, path: Sequence[int]) -> "list[Branch]":
        """What follows after the text and these guesses, newest first; branches already followed
        may be among it."""


class Branch:
    """What once followed a suffix of the text at hand, or of the text and guesses; `weight` is its
    vote."""

    __slots__ = ("depth", "kind", "match_len", "position", "source", "tokens", "weight")
    kind: AcceptanceBucket
    weight: float

    def __init__(
        self, tokens: list[int], source: Source, match_len: int, position: int = -1, depth: int = 0
    ) -> None:
        self.tokens = tokens
        self.source = source
        self.match_len = match_len
        self.position = position  # of the first token, where the branch was read
        self.depth = depth  # of the node that its first token follows


def grow(
    branches: Sequence[Branch],
    acceptance: Acceptance,
    max_nodes: int,
    mode: Mode,
    decay: float,
    finder: Finder | None = None,
    max_depth: int = MAX_DEPTH,
    step: Step | None = None,
) -> Draft:
    """The at most `max_nodes` likeliest nodes of the trie that the branches (newest first) span.

    "hierarchical" merges equal prefixes, "single" keeps the likeliest branch alone, and "parallel"
    gives each branch its own nodes: the three drafts that the paper compares (arXiv 2312.12728,
    section 3.2). A likely node is looked up in its turn (`finder`), as if it had been written: what
    follows there joins the branches through it.

    With a `step` no node is followed from where none can pay any more. What was to come next is in
    the draft all the same: it is not verified, but whether it was right is learned.
    """
    ranked = _weigh(branches, acceptance, decay)
    if mode == "parallel":
        return _depth_first(_side_by_side(ranked, max_nodes))
    if mode == "single":
        max_nodes = min(max_nodes, max_depth)
    gain = GainTracker(step, max_nodes) if step is not None else None
    if mode == "single":
        return _likeliest(ranked, acceptance, max_nodes, decay, finder, gain)
    heap: list[_Node] = []
    nodes: list[_Node] = []
    num_seen = 0
    children = _children(ranked, ROOT, 1.0, 1, 0)
    while len(nodes) < max_nodes:
        if len(children) == 1 and not (heap and heap[0] < children[0]):
            node = children[0]  # along a branch, the likeliest node is the next one
        else:
            for child in children:
                heappush(heap, child)
            if not heap:
                break
            node = heappop(heap)
        if gain is not None and not gain.may_pay(-node[0]):
            nodes += sorted([node, *heap])[: max_nodes - len(nodes)]
            break
        nodes.append(node)
        num_seen += len(ranked)
        minus_prob, _, _, depth, _, through = node
        if finder is not None and -minus_prob > REMATCH_PROB:
            lead = through[0]
            if depth - lead.depth >= len(lead.tokens):  # the most trusted branch ends here
                found = finder.find(_path(nodes))
                if found:
                    through = _joined(through, found, depth, acceptance, decay)
                    num_seen += len(through)
        children = (
            _children(through, len(nodes) - 1, -minus_prob, depth + 1, num_seen)
            if depth < max_depth
            else []
        )
    return _depth_first(nodes)


def _likeliest(
    through: list[Branch],
    acceptance: Acceptance,
    max_nodes: int,
    decay: float,
    finder: Finder | None,
    gain: GainTracker | None,
) -> Draft:
    """The likeliest node below each, as `grow` finds it: a chain."""
    token_ids, sources = list[int](), list[Source]()
    match_lens, probs = list[int](), list[float]()
    prob = 1.0
    for depth in range(1, max_nodes + 1):
        children = _children(through, ROOT, prob, depth, 0)
        if not children:
            break
        minus_prob, _, _, _, token, through = children[0]
        prob, lead = -minus_prob, through[0]
        token_ids.append(token)
        probs.append(prob)
        sources.append(lead.source)
        match_lens.append(lead.match_len)
        if gain is not None and not gain.may_pay(prob):
            break
        if finder is not None and prob > REMATCH_PROB and depth - lead.depth >= len(lead.tokens):
            found = finder.find(token_ids)
            if found:
                through = _joined(through, found, depth, acceptance, decay)
    return Draft.unchecked(token_ids, range(ROOT, len(token_ids) - 1), sources, match_lens, probs)


def _path(nodes: Sequence[_Node]) -> list[int]:
    """The guesses down to the last node."""
    path, node = list[int](), len(nodes) - 1
    while node != ROOT:
        path.append(nodes[node][4])
        node = nodes[node][2]
    return path[::-1]


def _joined(
    through: list[Branch], found: Sequence[Branch], depth: int, acceptance: Acceptance, decay: float
) -> list[Branch]:
    """The branches through a node, and of those found there the ones that are new."""
    alive = [branch for branch in through if branch.depth + len(branch.tokens) > depth]
    known = {
        branch.position - branch.depth for branch in alive if branch.source is not Source.MEMORY
    }
    new = [branch for branch in found if branch.position - branch.depth not in known]
    if not new:
        return through
    return sorted([*_weigh(new, acceptance, decay), *alive], key=_trust, reverse=True)


def _trust(branch: Branch) -> tuple[float, int]:
    return branch.kind.trust()


def _weigh(branches: Sequence[Branch], acceptance: Acceptance, decay: float) -> list[Branch]:
    """The branches most trusted first, each with its share of the vote of its kind.

    The branches of one source and length class are one voter, the n-th newest having decay^n of its
    vote. So counts decide within a voter, as in the paper's trie, trust decides between voters, and
    no number of remembered answers can crowd out the text at hand.
    """
    voters: dict[AcceptanceBucket, list[Branch]] = {}
    for branch in branches:
        branch.kind = kind = acceptance.kind(branch.source, branch.match_len)
        if kind in voters:
            branch.weight = decay ** len(voters[kind])
            voters[kind].append(branch)
        else:
            branch.weight = 1.0
            voters[kind] = [branch]
    ranked: list[Branch] = []
    for kind in (
        sorted(voters, key=AcceptanceBucket.trust, reverse=True) if len(voters) > 1 else voters
    ):
        ranked += voters[kind]
    return ranked


def _children(
    branches: list[Branch], parent: int, prob: float, depth: int, number: int
) -> list[_Node]:
    """The nodes at `depth` below `parent`, likeliest first, leaving out those that are not worth a
    row.

    The most trusted voter is right as often as was learned; where it is wrong the next one is
    asked, and so on.
    """
    step = DEPTH_CLASS[depth]
    if len(branches) == 1:  # the common case deep down
        lead = branches[0]
        prob *= lead.kind.rates[step]
        if depth - lead.depth > len(lead.tokens) or prob < MIN_PROB:
            return []
        return [(-prob, number, parent, depth, lead.tokens[depth - lead.depth - 1], branches)]
    followers: dict[int, list[Branch]] = {}
    chances: dict[int, float] = {}
    for votes in _voters(branches, depth - 1):
        rate = votes[0].kind.rates[step]
        share = prob * rate / sum([branch.weight for branch in votes])
        prob *= 1.0 - rate
        for branch in votes:
            token = branch.tokens[depth - 1 - branch.depth]
            if token in chances:
                followers[token].append(branch)
                chances[token] += share * branch.weight
            else:
                followers[token] = [branch]
                chances[token] = share * branch.weight
    nodes: list[_Node] = []
    for token, chance in chances.items():
        if chance >= MIN_PROB:
            nodes.append((-chance, number + len(nodes), parent, depth, token, followers[token]))
    if len(nodes) > 1:
        nodes.sort()
    return nodes


def _voters(branches: list[Branch], depth: int) -> list[list[Branch]]:
    """The branches that go on behind this depth, those of one kind together."""
    voters: list[list[Branch]] = []
    kind: AcceptanceBucket | None = None
    for branch in branches:
        if depth - branch.depth < len(branch.tokens):
            if branch.kind is kind:
                voters[-1].append(branch)
            else:
                voters.append([branch])
                kind = branch.kind
    return voters


def _side_by_side(branches: Sequence[Branch], max_nodes: int) -> list[_Node]:
    nodes: list[_Node] = []
    for branch in branches:
        parent, prob = ROOT, 1.0
        for depth, token in enumerate(branch.tokens, 1):
            prob *= branch.kind.rates[DEPTH_CLASS[depth]]
            if len(nodes) == max_nodes or prob < MIN_PROB:
                break
            nodes.append((-prob, len(nodes), parent, depth, token, [branch]))
            parent = len(nodes) - 1
    return nodes


def _depth_first(nodes: Sequence[_Node]) -> Draft:
    """The draft of these nodes, which come parents first and likelier siblings first."""
    n = len(nodes)
    sizes = [1] * (n + 1)  # of each node's sub-trie; last: the root's
    for i in range(n - 1, -1, -1):
        sizes[nodes[i][2]] += sizes[i]
    free = [0] * (n + 1)  # the first place in each node's sub-trie that is free
    placed = [ROOT] * (n + 1)  # where each node went
    parents, token_ids, match_lens, probs = [ROOT] * n, [0] * n, [0] * n, [0.0] * n
    sources = [Source.PROMPT] * n
    for i, (minus_prob, _, parent, _, token, through) in enumerate(nodes):
        place = free[parent]
        placed[i] = place
        free[parent] += sizes[i]
        free[i] = place + 1
        parents[place] = placed[parent]
        token_ids[place], probs[place] = token, -minus_prob
        sources[place], match_lens[place] = through[0].source, through[0].match_len
    return Draft.unchecked(token_ids, parents, sources, match_lens, probs)
