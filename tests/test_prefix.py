"""Prompts that share a beginning compute it once, and are answered as if they had not."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    PREFILLS,
    FakeDrafter,
    check_invariants,
    engine_for,
    finish,
    prompts,
    request_for,
    tiny,
)

from lazyahead import LLM, Sampling
from lazyahead.cache.prefix import PrefixCache
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.engine.engine import Engine
from lazyahead.errors import ConfigError, RequestError
from lazyahead.hf.runner import Runner

BLOCK = 8
NUM_TOKENS = 6
DOCUMENT, *QUESTIONS = prompts(50, 9, 12, 30, seed=3)
WAYS = {
    name: config
    and (replace(config, local_full_rows=5, protect_last=5) if config.local_window else config)
    for name, config in PREFILLS.items()
}
"""Whose last rows are few enough for prompts as short as these."""
LAZY, CALM, LOCAL = WAYS["lazy"], WAYS["calm"], WAYS["local"]


def caching(
    family: str,
    prefill: LazyPrefill | None,
    drafter: FakeDrafter | None = None,
    stall: int = 512,
    max_bytes: int = 1 << 30,
) -> Engine:
    decode = None if drafter is None else Lookahead()
    cache = PrefixCache(max_bytes, BLOCK)
    runner = Runner(*tiny(family))
    return Engine(
        runner, prefill, decode, drafter=drafter, prefill_chunk_size=stall, prefix_cache=cache
    )


def cache_of(engine: Engine) -> PrefixCache:
    assert engine.prefixes is not None
    return engine.prefixes.cache


def ask(engine: Engine, prompt: list[int], namespace: str | None = None, **options: Any) -> Any:
    request = request_for(engine, prompt, NUM_TOKENS, **options)
    request.namespace = namespace
    finish(engine, [request], lambda: check_invariants(request.session))
    return request


def check_cache(cache: PrefixCache) -> None:
    blocks = list(cache._blocks)
    assert cache.nbytes == sum(block.nbytes for block in blocks) <= cache.max_bytes
    for block in blocks:
        assert block.parent is not None
        assert block.parent.children[block.token_ids] is block
        assert set(block.children.values()) <= set(blocks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefill", sorted(WAYS))
def test_a_second_question_is_answered_as_if_it_were_the_first(prefill: str, dtype: str) -> None:
    family = f"llama:{dtype}"
    engine = caching(family, WAYS[prefill])
    for num, question in enumerate(QUESTIONS):
        prompt = [*DOCUMENT, *question]
        alone, shared = ask(engine_for(family, WAYS[prefill]), prompt), ask(engine, prompt)
        assert shared.answer == alone.answer
        assert shared.session.kept_by_layer == alone.session.kept_by_layer
        if prefill != "random_drop":  # nothing is computed before its first cut
            assert shared.stats().reused_tokens == (0 if num == 0 else 48)
        check_cache(cache_of(engine))


@pytest.mark.parametrize("prefill", ["none", "local"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_answers_the_same_from_the_cache(family: str, prefill: str) -> None:
    engine = caching(family, WAYS[prefill])
    for question in QUESTIONS[:2]:
        prompt = [*DOCUMENT, *question]
        request = ask(engine, prompt)
        assert request.answer == ask(engine_for(family, WAYS[prefill]), prompt).answer
    is_alone = engine.runner.single_request_only
    assert request.num_reused == (0 if is_alone else 48)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_prompts_in_any_order_are_answered_as_alone(data: st.DataObject) -> None:
    """Prompts that share something, drafted and in common passes, while blocks come and go."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prefill = WAYS[data.draw(st.sampled_from(["none", "lazy", "local", "calm", "fast"]))]
    stall = data.draw(st.sampled_from([5, 16, 512]))
    bases = prompts(40, 33, seed=rng.randrange(99))
    texts = []
    for _ in range(6):
        base = rng.choice(bases)
        texts.append(base[: rng.randrange(len(base))] + prompts(rng.randrange(6, 30))[0])
    alone = [ask(engine_for("llama", prefill), text).answer for text in texts]
    known = {tuple(text): answer for text, answer in zip(texts, alone, strict=True)}
    drafter = FakeDrafter("sometimes", known) if data.draw(st.booleans()) else None
    max_bytes = data.draw(st.sampled_from([20_000, 100_000, 10**9]))
    engine = caching("llama", prefill, drafter, stall, max_bytes)
    place = 0
    while place < len(texts):
        part = texts[place : place + data.draw(st.integers(1, 3))]
        requests = [request_for(engine, text, NUM_TOKENS) for text in part]
        finish(engine, requests)
        check_cache(cache_of(engine))
        assert [request.answer for request in requests] == alone[place : place + len(part)]
        place += len(part)


