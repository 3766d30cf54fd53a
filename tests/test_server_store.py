"""Responses that can be continued: kept for a time, within a bound, each for its own key."""

import pytest
from support import KEEP_ALL, engine_for, prompts, request_for
from support import finish as run

from lazyahead.server import store as module
from lazyahead.server.store import Kept, ResponseStore


def kept(text="x", session=None, tenant="a"):
    return Kept(tenant, [{"role": "user", "content": text}], KEEP_ALL, session)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def session():
    engine = engine_for("llama", KEEP_ALL)
    (prompt,) = prompts(30)
    request = request_for(engine, prompt, 2)
    run(engine, [request])
    return request.session


def test_a_response_is_kept_for_a_time_after_its_last_use(clock):
    store = ResponseStore(ttl_s=10, max_bytes=100)
    store.put("one", kept())
    clock[0] += 9
    assert store.get("one", "a") is not None
    clock[0] += 9
    assert store.get("one", "a") is not None
    clock[0] += 11
    assert store.get("one", "a") is None
    assert len(store) == 0


def test_another_key_finds_nothing(clock):
    store = ResponseStore(ttl_s=10, max_bytes=100)
    store.put("one", kept(tenant="a"))
    assert store.get("one", "b") is None


def test_texts_leave_oldest_first(clock):
    store = ResponseStore(ttl_s=10, max_bytes=25)
    for name in "abc":
        store.put(name, kept("x" * 10))
    assert [name for name in "abc" if store.get(name, "a")] == ["b", "c"]
    assert store.nbytes == 20


def test_sessions_leave_before_texts(clock, session):
    store = ResponseStore(ttl_s=10, max_bytes=session.nbytes + 15)
    store.put("old", kept("x" * 10, session))
    store.put("new", kept("x" * 10))
    assert store.get("old", "a").session is None
    assert store.get("new", "a") is not None


def test_without_room_nothing_is_kept(clock):
    store = ResponseStore(ttl_s=10, max_bytes=0)
    store.put("one", kept())
    assert len(store) == 0


def test_their_number_is_bounded(clock, monkeypatch):
    monkeypatch.setattr(module, "MAX_RESPONSES", 3)
    store = ResponseStore(ttl_s=10, max_bytes=1000)
    for name in "abcde":
        store.put(name, kept())
    assert len(store) == 3
