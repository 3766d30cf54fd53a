"""From matches to a draft: the counted sub-trie under the matched suffixes, grown from its likeliest node outwards."""

from collections.abc import Sequence
from heapq import heappop, heappush
from operator import itemgetter
from typing import Literal

from lazyahead.draft.budget import DEPTH_CLASS, Acceptance, length_class
from lazyahead.draft.tree import ROOT, Draft, Source

Mode = Literal["hierarchical", "parallel", "single"]

MIN_PROB = 0.02
"""A node less likely than this is not worth its row."""


_Node = tuple[float, int, int, int, int, "list[Branch]"]
"""(-probability, number, parent, depth, token, branches through it, most trusted first): the likeliest sorts first."""


class Branch:
    """What once followed a suffix of the text at hand; `weight` is its vote on what follows now."""

    __slots__ = ("match_len", "rates", "source", "tokens", "weight")

    def __init__(self, tokens: list[int], source: Source, match_len: int) -> None:
        self.tokens = tokens
        self.source = source
        self.match_len = match_len
        self.weight = 0.0
        self.rates: list[float] = []  # of acceptance, by depth class


def grow(branches: Sequence[Branch], acceptance: Acceptance, max_nodes: int, mode: Mode, decay: float) -> Draft:
    """The at most `max_nodes` likeliest nodes of the trie that the branches (newest first) span.

    "hierarchical" merges equal prefixes, "single" keeps the likeliest branch alone, and "parallel" gives each branch
    its own nodes: the three drafts that the paper compares (arXiv 2312.12728, section 3.2).
    """
    ranked = _weigh(branches, acceptance, decay)
    if mode == "parallel":
        return _depth_first(_side_by_side(ranked, max_nodes))
    heap = _children(ranked, ROOT, 1.0, 1, 0)
    nodes: list[_Node] = []
    num_seen = 0
    while True:
        if mode == "single":
            del heap[1:]
        if not heap or len(nodes) == max_nodes:
            return _depth_first(nodes)
        node = heappop(heap)
        nodes.append(node)
        num_seen += len(ranked)
        minus_prob, _, _, depth, _, through = node
        for child in _children(through, len(nodes) - 1, -minus_prob, depth + 1, num_seen):
            heappush(heap, child)


def _weigh(branches: Sequence[Branch], acceptance: Acceptance, decay: float) -> list[Branch]:
    """Give each branch its vote, and return them most trusted first.

    The branches of one source and length class are one voter: the learned odds that it is right are divided among
    them, the n-th newest getting decay^n. So counts decide within a voter, as in the paper's trie, trust decides
    between voters, and no number of remembered answers can crowd out the text at hand.
    """
    voters: dict[tuple[Source, int], list[Branch]] = {}
    for branch in branches:
        voters.setdefault((branch.source, length_class(branch.match_len)), []).append(branch)
    ranked: list[tuple[float, list[Branch]]] = []
    for voter in voters.values():
        rates = acceptance.rates(voter[0].source, voter[0].match_len)
        ranked.append((rates[0], voter))
        votes = [decay**age for age in range(len(voter))]
        unit = rates[0] / (1.0 - rates[0]) / sum(votes)
        for branch, vote in zip(voter, votes, strict=True):
            branch.weight, branch.rates = unit * vote, rates
    ranked.sort(key=itemgetter(0), reverse=True)
    return [branch for _, voter in ranked for branch in voter]


def _children(branches: list[Branch], parent: int, prob: float, depth: int, number: int) -> list[_Node]:
    """The nodes at `depth` below `parent`, likeliest first, leaving out those that are not worth a row."""
    lead = branches[0]
    if len(branches) == 1:  # the common case deep down
        prob *= lead.rates[DEPTH_CLASS[depth]]
        if depth > len(lead.tokens) or prob < MIN_PROB:
            return []
        return [(-prob, number, parent, depth, lead.tokens[depth - 1], branches)]
    followers: dict[int, list[Branch]] = {}
    votes: dict[int, float] = {}
    for branch in branches:
        if depth <= len(branch.tokens):
            token = branch.tokens[depth - 1]
            if token in votes:
                followers[token].append(branch)
                votes[token] += branch.weight
            else:
                followers[token] = [branch]
                votes[token] = branch.weight
    prob /= sum(votes.values()) or 1.0
    nodes: list[_Node] = []
    for token, vote in votes.items():
        through = followers[token]
        chance = prob * vote * through[0].rates[DEPTH_CLASS[depth]]
        if chance >= MIN_PROB:
            nodes.append((-chance, number + len(nodes), parent, depth, token, through))
    nodes.sort()
    return nodes


def _side_by_side(branches: Sequence[Branch], max_nodes: int) -> list[_Node]:
    nodes: list[_Node] = []
    for branch in branches:
        parent, prob = ROOT, 1.0
        for depth, token in enumerate(branch.tokens, 1):
            prob *= branch.rates[DEPTH_CLASS[depth]]
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
    return Draft(token_ids, parents, sources, match_lens, probs)
