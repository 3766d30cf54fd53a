"""Drafts and their verification."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyahead.draft.tree import ROOT, Draft
from lazyahead.draft.verify import walk


@st.composite
def drafts(draw, max_nodes=20, vocabulary=3):
    n = draw(st.integers(0, max_nodes))
    parents = [draw(st.integers(ROOT, i - 1)) for i in range(n)]
    return Draft([draw(st.integers(0, vocabulary - 1)) for _ in range(n)], parents)


def model_after(prefix):
    """A pretend model: the next token is a function of all before it."""
    return hash((17, *prefix)) % 3


@given(drafts())
def test_ancestors_are_what_parents_say(draft):
    for i in range(len(draft)):
        assert np.flatnonzero(draft.ancestors[i]).tolist() == sorted(draft.path(i))
        assert draft.depths[i] == len(draft.path(i))
        assert i in draft.children[draft.parents[i]]
    assert draft.ancestors.shape == (len(draft), len(draft))
    assert sum(map(len, draft.children)) == len(draft)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [-1]), "2 token_ids but 1 parents"),
        (([1], [0]), "parent 0 of node 0"),
        (([1, 2], [-1, -2]), "parent -2 of node 1"),
        (([1, -5], [-1, 0]), "-5 is negative"),
        (([1], [-1], (), (), [0.1, 0.2]), "2 probs"),
    ],
)
def test_drafts_that_are_no_forest_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Draft(*arguments)


def test_the_empty_draft_has_no_rows():
    assert len(Draft.EMPTY) == 0
    assert Draft.EMPTY.ancestors.shape == (0, 0)
    assert walk(Draft.EMPTY, lambda node, tokens: 5) == ([5], [])


def test_the_best_nodes_keep_their_parents_and_their_order():
    draft = Draft([1, 2, 3, 4, 5], [-1, 0, 1, 0, -1], probs=[0.9, 0.8, 0.2, 0.5, 0.6])
    assert draft.best(4) == Draft([1, 2, 4, 5], [-1, 0, 0, -1], probs=[0.9, 0.8, 0.5, 0.6])
    assert draft.best(9) is draft
    assert len(draft.best(0)) == 0


@given(drafts(), st.integers(0, 20))
def test_any_cut_of_a_draft_is_a_draft(draft, num_nodes):
    cut = draft.best(num_nodes)
    assert len(cut) == min(num_nodes, len(draft))
    paths = {tuple(draft.token_ids[j] for j in draft.path(i)) for i in range(len(draft))}
    assert all(tuple(cut.token_ids[j] for j in cut.path(i)) in paths for i in range(len(cut)))


@given(st.lists(drafts(), min_size=1, max_size=8))
def test_whatever_is_drafted_the_text_is_the_models_own(proposed):
    text = []

    def pick(_, tokens):
        return model_after([*text, *tokens])

    for draft in proposed:
        text += walk(draft, pick).tokens
    for i, token in enumerate(text):
        assert token == model_after(text[:i])


@given(drafts())
def test_the_accepted_run_is_the_longest_branch_the_model_agrees_with(draft):
    asked = []

    def pick(node, tokens):
        asked.append(node)
        assert [draft.token_ids[i] for i in (draft.path(node) if node != ROOT else [])] == list(
            tokens
        )
        return model_after(tokens)

    step = walk(draft, pick)
    agreed = [i for i in range(len(draft)) if all(_agrees(draft, j) for j in draft.path(i))]
    assert (
        len(step.nodes) == max((draft.depths[i] for i in agreed), default=0) == len(step.tokens) - 1
    )
    assert step.nodes == (draft.path(step.nodes[-1]) if step.nodes else [])
    assert [draft.token_ids[i] for i in step.nodes] == step.tokens[:-1]
    assert len(asked) == len(step.tokens)


def _agrees(draft, node):
    tokens = [draft.token_ids[i] for i in draft.path(node)]
    return model_after(tokens[:-1]) == tokens[-1]


CHAIN = Draft([7, 8, 9], [-1, 0, 1])


def test_a_stop_token_ends_the_run_exactly_there():
    step = walk(
        CHAIN, lambda node, tokens: [7, 8, 9, 10][len(tokens)], stop=lambda token: token == 8
    )
    assert step == ([7, 8], [0])


def test_a_blocked_row_is_never_asked_and_its_token_is_the_next_root():
    asked = []

    def pick(node, tokens):
        asked.append(node)
        return [7, 8, 9, 10][len(tokens)]

    assert walk(CHAIN, pick, blocked={1}) == ([7, 8], [0])
    assert asked == [-1, 0]


def test_a_blocked_row_that_is_not_reached_changes_nothing():
    assert walk(CHAIN, lambda node, tokens: [7, 5][len(tokens)], blocked={1, 2}) == ([7, 5], [0])


def test_branches_side_by_side_are_followed_to_the_longest():
    parallel = Draft([7, 8, 7, 9, 10], [-1, 0, -1, 2, 3])
    assert walk(parallel, lambda node, tokens: [7, 9, 10, 11][len(tokens)]) == (
        [7, 9, 10, 11],
        [2, 3, 4],
    )
