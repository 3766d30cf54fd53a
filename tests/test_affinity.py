"""The request router: documents stay where they are, and no replica gets more than its share."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyahead.errors import ConfigError
from lazyahead.server.affinity import bound, choose, document_key, rank

keys = st.text(max_size=20)
replicas = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


@given(keys, replicas, st.randoms(use_true_random=False))
def test_the_order_depends_on_names_alone(key: str, names: list[str], rng: object) -> None:
    assert rank(key, names) == rank(key, names[::-1])
    assert sorted(rank(key, names)) == sorted(names)


@given(keys, replicas)
def test_a_replica_that_leaves_moves_only_its_own_documents(key: str, names: list[str]) -> None:
    order = rank(key, names)
    for gone in names:
        assert rank(key, [name for name in names if name != gone]) == [
            name for name in order if name != gone
        ]


@given(st.lists(keys, max_size=60), replicas, st.floats(1.0, 3.0))
def test_no_replica_exceeds_its_bound(asked: list[str], names: list[str], factor: float) -> None:
    loads = dict.fromkeys(names, 0)
    for num, key in enumerate(asked, 1):
        loads[choose(key, loads, factor)] += 1
        assert max(loads.values()) <= bound(num, len(names), factor)
        assert bound(num, len(names), factor) >= math.ceil(num / len(names))


@given(keys, replicas)
def test_an_idle_fleet_gives_a_document_its_favourite(key: str, names: list[str]) -> None:
    assert choose(key, dict.fromkeys(names, 0)) == rank(key, names)[0]


def test_a_busy_favourite_hands_on_to_the_next() -> None:
    names = ["a", "b", "c", "d"]
    first, second = rank("document", names)[:2]
    loads = {name: 5 if name == first else 0 for name in names}
    assert choose("document", loads) == second


def test_documents_spread_evenly() -> None:
    names = [f"replica-{i}" for i in range(8)]
    counts = Counter(rank(f"document {i}", names)[0] for i in range(8000))
    assert max(counts.values()) < 1.15 * 1000
    assert min(counts.values()) > 0.85 * 1000


def test_questions_about_one_document_have_one_key() -> None:
    text = "A long document. " * 200
    chats = [
        {"messages": [{"role": "user", "content": text + question}]}
        for question in ("Why?", "Who?")
    ]
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
    plain = {"prompt": text + "When?"}
    assert len({document_key(body) for body in [*chats, parts, plain, {"input": text}]}) == 1
    assert document_key({"prompt": [1, 2, 3]}) == document_key({"prompt": [1, 2, 3]})
    assert document_key({"prompt": [1, 2, 3]}) != document_key({"prompt": [1, 2, 4]})
    assert document_key({}) == document_key({"messages": []}) == ""
    assert document_key({"messages": [{"role": "user", "content": None}]}) == ""


def test_what_cannot_be_chosen_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="no replica"):
        choose("key", {})
    with pytest.raises(ConfigError, match=r"load_factor must be at least 1, got 0\.5"):
        choose("key", {"a": 0}, 0.5)
