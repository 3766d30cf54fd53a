"""Intervals: they hold the value, shrink with more samples, and come again with the same seed."""

import numpy as np
import pytest

from lazyahead.bench.bootstrap import mean_interval, ratio_interval


def test_the_interval_holds_its_value() -> None:
    values = list(np.random.default_rng(1).normal(size=50))
    found = mean_interval(values)
    assert found.value == pytest.approx(np.mean(values))
    assert found.low < found.value < found.high


def test_width_is_that_of_the_standard_error() -> None:
    values = list(np.random.default_rng(2).normal(size=400))
    found = mean_interval(values)
    expected = 2 * 1.96 * np.std(values) / 20
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def test_equal_values_have_no_width() -> None:
    assert mean_interval([0.5] * 9) == (0.5, 0.5, 0.5)


def test_a_seed_gives_the_same_bounds() -> None:
    values = [0.0, 1.0, 0.0, 1.0, 1.0]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)


def test_a_ratio_pools_its_sums() -> None:
    found = ratio_interval([1.0, 9.0], [1.0, 10.0])
    assert found.value == pytest.approx(10 / 11)
    assert (found.low, found.high) == (0.9, 1.0)


def test_a_ratio_pairs_its_terms() -> None:
    sizes = [1.0, 10.0, 100.0]
    assert ratio_interval([size / 2 for size in sizes], sizes) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("tops", "bottoms"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_what_has_no_ratio_is_refused(tops: list[float], bottoms: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needed|positive"):
        ratio_interval(tops, bottoms)
