"""Engines share a model: nested, overlapping, from threads, beside plain calls, after changes."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, build, prompt
from test_fence import state
from torch import nn
from transformers import PreTrainedModel

from lazyahead import LLM, LazyPrefill, Lookahead, Sampling, accelerate, probe
from lazyahead.errors import LazyAheadError

PROMPT = prompt(40)[0].tolist()
LAZY = LazyPrefill(min_tokens=0)
SHORT = Sampling(max_new_tokens=12, ignore_eos=True)


def plain(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int = 12) -> list[int]:
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def ours(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    with accelerate(model, prefill=None, decode=None):
        return plain(model, ids)


def in_threads(work: list[Callable[[], Any]]) -> list[Any]:
    """Runs all at once; raises what any of them raised."""
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = work[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_an_engine_works_inside_the_block_of_another() -> None:
    model = build("llama")
    before = state(model)
    first, second = LLM(model, prefill=LAZY), LLM(model, prefill=None)
    alone = [llm.generate([PROMPT], sampling=SHORT)[0].token_ids for llm in (first, second)]
    with first.engine:
        inside = second.generate([PROMPT], sampling=SHORT)[0].token_ids
        assert first.generate([PROMPT], sampling=SHORT)[0].token_ids == alone[0]
    assert inside == alone[1]
    assert state(model) == before


def test_two_engines_and_plain_calls_work_at_once_from_threads() -> None:
    model = build("llama")
    before = state(model)
    lazy, drafted = LLM(model, prefill=LAZY), LLM(model, prefill=None, decode=Lookahead())
    ids = torch.tensor([PROMPT])
    expected = [
        lazy.generate([PROMPT], sampling=SHORT)[0].token_ids,
        drafted.generate([PROMPT], sampling=SHORT)[0].token_ids,
        plain(model, ids),
    ]
    work = [
        lambda: lazy.generate([PROMPT], sampling=SHORT)[0].token_ids,
        lambda: drafted.generate([PROMPT], sampling=SHORT)[0].token_ids,
        lambda: plain(model, ids),
    ]
    for _ in range(3):
        assert in_threads(work) == expected
    assert state(model) == before


def test_threads_inside_one_accelerate_block_get_the_answers_of_plain_generate() -> None:
    model = build("llama")
    before = state(model)
    inputs = [prompt(30 + 3 * index) for index in range(4)]
    expected = [plain(model, ids) for ids in inputs]
    with accelerate(model, prefill=None, decode=None):
        work: list[Callable[[], Any]] = [lambda ids=ids: plain(model, ids) for ids in inputs]
        assert in_threads(work) == expected
    assert state(model) == before
    assert plain(model, inputs[0]) == expected[0]


def test_threads_may_probe_a_new_model_at_once() -> None:
    model = FAMILIES["gemma3"]()
    assert {support.level for support in in_threads([lambda: probe(model)] * 4)} == {"full"}


def test_a_plain_call_that_begins_during_a_probe_waits_for_its_end() -> None:
    model = build("llama")
    ids = prompt(40)
    expected = model(ids).logits
    seen: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: seen.append(model(ids).logits))

    def begin(*_: Any) -> None:
        if not thread.ident:
            thread.start()
            thread.join(0.3)

    handle = model.model.layers[1].register_forward_pre_hook(begin)
    assert probe(model).level == "full"
    thread.join()
    handle.remove()
    assert torch.equal(seen[0], expected)


def compile_forward(model: PreTrainedModel) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compile_in_place(model: PreTrainedModel) -> None:
    model.compile(backend="eager")


def compile_layers(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager")


@pytest.mark.parametrize("compile_model", [compile_forward, compile_in_place, compile_layers])
@pytest.mark.parametrize("first", ["plain", "ours"])
def test_a_compiled_model_gives_the_same_text(
    compile_model: Callable[[PreTrainedModel], None], first: str
) -> None:
    model = build("llama")
    ids = prompt(40)
    expected = plain(model, ids)
    compile_model(model)
    if first == "plain":
        assert plain(model, ids, 3) == expected[:3]
    assert ours(model, ids) == expected
    with accelerate(model, prefill=LAZY, decode=Lookahead()):
        assert len(plain(model, ids)) == 12
    assert ours(model, ids) == expected
    assert plain(model, ids, 3) == expected[:3]


def resize(model: PreTrainedModel) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 4)


def replace_head(model: PreTrainedModel) -> None:
    old = model.lm_head
    model.lm_head = nn.Linear(old.in_features, old.out_features, bias=False)


def replace_layer(model: PreTrainedModel) -> None:
    model.model.layers[1] = build("llama", seed=7).model.layers[1]


def append_layer(model: PreTrainedModel) -> None:
    more = build("llama", seed=7).model.layers[-1]
    more.self_attn.layer_idx = model.config.num_hidden_layers
    model.model.layers.append(more)
    model.config.num_hidden_layers += 1


def swap_layers(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]
    layers[0].self_attn.layer_idx, layers[2].self_attn.layer_idx = 0, 2


CHANGES = [replace_head, replace_layer, append_layer, swap_layers]


@pytest.mark.parametrize("change", [resize, *CHANGES])
def test_a_model_changed_after_its_first_use_is_inspected_again(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = build("llama")
    ids = prompt(40)
    ours(model, ids)
    torch.manual_seed(3)
    change(model)
    assert ours(model, ids) == plain(model, ids)


@pytest.mark.parametrize("change", CHANGES)
def test_an_open_llm_names_the_change_of_its_model(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = build("llama")
    llm = LLM(model, prefill=None)
    llm.generate([PROMPT], sampling=SHORT)
    change(model)
    with pytest.raises(LazyAheadError, match="replaced"):
        llm.generate([PROMPT], sampling=SHORT)


def test_a_probe_that_failed_by_accident_is_tried_again() -> None:
    model = build("llama")
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    assert probe(model).level != "full"
    handle.remove()
    assert probe(model).level == "full"


class TwoMembers:
    """A scorer with nothing but the two members that are asked for."""

    window_size = 4

    def __call__(self, attention: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return attention.mean(0)


def test_a_scorer_needs_two_members_only(tmp_path: Any) -> None:
    rule = LazyPrefill(((0.5, 0.5),), TwoMembers(), protect_last=4, min_tokens=0)
    llm = LLM(build("llama"), prefill=rule, decode=Lookahead())
    session = llm.session()
    (piece, *_) = llm.stream(PROMPT, sampling=SHORT, session=session)
    assert piece.stats.prompt_tokens_computed < 1
    assert rule.to_dict()["scorer"]["name"].endswith("TwoMembers")
    rule.save(tmp_path / "mine.toml")
    llm.save_session(session, tmp_path / "session.safetensors")
    loaded = llm.load_session(tmp_path / "session.safetensors")
    assert loaded.token_ids == session.token_ids
