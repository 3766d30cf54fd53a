"""Drafters with no more than they need, and what is refused."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import lazyahead.draft
from lazyahead.config import Lookahead
from lazyahead.draft.adapter import DepthAcceptance, as_drafter
from lazyahead.draft.budget import RowCost, Step
from lazyahead.draft.drafter import NoDrafter
from lazyahead.draft.factory import describe, parse_decode, strategy_for
from lazyahead.draft.replay import replay
from lazyahead.draft.tree import Draft, Source
from lazyahead.errors import ConfigError

FLAT = RowCost([(1, 1.0), (64, 1.1)])
STEEP = RowCost([(1, 1.0), (2, 1.5), (3, 2.5)])


class Chain:
    """Guesses that the text repeats itself from its start."""

    def start(self, prompt, namespace):
        return Chained(list(prompt))


class Chained:
    def __init__(self, text):
        self.text, self.num_prompt = text, len(text)

    def extend(self, tokens):
        self.text += tokens

    def propose(self, max_nodes):
        at = len(self.text) - self.num_prompt
        tokens = self.text[at : at + max_nodes]
        return Draft(tokens, range(-1, len(tokens) - 1))


class Full:
    """Has all there is, and notes what it is called with."""

    def __init__(self):
        self.calls = []

    def start(self, prompt=(), namespace="default"):
        self.calls.append(("start", namespace))
        return self

    def extend(self, tokens, source=Source.OUTPUT):
        self.calls.append(("extend", source))

    def propose(self, max_nodes, step=None):
        self.calls.append(("propose", step))
        return Draft([1, 2, 3], [-1, 0, 1], (), (), [0.5, 0.4, 0.3])

    def feedback(self, draft, tokens):
        self.calls.append(("feedback", tuple(tokens)))

    def stop(self, *, remember=False):
        self.calls.append(("stop", remember))


PROMPT = list(range(10, 40))


def test_two_methods_are_enough():
    result = replay(as_drafter(Chain()), [(PROMPT, PROMPT)] * 3, FLAT)
    assert result.tokens_per_step > 4


def test_guesses_without_probabilities_are_dropped_where_they_bring_nothing():
    rng = random.Random(0)
    answers = [(PROMPT, [rng.randrange(100, 200) for _ in range(200)]) for _ in range(3)]
    result = replay(as_drafter(Chain()), answers, STEEP)
    assert result.modelled_s < 1.02 * result.modelled_plain_s


def test_a_drafter_with_all_methods_is_called_with_all_arguments():
    drafter, step = Full(), Step(FLAT)
    request = as_drafter(drafter).start([1], "a")
    request.extend([2], Source.PROMPT)
    assert request.propose(2, step).probs == [0.5, 0.4]
    request.feedback(Draft.EMPTY, [3])
    request.stop(remember=True)
    assert drafter.calls == [
        ("start", "a"),
        ("extend", Source.PROMPT),
        ("propose", step),
        ("feedback", (3,)),
        ("stop", True),
    ]


def test_siblings_share_what_a_guess_is_worth_and_depths_are_learned_apart():
    acceptance = DepthAcceptance()
    draft = Draft([1, 2, 3], [-1, -1, 0])
    first = acceptance.with_probs(draft).probs
    assert first[0] == first[1] > first[2]
    assert first[0] + first[1] < 1.0
    for _ in range(100):
        acceptance.learn(draft, [1, 9])
    learned = acceptance.with_probs(draft).probs
    assert learned[0] > 0.45
    assert learned[2] < 0.05


def test_a_namespace_never_learns_from_another():
    drafter = as_drafter(Chain())
    replay(drafter, [(PROMPT, [0] * 100)])
    fresh = as_drafter(Chain())
    mine = drafter.start(PROMPT, "other").propose(8)
    assert list(mine.probs) == list(fresh.start(PROMPT, "other").propose(8).probs)


class Partial:
    def __init__(self, request):
        self.request = request

    def start(self, prompt, namespace):
        return self.request


class Extends:
    def extend(self, tokens):
        pass


class Returns(Extends):
    def __init__(self, value):
        self.value = value

    def propose(self, max_nodes):
        return self.value


class OneArgument:
    def start(self, prompt):
        return Chained(list(prompt))


@pytest.mark.parametrize(
    ("drafter", "missing"),
    [
        (3, "start"),
        ("trie", "start"),
        (Chain, "object"),
        (object(), "start"),
        (OneArgument(), "namespace"),
    ],
)
def test_what_is_no_drafter_is_refused_by_name(drafter, missing):
    with pytest.raises(ConfigError, match=missing):
        as_drafter(drafter)


@pytest.mark.parametrize(
    ("request_", "missing"), [(None, "extend"), (object(), "extend"), (Extends(), "propose")]
)
def test_what_is_no_request_is_refused_when_an_answer_begins(request_, missing):
    with pytest.raises(ConfigError, match=f"Partial.*{missing}"):
        as_drafter(Partial(request_)).start([1], "default")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "Draft.EMPTY"),
        ([1, 2], "must return a Draft"),
        (Draft([5, 101], [-1, 0]), "token 101.*below 101"),
    ],
)
def test_what_is_no_draft_is_refused(value, message):
    request = as_drafter(Partial(Returns(value)), vocab_size=101).start([1], "default")
    with pytest.raises(ConfigError, match=message):
        request.propose(8)


def test_a_draft_is_cut_to_what_was_asked_for():
    request = as_drafter(Partial(Returns(Draft(range(300), range(-1, 299))))).start([], "default")
    assert len(request.propose(64)) == 64
    assert len(request.propose(1000)) == 256


def test_strategies_by_config_by_name_and_by_object():
    assert parse_decode("lookahead") == Lookahead()
    assert parse_decode("off") is None
    assert isinstance(strategy_for(None).drafter, NoDrafter)
    assert strategy_for(None).config is None
    assert strategy_for(Lookahead(branch_length=3)).config == Lookahead(branch_length=3)
    assert strategy_for(parse_decode(Chain())).config == Lookahead()
    with pytest.raises(ConfigError, match="'trie'"):
        parse_decode("trie")
    assert describe(None) is None
    assert describe(Lookahead()) == Lookahead().to_dict()
    assert describe(Chain())["drafter"].endswith(":Chain")


def test_no_module_of_drafting_needs_torch():
    folder = Path(lazyahead.draft.__file__).parent
    names = [f"lazyahead.draft.{path.stem}" for path in sorted(folder.glob("[a-z]*.py"))]
    assert len(names) > 10
    code = f"import sys, {', '.join(names)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
