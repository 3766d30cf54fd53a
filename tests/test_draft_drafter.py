"""What the drafters guess."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyahead.draft.budget import RowCost, Step, choose
from lazyahead.draft.drafter import NoDrafter, PromptLookupDrafter
from lazyahead.draft.replay import replay
from lazyahead.draft.tree import ROOT, Draft, Source
from lazyahead.draft.trie_drafter import TrieDrafter
from lazyahead.errors import ConfigError

MODES = ["hierarchical", "parallel", "single"]
AMX = RowCost([(1, 0.02), (32, 0.0208), (64, 0.0292)])
FP32 = RowCost([(1, 0.02), (3, 0.0204), (4, 0.042), (8, 0.064), (16, 0.12)])
texts = st.lists(st.integers(0, 3), max_size=80)


def branches(draft):
    """The token paths from the root to each leaf."""
    leaves = [i for i in range(len(draft)) if not draft.children[i]]
    return [[draft.token_ids[j] for j in draft.path(i)] for i in leaves]


def contains(text, part):
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


@given(texts, st.integers(1, 30), st.sampled_from(MODES))
def test_every_guess_follows_what_stands_before_it_somewhere_in_the_text(prompt, max_nodes, mode):
    draft = TrieDrafter(8, mode).start(prompt).propose(max_nodes)
    assert len(draft) <= max_nodes
    for branch in branches(draft):
        assert len(branch) <= 8
        assert all(contains(prompt, list(pair)) for pair in pairwise([prompt[-1], *branch]))


@given(texts, st.integers(1, 30))
def test_prefixes_are_merged_and_likelier_nodes_come_first(prompt, max_nodes):
    draft = TrieDrafter().start(prompt).propose(max_nodes)
    for siblings in draft.children:
        assert len({draft.token_ids[i] for i in siblings}) == len(siblings)
        chances = [draft.probs[i] for i in siblings]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) <= 1.0 + 1e-9
    for i, parent in enumerate(draft.parents):
        assert (
            draft.children[parent][0] != i or parent == i - 1
        )  # the likeliest child is the very next row
        assert parent == ROOT or draft.probs[i] <= draft.probs[parent]


@given(texts)
def test_one_branch_is_a_chain_and_branches_side_by_side_share_nothing(prompt):
    single = TrieDrafter(mode="single").start(prompt).propose(20)
    assert list(single.parents) == list(range(-1, len(single) - 1))
    parallel = TrieDrafter(mode="parallel").start(prompt).propose(20)
    assert all(len(children) <= 1 for children in parallel.children[:-1])


def test_a_long_match_becomes_one_deep_branch_and_short_ones_become_several():
    passage = list(range(100, 130))
    sure = TrieDrafter().start([*passage, 1, 2, *passage[:12]]).propose(16)
    assert branches(sure)[0] == passage[12:28]
    unsure = TrieDrafter().start([9, 1, 5, 9, 2, 6, 9, 3, 7, 9]).propose(16)
    assert {branch[0] for branch in branches(unsure)} == {1, 2, 3}


def test_what_followed_more_often_is_likelier():
    prompt = [30, 7, 1, 31, 7, 2, 32, 7, 2, 33, 7, 2, 34, 7]
    draft = TrieDrafter(decay=1.0).start(prompt).propose(16)
    first = {draft.token_ids[i]: draft.probs[i] for i in draft.children[ROOT]}
    assert first[2] > first[1]


def test_what_followed_lately_is_likelier_when_older_votes_decay():
    draft = TrieDrafter(decay=0.5).start([7, 1, 7, 1, 7, 2, 7]).propose(16)
    assert draft.token_ids[0] == 2


@pytest.mark.parametrize("num_answers", [5, 50, 500])
def test_history_never_crowds_out_the_text_at_hand(num_answers):
    drafter, rng = TrieDrafter(), random.Random(0)
    key = [1, 2, 3, 4]
    for _ in range(num_answers):
        drafter.remember([*key, *(rng.randrange(100, 1000) for _ in range(20))])
    prompt = [*key, 50, 51, 52, 53, 54, 55, 56, 57, 9, 9, *key]
    for max_nodes in (4, 8, 16):
        draft = drafter.start(prompt).propose(max_nodes)
        mine = [i for i in range(len(draft)) if draft.sources[i] is Source.PROMPT]
        assert [draft.token_ids[i] for i in mine][:3] == [50, 51, 52]


def test_a_request_leaves_nothing_behind_unless_asked():
    drafter = TrieDrafter(prompt_tokens=3)
    for remember in (False, True):
        request = drafter.start([1, 2, 3])
        request.extend([4, 5, 6])
        request.stop(remember=remember)
        draft = drafter.start([4, 5]).propose(8)
        assert list(draft.token_ids) == ([6] if remember else [])
    assert list(drafter.start([1, 2]).propose(8).token_ids) == [
        3,
        4,
        5,
        6,
    ]  # the prompt's end leads to its answer
    drafter.forget()
    assert drafter.start([4, 5]).propose(8) == Draft.EMPTY


def test_acceptance_is_learned_between_requests_that_share_no_text():
    drafter = TrieDrafter(capacity_bytes=0)
    first = drafter.namespace().acceptance.rates(Source.PROMPT, 4)[0]
    replay(drafter, [([1, 2, 3, 4, 9, 1, 2, 3, 4], [9, 1, 2, 3, 4] * 10)])
    assert drafter.namespace().shared is None
    assert drafter.namespace().acceptance.rates(Source.PROMPT, 4)[0] != first
    assert drafter.start([1, 2, 3]).propose(8) == TrieDrafter().start([1, 2, 3]).propose(8)


def test_a_running_answer_is_drafted_from_too_and_sources_are_told_apart():
    drafter = TrieDrafter()
    drafter.remember([7, 30, 31])
    request = drafter.start([7, 10, 11, 5])
    request.extend([7, 20, 21, 5, 7])
    draft = request.propose(20)
    assert {draft.token_ids[i]: draft.sources[i] for i in draft.children[ROOT]} == {
        10: Source.PROMPT,
        20: Source.OUTPUT,
        30: Source.MEMORY,
    }
    assert draft.match_lens[draft.token_ids.index(20)] == 2
    assert draft.match_lens[draft.token_ids.index(10)] == 1


def test_a_prompt_may_come_in_chunks_and_the_next_turn_after_an_answer():
    whole, parts = TrieDrafter().start([1, 2, 3, 4, 1]), TrieDrafter().start()
    for chunk in ([1, 2], [], [3, 4, 1]):
        parts.extend(chunk, Source.PROMPT)
    assert whole.propose(9) == parts.propose(9)
    parts.extend([8, 9])
    parts.extend([8], Source.PROMPT)
    assert parts.propose(9).sources[0] is Source.OUTPUT


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), texts), max_size=8), texts)
def test_a_namespace_never_influences_the_drafts_of_another(history, prompt):
    alone, shared = TrieDrafter(), TrieDrafter()
    for namespace, text in history:
        shared.remember(text, namespace)
        request = shared.start(text, namespace)
        request.feedback(request.propose(8), [1, 2, 3])
        if namespace == "a":
            alone.remember(text, namespace)
            request = alone.start(text, namespace)
            request.feedback(request.propose(8), [1, 2, 3])
    assert alone.start(prompt, "a").propose(16) == shared.start(prompt, "a").propose(16)


@pytest.mark.parametrize("prompt", [[], [0], [3], [0] * 50, list(range(100_000))])
def test_prompts_of_any_length_are_fine(prompt):
    request = TrieDrafter().start(prompt)
    request.propose(16)
    request.extend([0, 0, 1])
    assert len(request.propose(16)) <= 16
    request.stop()


@given(texts, st.sampled_from([AMX, FP32]))
def test_what_is_verified_is_the_same_where_guesses_that_cannot_pay_are_left_out(prompt, cost):
    whole, cut = (TrieDrafter(8).start(prompt).propose(64, *step) for step in ((), (Step(cost),)))
    assert len(cut) <= len(whole)
    counts = [choose([draft.probs], cost)[0] for draft in (whole, cut)]
    assert counts[0] == counts[1]
    best = [draft.best(count) for draft, count in zip((whole, cut), counts, strict=True)]
    assert list(best[0].probs) == pytest.approx(list(best[1].probs))
    assert (
        list(cut.token_ids)[:1] == list(whole.token_ids)[:1]
    )  # the likeliest is judged also where it cannot pay


@given(texts, st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8))
def test_text_that_is_noted_first_and_read_later_is_guessed_from_alike(prompt, parts):
    eager, late = TrieDrafter(8).start(prompt), TrieDrafter(8).start(prompt)
    for part in parts:
        eager.extend(part)
        eager.propose(8)
        late.extend(part)
    eager.index()
    late.index()
    assert eager.propose(32) == late.propose(32)


def test_no_room_means_no_draft():
    assert TrieDrafter().start([1, 1, 1]).propose(0) == Draft.EMPTY


def proposals(request, num_steps):
    """Steps with a draft, of so many in which it is wrong."""
    num = 0
    for _ in range(num_steps):
        draft = request.propose(8)
        num += len(draft) > 0
        request.feedback(draft, [99])
    return num


def test_where_drafts_bring_nothing_the_last_token_alone_is_seldom_looked_up():
    request = TrieDrafter().start([1, 2, 3, 1])
    assert proposals(request, 8) == 8
    assert proposals(request, 16) == 2
    while not len(draft := request.propose(8)):
        request.feedback(draft, [99])
    request.feedback(draft, [2, 5])
    assert proposals(request, 8) == 8


def test_where_drafts_bring_nothing_two_tokens_are_looked_up_all_the_same():
    request = TrieDrafter().start([1, 2, 3, 1])
    proposals(request, 24)
    request.extend([2])
    assert len(request.propose(8))


@pytest.mark.parametrize("cost", [AMX, FP32])
@pytest.mark.parametrize("vocabulary", [20, 1000])
def test_random_text_costs_less_than_two_percent(cost, vocabulary):
    rng = random.Random(0)
    text = [rng.randrange(vocabulary) for _ in range(2000)]
    result = replay(TrieDrafter(), [(text[:1000], text[1000:])], cost)
    assert result.modelled_s < 1.02 * result.modelled_plain_s


@pytest.mark.parametrize("cost", [AMX, FP32])
def test_copied_text_pays_as_much_as_the_rows_allow(cost):
    rng = random.Random(0)
    prompt = [rng.randrange(1000) for _ in range(1000)]
    result = replay(TrieDrafter(), [(prompt, prompt[200:500])], cost)
    assert result.modelled_plain_s / result.modelled_s > (9 if cost is AMX else 2.5)


def test_no_drafter_makes_one_token_a_step():
    result = replay(NoDrafter(), [([1, 2], [1, 2] * 10)])
    assert (result.tokens_per_step, result.num_drafted) == (1.0, 0)


def left_most_lookup(text, max_ngram, num_tokens):
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        for i in range(len(text) - n):
            if text[i : i + n] == text[-n:]:
                return text[i + n : i + n + num_tokens]
    return []


@given(texts, st.integers(1, 3))
def test_prompt_lookup_takes_the_left_most_occurrence_of_the_longest_ngram(text, max_ngram):
    draft = PromptLookupDrafter(5, max_ngram).start(text).propose(64)
    assert list(draft.token_ids) == left_most_lookup(text, max_ngram, 5)


def test_remembered_answers_help_the_next_ones():
    rng = random.Random(0)
    answer = [rng.randrange(1000) for _ in range(100)]
    forgetful, mindful = (
        replay(TrieDrafter(), [([1], answer)] * 3, AMX, remember=r) for r in (False, True)
    )
    assert forgetful.tokens_per_step < 1.1
    assert mindful.tokens_per_step > 2.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "tree"},
        {"max_matches": 0},
        {"decay": 0.0},
        {"decay": 1.5},
        {"branch_length": 0},
        {"branch_length": 999},
        {"capacity_bytes": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused_where_they_are_given(arguments):
    with pytest.raises(ConfigError, match=str(next(iter(arguments.values())))):
        TrieDrafter(**arguments)
