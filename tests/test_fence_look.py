"""What is read off a model by watching it: masks, tables, attention that cannot be replaced,
loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, prompt
from families_more import HYBRID_FAMILIES, MORE_FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_model
from torch import Tensor

from lazyahead import LLM, Sampling, accelerate, probe
from lazyahead.errors import LazyAheadError, RequestError
from lazyahead.hf.load import load
from lazyahead.hf.model_spec import _reach
from lazyahead.hf.probe import examine
from lazyahead.hf.rope import Rope
from lazyahead.hf.trace import Unfit

CPU = torch.device("cpu")
FAR = 4096


def causal(batch: int, head: int, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


@given(st.integers(1, FAR), st.booleans())
def test_windows_and_chunks_are_read_off_the_mask(size: int, is_window: bool) -> None:
    def rule(batch: int, head: int, query: Tensor, key: Tensor) -> Tensor:
        inside = key > query - size if is_window else key // size == query // size
        return (key <= query) & inside

    window, chunk = _reach(rule, FAR, CPU, 0)
    assert size in (window, chunk)
    assert (window, chunk) == (
        (size, None) if is_window else (None, size)
    ) or size == 1  # then they are the same


def test_a_causal_mask_has_no_reach() -> None:
    assert _reach(causal, FAR, CPU, 0) == (None, None)


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, query, key: key < FAR + query * 0,  # sees what comes after
        lambda b, h, query, key: (
            causal(b, h, query, key) | (key < 4)
        ),  # a prefix that everybody sees
        lambda b, h, query, key: (
            causal(b, h, query, key) & ((key > query - 8) | (key < 4))
        ),  # sinks and a window
        lambda b, h, query, key: (
            causal(b, h, query, key) & (key % 2 == query % 2)
        ),  # every other key
    ],
    ids=["both ways", "prefix", "sinks", "dilated"],
)
def test_any_other_mask_is_refused(rule: Any) -> None:
    with pytest.raises(Unfit, match="mask of layer 3"):
        _reach(rule, FAR, CPU, 3)


def test_tables_that_layers_share_are_kept_once() -> None:
    _, llama = examine(FAMILIES["llama"]())
    _, gemma = examine(MORE_FAMILIES["gemma4"]())
    assert llama is not None
    assert gemma is not None
    assert llama.num_token_args == 3  # cos, sin, position ids
    assert gemma.num_token_args >= gemma.num_layers  # each layer has its own input per token


def test_an_argument_that_attention_does_not_know_is_refused() -> None:
    """As sparse attention passes which blocks to read: ignoring it would be silently dense."""
    model = build("llama")
    for layer in model.model.layers:
        attention, forward = layer.self_attn, layer.self_attn.forward

        def passing(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return forward(*args, **kwargs, block_indices=torch.ones(2))

        attention.forward = passing
    support = probe(model)
    assert support.level != "full"
    assert "passes block_indices to its attention" in support.reason


def test_rotary_tables_are_steady_up_to_their_limit() -> None:
    dynamic, longrope = Rope((), 100, True), Rope((), 100, False)
    assert dynamic.is_steady(10, 99)
    assert not dynamic.is_steady(99, 100)
    assert not dynamic.is_steady(100, 101)
    assert longrope.is_steady(100, 200)
    assert not longrope.is_steady(90, 100)


def test_pictures_are_refused_not_dropped() -> None:
    model, ids = MORE_FAMILIES["gemma3_vl"](), prompt(20)
    with accelerate(model, prefill=None), pytest.raises(RequestError, match="cannot be combined"):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.ones(1, 3, 28, 28),
            max_new_tokens=2,
        )


def test_a_family_that_refuses_sdpa_is_loaded_all_the_same(tmp_path: Path) -> None:
    model, _ = load(str(save_model(tmp_path, "gemma2")), "float32", "cpu")
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert probe(model).level == "full"


def test_after_a_failed_pass_the_whole_text_is_read_anew() -> None:
    llm, sampling = (
        LLM(HYBRID_FAMILIES["mamba"](), prefill=None, decode=None),
        Sampling(max_new_tokens=3),
    )
    session, text = llm.session(), prompt(20)[0].tolist()
    list(llm.stream(text, sampling=sampling, session=session))
    text = [*session.history, 5]
    handle = llm.model.register_forward_pre_hook(_fail)
    with pytest.raises(ArithmeticError):
        list(llm.stream(text, sampling=sampling, session=session))
    handle.remove()
    again = [
        token
        for piece in llm.stream(text, sampling=sampling, session=session)
        for token in piece.token_ids
    ]
    assert again == [
        token for piece in llm.stream(text, sampling=sampling) for token in piece.token_ids
    ]


def test_a_state_of_another_length_is_not_continued() -> None:
    llm = LLM(HYBRID_FAMILIES["mamba"](), prefill=None, decode=None)
    session = llm.session()
    list(llm.stream(prompt(20)[0].tolist(), sampling=Sampling(max_new_tokens=3), session=session))
    session.token_ids.pop()
    with pytest.raises(LazyAheadError, match="was lost"):
        list(
            llm.stream(
                [*session.token_ids, 7, 8], sampling=Sampling(max_new_tokens=3), session=session
            )
        )


def _fail(module: Any, args: Any) -> None:
    raise ArithmeticError
