"""The trie against a slow, obvious one, on every input that hypothesis finds."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazyahead.draft import trie as trie_module
from lazyahead.draft.trie import SEPARATOR, TokenTrie
from lazyahead.errors import ConfigError

ALL = 10**9
SMALLEST = 2048 * 36  # bytes
tokens = st.lists(st.integers(0, 4), max_size=40)
texts = st.lists(tokens, max_size=5)


def held_text(trie: TokenTrie) -> dict[int, int]:
    """Position -> token of everything the trie holds."""
    return {p: trie._tokens[p & trie._mask] for p in range(trie._start, trie._end)}


def brute_force_matches(
    text: dict[int, int], query: list[int], query_length: int
) -> list[tuple[int, int]]:
    """Every position that follows some suffix of the query, longest match first, newest first among
    equals."""
    found = []
    for position, token in text.items():
        length = 0
        while (
            length < min(query_length, len(query))
            and text.get(position - 1 - length) == query[-1 - length]
        ):
            length += 1
        if length and token != SEPARATOR:
            found.append((position, length))
    return sorted(found, key=lambda match: (-match[1], -match[0]))


class PaperTrie:
    """The paper's: a counted node per (position, depth)."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.counts: Counter[tuple[int, ...]] = Counter()

    def insert(self, sequence: list[int]) -> None:
        for i in range(len(sequence)):
            for n in range(1, self.depth + 1):
                if i + n <= len(sequence):
                    self.counts[tuple(sequence[i : i + n])] += 1

    def below(self, suffix: list[int], depth: int) -> dict[tuple[int, ...], int]:
        """The counted sub-trie under a suffix, as path -> count."""
        n = len(suffix)
        return {
            k[n:]: c
            for k, c in self.counts.items()
            if k[:n] == tuple(suffix) and n < len(k) <= n + depth
        }


@given(texts, tokens, st.integers(1, 12))
def test_matches_are_all_occurrences_of_all_suffixes_longest_first(texts, query, query_length):
    trie = TokenTrie(query_length=query_length)
    for text in texts:
        trie.extend(text)
        trie.end_sequence()
    assert trie.match(query, ALL, ALL) == brute_force_matches(held_text(trie), query, query_length)


