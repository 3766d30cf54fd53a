"""The strategies' own settings: frozen, printable, and refused by name where they mean nothing."""

from dataclasses import FrozenInstanceError
from math import nan

import pytest

from lazyahead import PRESETS, LazyPrefill, Lookahead
from lazyahead.errors import ConfigError, LazyAheadError
from lazyahead.prefill.score import LastToken, Random, Window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": ()}, "schedule is empty"),
        ({"schedule": ((0.5, 0.0),)}, "got 0.0"),
        ({"schedule": ((0.5, 1.5),)}, "got 1.5"),
        ({"schedule": ((0.5, nan),)}, "got nan"),
        ({"schedule": ((1.0, 0.5),)}, "got 1.0"),
        ({"schedule": ((-0.1, 0.5),)}, "got -0.1"),
        ({"schedule": ((0.0, 0.5),)}, "depth 0"),
        ({"schedule": (("a", 0.5),)}, "got a"),
        ({"schedule": (0.5, 0.5)}, "pairs"),
        ({"schedule": ((0.5, 0.5), (0.5, 0.4))}, "got 0.5 after 0.5"),
        ({"schedule": ((0.3, 0.5), (0.5, 0.6))}, "got 0.6 after 0.5"),
        ({"revive": "always"}, "'always'"),
        ({"scorer": Random()}, "Random"),
        ({"scorer": Random(), "revive": "percentile"}, "Random"),
        ({"revive_threshold": 1.5}, "1.5"),
        ({"revive_threshold": nan}, "nan"),
        ({"revive_threshold": "low"}, "'low'"),
        ({"revive_limit": -1}, "revive_limit.*-1"),
        ({"protect_first": 1.5}, "protect_first.*1.5"),
        ({"protect_last": True}, "protect_last.*True"),
        ({"min_tokens": -3}, "min_tokens.*-3"),
    ],
)
def test_a_way_of_reading_that_means_nothing_is_refused_with_the_value(options, message):
    with pytest.raises(ConfigError, match=message):
        LazyPrefill(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "wide"}, "'wide'"),
        ({"decoding_length": 0}, "decoding_length.*0"),
        ({"branch_length": -1}, "branch_length.*-1"),
        ({"branch_length": 10_000}, "branch_length.*10000"),
        ({"capacity_bytes": 1.5}, "capacity_bytes.*1.5"),
        ({"namespace": ""}, "namespace"),
        ({"memory": 3}, "memory"),
    ],
)
def test_a_way_of_writing_that_means_nothing_is_refused_with_the_value(options, message):
    with pytest.raises(ConfigError, match=message):
        Lookahead(**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window(0),
        lambda: Window(kernel_size=4),
        lambda: Window(kernel_size=0),
        lambda: LastToken(2),
    ],
)
def test_a_scorer_that_means_nothing_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_a_scorer_without_attention_may_cut_before_the_first_layer():
    assert LazyPrefill.random_drop().schedule == ((0.0, 0.5),)


def test_configs_are_values():
    assert LazyPrefill() == LazyPrefill()
    assert eval(repr(LazyPrefill.paper())) == LazyPrefill.paper()
    assert Lookahead(**Lookahead().to_dict()) == Lookahead()
    assert len({LazyPrefill(), LazyPrefill(), LazyPrefill.paper()}) == 2
    with pytest.raises(FrozenInstanceError):
        LazyPrefill().min_tokens = 3


def test_presets_are_named_and_an_unknown_name_lists_them():
    assert LazyPrefill.preset("paper") == LazyPrefill.paper()
    with pytest.raises(ConfigError, match=", ".join(PRESETS)):
        LazyPrefill.preset("turbo")
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, LazyAheadError)


def test_a_setting_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ConfigError, match=r"no 'recall_threshold'; there are .*revive_threshold"):
        LazyPrefill.from_dict({"schedule": [[0.2, 0.5]], "recall_threshold": 0.9})