def test_namespaces_share_nothing() -> None:
    engine = caching("llama", LAZY)
    prompt = [*DOCUMENT, *QUESTIONS[0]]
    assert [ask(engine, prompt, name).num_reused for name in ("a", "b", "a", "b", None)] == [
        *[0, 0, 48, 48, 0]
    ]


def test_ways_of_prefill_share_what_they_compute_alike() -> None:
    engine = caching("llama", LAZY)
    ask(engine, [*DOCUMENT, *QUESTIONS[0]])
    for prefill, num_reused in ((CALM, 48), (None, 0), (LOCAL, 0)):
        session = engine.session_for(prefill)
        request = ask(engine, [*DOCUMENT, *QUESTIONS[1]], session=session)
        assert request.num_reused == num_reused


def test_the_least_recently_used_beginning_goes_first() -> None:
    one = caching("llama", None)
    texts = prompts(24, 24, 24, seed=8)
    ask(one, texts[0])
    engine = caching("llama", None, max_bytes=2 * cache_of(one).nbytes)
    for text in (texts[0], texts[1], texts[0], texts[2]):
        ask(engine, text)
        check_cache(cache_of(engine))
    assert [ask(engine, text).num_reused for text in (texts[0], texts[2], texts[1])] == [16, 16, 0]


def test_a_beginning_larger_than_the_cache_is_kept_as_far_as_it_fits() -> None:
    small = caching("llama", None)
    ask(small, DOCUMENT[:16])
    engine = caching("llama", None, max_bytes=cache_of(small).nbytes)
    ask(engine, DOCUMENT)
    check_cache(cache_of(engine))
    assert ask(engine, DOCUMENT).num_reused == 16


@pytest.mark.parametrize("prefill", ["none", "lazy", "local"])
def test_a_document_read_ahead_is_not_read_again(prefill: str) -> None:
    engine = caching("llama", WAYS[prefill])
    with engine:
        session = engine.read_ahead(DOCUMENT)
    assert session.token_ids == DOCUMENT
    check_invariants(session)
    for question in QUESTIONS:
        prompt = [*DOCUMENT, *question]
        request = ask(engine, prompt)
        assert request.num_reused == 48
        assert request.answer == ask(engine_for("llama", WAYS[prefill]), prompt).answer


def test_a_document_is_read_ahead_in_chunks_beside_an_answer() -> None:
    engine = caching("llama", LAZY, stall=9)
    other = request_for(engine, QUESTIONS[0], 30)
    with engine:
        engine.submit(other)
        while not other.answer:
            engine.step()
        engine.read_ahead(DOCUMENT)
        assert other.finish_reason is None
    assert ask(engine, [*DOCUMENT, *QUESTIONS[1]]).num_reused == 48


def test_a_pass_that_fails_leaves_the_cache_and_the_next_answer_right() -> None:
    engine = caching("llama", LAZY)
    prompt = [*DOCUMENT, *QUESTIONS[0]]
    request = request_for(engine, prompt, NUM_TOKENS)

    def fail(layer: int) -> None:
        if layer == 2:
            raise KeyboardInterrupt

    with engine:
        engine.submit(request)
        with pytest.raises(KeyboardInterrupt):
            engine.step(fail)
        while not engine.is_idle:
            engine.step()
    expected = ask(engine_for("llama", LAZY), prompt).answer
    assert request.answer == expected
    assert ask(engine, prompt).answer == expected
    assert ask(engine, [*DOCUMENT, *QUESTIONS[1]]).num_reused == 48


def test_a_document_on_disk_is_there_after_a_new_start(tmp_path: Path) -> None:
    model, path = tiny("llama")[0], tmp_path / "document.safetensors"
    document, question = prompts(300, 40, seed=5)
    options: Any = {"prefill": LOCAL, "prefix_cache_bytes": 1 << 30}
    first = LLM(model, **options)
    first.save_session(first.read_ahead(document), path)
    second = LLM(model, **options)
    second.add_prefix(second.load_session(path))
    sampling = Sampling(max_new_tokens=6)
    answer = second.generate([*document, *question], sampling=sampling)
    assert answer.stats.reused_tokens == 256
    assert answer == replace(
        LLM(model, prefill=LOCAL).generate([*document, *question], sampling=sampling),
        stats=answer.stats,
    )


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"prefix_cache_bytes must be .* got -1"):
        LLM(tiny("llama")[0], prefix_cache_bytes=-1)
    plain = LLM(tiny("llama")[0])
    with pytest.raises(RequestError, match="no prefix cache"):
        plain.add_prefix(plain.read_ahead(DOCUMENT))
    caching_llm = LLM(tiny("llama")[0], prefill=LAZY, prefix_cache_bytes=1 << 20)
    session = caching_llm.session()
    caching_llm.generate(DOCUMENT, sampling=Sampling(max_new_tokens=2), session=session)
    with pytest.raises(RequestError, match="no beginning"):
        caching_llm.add_prefix(session)