@given(texts, st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_branches_below_a_suffix_are_the_papers_counted_sub_trie(texts, suffix, branch_length):
    trie, paper = TokenTrie(branch_length), PaperTrie(len(suffix) + branch_length)
    for text in texts:
        trie.extend(text)
        trie.end_sequence()
        paper.insert(text)
    counts: Counter[tuple[int, ...]] = Counter()
    for position, length in trie.match(suffix, ALL, ALL):
        if length == len(suffix):
            branch = trie.branch(position)
            counts.update(tuple(branch[:n]) for n in range(1, len(branch) + 1))
    assert counts == paper.below(suffix, branch_length)


@given(st.lists(st.integers(0, 3), max_size=60), tokens, st.integers(1, 6))
def test_a_limit_keeps_the_newest_matches_of_the_highest_orders(text, query, limit):
    trie = TokenTrie()
    trie.extend(text)
    every, some = trie.match(query, ALL, ALL), trie.match(query, limit)
    assert set(some) <= set(every)
    assert len(some) == min(limit, len(every))
    orders = [max(order for order in trie_module.ORDERS if order <= length) for _, length in every]
    by_order = sorted(zip(orders, every, strict=True), key=lambda pair: (-pair[0], -pair[1][0]))
    assert set(some) == {match for _, match in by_order[:limit]}


@given(st.lists(st.integers(0, 4), max_size=400), st.data())
def test_chunks_of_any_size_give_the_same_index(text, data):
    whole, parts = TokenTrie(), TokenTrie()
    whole.extend(text)
    i = 0
    while i < len(text):
        n = data.draw(st.integers(1, 120))
        parts.extend(text[i : i + n])
        i += n
    assert held_text(whole) == held_text(parts)
    assert [list(older) for older in whole._older] == [list(older) for older in parts._older]
    assert [list(heads) for heads in whole._heads] == [list(heads) for heads in parts._heads]


def test_growing_keeps_every_match():
    rng = random.Random(0)
    text = [rng.randrange(50) for _ in range(9000)]
    trie, roomy = TokenTrie(), TokenTrie()
    roomy.reserve(20_000)
    for i in range(0, len(text), 700):
        trie.extend(text[i : i + 700])
        roomy.extend(text[i : i + 700])
    for end in range(100, 9000, 333):
        expected = brute_force_matches(held_text(trie), text[:end], 32)
        assert trie.match(text[:end], ALL, ALL) == roomy.match(text[:end], ALL, ALL) == expected


@pytest.mark.parametrize("text", [[], [0], [7], [0, 0], [5, 0, 5]])
def test_texts_shorter_than_the_query_or_empty_are_fine(text):
    trie = TokenTrie()
    trie.extend(text)
    assert trie.match([1, 2, 3] * 20) == []
    assert trie.match([]) == []
    assert trie.match([9] * 10 + text[:1]) == ([(9, 1)] if len(text) > 1 else [])


def test_token_zero_and_end_of_text_ids_are_tokens_like_others():
    eos = 2
    trie = TokenTrie()
    trie.extend([0, 0, eos, 0, 7, eos, 8, 9])
    assert trie.branch(trie.match([eos, 0])[0][0]) == [7, eos, 8, 9]
    assert trie.branch(trie.match([0, 7, eos])[0][0]) == [8, 9]


def test_a_hundred_thousand_tokens_are_found_at_once_and_by_their_longest_match():
    rng = random.Random(1)
    text = [rng.randrange(1000) for _ in range(100_000)]
    trie = TokenTrie()
    trie.extend(text)
    for i in range(50, 99_000, 5003):
        assert (i + 8, 32) in trie.match(text[:i])
        assert trie.branch(i + 8) == text[i : i + 16]


def test_memory_is_below_200_bytes_a_token():
    for num_tokens in (4096, 5000, 32_768, 40_000):
        trie = TokenTrie()
        trie.extend([i % 1000 for i in range(num_tokens)])
        assert trie.nbytes / num_tokens < 200


@pytest.mark.parametrize("most", [3, 40, 700])
def test_a_trie_that_grows_loses_no_token(most):
    trie, rng, text = TokenTrie(), random.Random(0), []
    while len(text) < 3000:
        added = [rng.randrange(50) for _ in range(rng.randrange(1, most))]
        trie.extend(added)
        text += added
        assert list(held_text(trie).values()) == text


def test_a_touched_sequence_stays_when_others_leave():
    trie = TokenTrie(capacity_bytes=SMALLEST)
    favourite, rng = [10**6 + i for i in range(40)], random.Random(0)
    trie.extend(favourite)
    trie.end_sequence()
    for _ in range(100):
        matches = trie.match(favourite[:8])
        assert trie.branch(matches[0][0]) == favourite[8:24]
        trie.touch(matches[0][0])
        trie.extend([rng.randrange(1000) for _ in range(150)])
        trie.end_sequence()
    for _ in range(40):
        trie.extend([rng.randrange(1000) for _ in range(150)])
        trie.end_sequence()
    assert trie.match(favourite[:8]) == []


def test_positions_are_renumbered_before_they_outgrow_their_bits(monkeypatch):
    monkeypatch.setattr(trie_module, "_LAST_POSITION", 20_000)
    rng = random.Random(0)
    trie = TokenTrie(capacity_bytes=SMALLEST)
    for _ in range(300):
        text = [rng.randrange(4) for _ in range(rng.randrange(200))]
        trie.extend(text)
        assert trie.end <= 20_000
        assert trie.match(text, ALL, ALL) == brute_force_matches(held_text(trie), text, 32)


@pytest.mark.parametrize(
    "arguments", [{"branch_length": 0}, {"query_length": 0}, {"capacity_bytes": 1000}]
)
def test_sizes_that_mean_nothing_are_refused(arguments):
    with pytest.raises(ConfigError, match=str(next(iter(arguments.values())))):
        TokenTrie(**arguments)


class BoundedTrie(RuleBasedStateMachine):
    """Insert, extend, touch, end, clear in any order under a capacity that is soon reached."""

    def __init__(self) -> None:
        super().__init__()
        self.trie = TokenTrie(capacity_bytes=SMALLEST)
        self.text: list[int] = []  # of everything since the last clear
        self.rng = random.Random(0)

    @rule(
        seed=st.integers(0, 1000), length=st.integers(0, 900), vocabulary=st.sampled_from([3, 50])
    )
    def extend(self, seed, length, vocabulary):
        rng = random.Random(seed)
        added = [rng.randrange(vocabulary) for _ in range(length)]
        if (
            self.trie._end > self.trie._start
            and self._latest() != SEPARATOR
            and len(self.trie) + length > 1900
        ):
            self.trie.end_sequence()  # evicting in the middle of a sequence may cut it
            self.text.append(SEPARATOR)
        self.trie.extend(added)
        self.text += added

    @rule()
    def end_sequence(self):
        self.trie.end_sequence()
        self.text.append(SEPARATOR)

    @precondition(lambda self: len(self.trie) > 1)
    @rule(fraction=st.floats(0, 0.99))
    def touch(self, fraction):
        self.trie.touch(self.trie._start + int(fraction * len(self.trie)))

    @rule()
    def clear(self):
        self.trie.clear()
        self.text = []

    def _latest(self) -> int:
        return self.trie._tokens[(self.trie._end - 1) & self.trie._mask]

    @invariant()
    def matches_are_those_of_the_text_held(self):
        query = [token for token in self.text[-60:] if token != SEPARATOR]
        expected = brute_force_matches(held_text(self.trie), query, 32)
        assert self.trie.match(query, ALL, ALL) == expected

    @invariant()
    def what_is_held_was_inserted(self):
        inserted = " " + " ".join(map(str, self.text)) + " "
        held = " ".join(map(str, held_text(self.trie).values()))
        for run in held.split(str(SEPARATOR)):
            assert f" {run.strip()} " in inserted or not run.strip()

    @invariant()
    def capacity_is_kept(self):
        assert self.trie.nbytes <= SMALLEST
        assert len(self.trie) <= 2048


BoundedTrie.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_a_bounded_trie_stays_true_to_its_text = BoundedTrie.TestCase
