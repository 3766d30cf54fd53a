"""Row costs, the choice of rows, and learned acceptance."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyahead.draft.budget import Acceptance, GainTracker, RowCost, Step, choose
from lazyahead.draft.tree import Draft, Source
from lazyahead.errors import ConfigError

costs = st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=6).map(
    RowCost
)
probs = st.lists(st.floats(0.0, 1.0), max_size=8)
FREE = RowCost([(1, 0.02)])
PER_ROW = RowCost([(1, 1.0), (2, 2.0)])


def test_cost_is_a_line_between_measurements_and_goes_on_beyond_them():
    cost = RowCost([(8, 0.2), (1, 0.1), (4, 0.1)])
    assert cost(1) == cost(3) == cost(4) == 1.0
    assert cost(6) == pytest.approx(1.5)
    assert cost(12) == pytest.approx(3.0)
    assert cost.seconds(8) == pytest.approx(0.2)


@given(costs, st.integers(1, 60))
def test_more_rows_never_cost_less(cost, rows):
    assert cost(rows) <= cost(rows + 1)
    assert cost(1) == 1.0


@given(costs)
def test_a_row_cost_survives_json(cost):
    assert RowCost.from_json(cost.to_json()) == cost


@pytest.mark.parametrize(
    "points", [[], [(0, 1.0)], [(1, 0.0)], [(1, float("nan"))], [(1, float("inf"))]]
)
def test_measurements_that_mean_nothing_are_refused(points):
    with pytest.raises(ConfigError):
        RowCost(points)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"row_cost": 3}', '{"row_cost": [[1]]}', '{"row_cost": []}']
)
def test_a_damaged_row_cost_file_is_refused(text):
    with pytest.raises(ConfigError):
        RowCost.from_json(text)


@given(st.lists(probs, min_size=1, max_size=3), costs, st.integers(0, 5))
def test_no_other_choice_of_rows_brings_more_tokens_per_second(candidates, cost, other_rows):
    ordered = [sorted(p, reverse=True) for p in candidates]

    def rate(counts):
        expected = len(counts) + sum(sum(p[:n]) for p, n in zip(ordered, counts, strict=True))
        return expected / cost.seconds(len(counts) + other_rows + sum(counts))

    chosen = choose(candidates, cost, other_rows, min_gain=0.0)
    best = max(map(rate, itertools.product(*(range(len(p) + 1) for p in candidates))))
    assert rate(chosen) == pytest.approx(best)


@given(probs, costs, st.integers(0, 5))
def test_more_nodes_than_max_nodes_never_pay(candidates, cost, other_rows):
    chosen = choose([candidates], cost, other_rows)[0]
    limit = cost.max_nodes(len(candidates), other_rows)
    if chosen > limit:  # equal but for rounding
        ordered = sorted(candidates, reverse=True)
        rates = [(1 + sum(ordered[:n])) / cost.seconds(1 + other_rows + n) for n in (limit, chosen)]
        assert rates[0] == pytest.approx(rates[1])


@given(st.lists(probs, min_size=1, max_size=3), costs, st.integers(0, 5))
def test_drafts_that_end_where_nothing_can_pay_bring_as_many_tokens_per_second(
    candidates, cost, other_rows
):
    step = Step(cost, len(candidates), other_rows)
    ordered = [sorted(p, reverse=True) for p in candidates]
    cut = [list(itertools.takewhile(GainTracker(step, len(p)).may_pay, p)) for p in ordered]

    def rate(drafts):
        counts = choose(drafts, cost, other_rows, min_gain=0.0)
        expected = len(drafts) + sum(sum(p[:n]) for p, n in zip(drafts, counts, strict=True))
        return expected / cost.seconds(len(drafts) + other_rows + sum(counts))

    assert rate(cut) == pytest.approx(rate(ordered))


def test_a_guess_that_cannot_pay_ends_a_draft_and_free_rows_never_do():
    assert not GainTracker(Step(PER_ROW), 8).may_pay(0.9)
    free = GainTracker(Step(FREE), 8)
    assert all(free.may_pay(0.01) for _ in range(8))


def test_a_draft_of_one_request_ends_where_a_cheap_row_is_out_of_reach():
    cost = RowCost([(1, 1.0), (2, 1.5), (20, 15.0), (40, 15.0)])
    assert not GainTracker(Step(cost), 24).may_pay(0.4)
    assert GainTracker(Step(cost), 48).may_pay(0.4)
    assert GainTracker(Step(cost, num_requests=2), 24).may_pay(0.4)


def test_nothing_is_taken_when_nothing_pays():
    assert choose([[0.5, 0.4], [0.9]], PER_ROW) == [0, 0]
    assert choose([[0.0, 0.0]], FREE) == [0]
    assert choose([], FREE) == []


def test_likelier_nodes_of_all_requests_come_first():
    four_rows = RowCost([(4, 1.0), (5, 100.0)])
    assert choose([[0.3, 0.9], [0.5, 0.1]], four_rows) == [1, 1]
    assert choose([[0.3, 0.9], [0.5, 0.1]], four_rows, other_rows=1) == [1, 0]
    assert choose([[0.3, 0.9], [0.5, 0.1]], four_rows, other_rows=2) == [0, 0]


def guess(source=Source.PROMPT, match_len=4, prob=0.7):
    return Draft([5], [-1], [source], [match_len], [prob])


def test_a_source_that_is_right_gains_trust_and_one_that_is_wrong_loses_it():
    acceptance = Acceptance()
    for _ in range(60):
        acceptance.learn(guess(Source.PROMPT), [5, 1])
        acceptance.learn(guess(Source.MEMORY), [6])
    assert acceptance.rates(Source.PROMPT, 4)[0] > 0.9
    assert acceptance.rates(Source.MEMORY, 4)[0] < 0.1
    assert acceptance.rates(Source.MEMORY, 1)[0] == Acceptance().rates(Source.MEMORY, 1)[0]


def test_trust_comes_back_when_the_guesses_are_right_again():
    acceptance = Acceptance()
    for tokens in [[6]] * 300 + [[5]] * 100:
        acceptance.learn(guess(), tokens)
    assert acceptance.rates(Source.PROMPT, 4)[0] > 0.8


def test_an_outvoted_guess_is_judged_by_its_share():
    acceptance = Acceptance()
    rate = acceptance.rates(Source.PROMPT, 4)[0]
    even = Draft([5, 6], [-1, -1], [Source.PROMPT] * 2, [4] * 2, [rate / 2] * 2)
    for _ in range(30):
        rate = acceptance.rates(Source.PROMPT, 4)[0]
        even = Draft([5, 6], [-1, -1], [Source.PROMPT] * 2, [4] * 2, [rate / 2] * 2)
        acceptance.learn(even, [5])
    assert acceptance.rates(Source.PROMPT, 4)[0] > 0.9


def test_levels_below_a_wrong_guess_or_beyond_the_text_teach_nothing():
    acceptance = Acceptance()
    draft = Draft([5, 6, 7], [-1, 0, 1], [Source.PROMPT] * 3, [4] * 3, [0.7, 0.5, 0.3])
    acceptance.learn(draft, [9, 6, 7])
    acceptance.learn(draft, [5])
    assert acceptance.rates(Source.PROMPT, 4)[1:] == Acceptance().rates(Source.PROMPT, 4)[1:]


def test_before_anything_is_learned_longer_matches_are_surer():
    firsts = [Acceptance().rates(Source.PROMPT, n)[0] for n in (1, 2, 4, 8, 16)]
    assert firsts == sorted(firsts)
    assert 0 < firsts[0] < firsts[-1] < 1


def test_longer_matches_of_one_source_are_never_trusted_less():
    acceptance = Acceptance()
    for length in (1, 2, 4, 8, 16):
        acceptance.rates(Source.PROMPT, length)[0] = 1.0 / length
    trusts = [acceptance.trust(Source.PROMPT, length) for length in (1, 2, 4, 8, 16)]
    assert all(a < b for a, b in itertools.pairwise(trusts))


def test_rows_never_cost_more_than_the_steps_they_could_go_in():
    assert RowCost([(1, 1.0), (2, 50.0), (7, 90.0)]).points == ((1, 1.0), (2, 2.0), (7, 8.0))
