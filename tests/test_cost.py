"""The cost model: what it says is what a run of the engine is counted to do."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from families_more import MORE_FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lazyahead import LLM, LazyPrefill
from lazyahead.bench.methods import Cost
from lazyahead.hf import packed
from lazyahead.hf.probe import examine
from lazyahead.prefill.cost import (
    LayerCost,
    ModelCost,
    causal_pairs,
    ideal_speedup,
    kept_counts,
    local_pairs,
    prefill_flops,
)
from lazyahead.prefill.score import LastToken, Window
from lazyahead.sampling import Sampling
from lazyahead.tune.search import candidates

NUM_TOKENS = 600
LAYER_TYPES = ["full_attention", "sliding_attention"] * 3
PLAIN = LazyPrefill(((0.34, 0.5), (0.67, 0.2)), Window(window_size=8), local_window=0, min_tokens=0)
CONFIGS = {
    "full": None,
    "two boundaries": PLAIN,
    "the paper's": replace(PLAIN, scorer=LastToken()),
    "local window": replace(PLAIN, local_window=64, local_from=0.0, local_full_rows=20),
    "local window from the second layer on": replace(PLAIN, local_window=64, local_from=0.17),
    "the default": replace(LazyPrefill(), min_tokens=0),
    "dropped before the first layer": LazyPrefill.random_drop(),
    "shorter than min_tokens": replace(PLAIN, min_tokens=NUM_TOKENS + 1),
}


def build(num_kv_heads: int, family: str = "llama", **sizes) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=num_kv_heads, eos_token_id=None, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def cost_of(model: PreTrainedModel) -> ModelCost:
    _, spec = examine(model)
    assert spec is not None
    return ModelCost.of(spec)


def attention_flops(query, key, value, *args, out_val=None, **kwargs):
    """Of the pairs that are attended to: the counter's own formula ignores masks."""
    (_, heads, rows, size), keys = query.shape, key.shape[2]
    is_causal = kwargs.get("is_causal", args[1] if len(args) > 1 else False)
    mask = kwargs.get("attn_mask")
    if is_causal:
        pairs = rows * (rows + 1) // 2 + rows * (keys - rows)
    elif mask is not None:
        seen = mask if mask.dtype == torch.bool else mask == 0
        pairs = int(seen.expand(*seen.shape[:-2], rows, keys).reshape(-1, rows, keys)[0].sum())
    else:
        pairs = rows * keys
    return 2 * heads * pairs * (size + value.shape[-1])


@pytest.fixture(autouse=True, scope="module")
def plain_products() -> Iterator[None]:
    """No packed products, which the counter does not know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(packed.ENVIRONMENT, "0")
        yield


attention_flops._get_raw = True  # the counter then passes tensors instead of shapes
MAPPING = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def counted(
    model: PreTrainedModel, config: LazyPrefill | None
) -> tuple[float, tuple[int, ...] | None]:
    """FLOPs of the engine's prefill and its one row of logits; the tokens kept by each layer."""
    llm = LLM(model, prefill=config, decode=None)
    prompt = torch.randint(3, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    sampling = Sampling(max_new_tokens=1, ignore_eos=True)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        (completion,) = llm.generate([prompt.tolist()], sampling=sampling)
    return float(counter.get_total_flops()), completion.stats.kept_by_layer or None


@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["dense heads", "grouped heads"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_are_counted(name, num_kv_heads):
    model = build(num_kv_heads)
    config = CONFIGS[name]
    flops, kept = counted(model, config)
    assert prefill_flops(config, cost_of(model), NUM_TOKENS, kept) == flops
    assert prefill_flops(config, cost_of(model), NUM_TOKENS) == flops


def test_layers_that_differ_are_counted_each_by_itself():
    sizes = {"sliding_window": 100, "layer_types": LAYER_TYPES, "use_sliding_window": True}
    model = build(2, "qwen2", **sizes)
    cost = cost_of(model)
    assert [layer.window for layer in cost.layers] == [None, 100, None, 100, None, 100]
    assert prefill_flops(None, cost, NUM_TOKENS) == counted(model, None)[0]


def test_layers_of_different_width_are_counted_each_by_itself():
    _, spec = examine(MORE_FAMILIES["gemma4"]())
    widths = [layer.attention_width for layer in ModelCost.of(spec).layers]
    assert widths == list(spec.widths)
    assert len(set(widths)) == 2


def test_bench_and_tune_name_one_ideal_speedup():
    llm = LLM(dtype="float32")
    base = LazyPrefill()
    cost = Cost.of(llm, 8192)
    found = candidates(base, cost.model, 8192)
    for candidate in (found[0], found[len(found) // 2], found[-1]):
        assert candidate.speedup == cost.ideal_speedup(replace(base, schedule=candidate.schedule))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20))
def test_local_pairs_are_those_of_a_mask(num_tokens, window, num_last):
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
    is_last = query >= num_tokens - num_last
    mask = (key <= query) & ((key > query - window) | (key < 4) | is_last)
    assert local_pairs(num_tokens, window, num_last) == int(mask.sum())


@given(st.integers(1, 40), st.integers(1, 40))
def test_pairs_in_windows_and_chunks_are_those_of_a_mask(num_tokens, size):
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
    window = (key <= query) & (key > query - size)
    chunk = (key <= query) & (key // size == query // size)
    one = LayerCost(1, 1)
    layers = (one._replace(window=size), one._replace(chunk=size))
    for layer, mask in zip(layers, (window, chunk), strict=True):
        assert causal_pairs(layer, num_tokens, num_tokens) == int(mask.sum())


@given(st.integers(256, 20_000))
def test_what_is_kept_never_grows_with_depth_and_holds_what_is_protected(num_tokens):
    model = ModelCost((LayerCost(1000, 64),) * 12)
    config = LazyPrefill()
    kept = kept_counts(config, model, num_tokens)
    assert all(deeper <= count for count, deeper in pairwise(kept))
    assert kept[-1] >= config.protect_first + config.protect_last


def test_a_prompt_that_is_not_pruned_gains_nothing():
    model = ModelCost((LayerCost(1000, 64),) * 12)
    assert ideal_speedup(LazyPrefill(min_tokens=2000), model, 1999) == 1.0
    assert ideal_speedup(None, model, 4096) == 1.0
