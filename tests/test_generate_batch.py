"""Batches seen as a whole, blocks that overlap, models inside other modules, and the modes a caller
may work in."""

import families
import pytest
import torch
from support import KEEP_ALL, LAZY, tiny
from test_generate import PLAIN, batch, one, run
from torch import nn
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from lazyahead import LazyPrefill, Lookahead, accelerate, custom_generate
from lazyahead.errors import ConfigError, RequestError, UnsupportedModelError
from lazyahead.integrations.hf_inputs import refuse

WAYS = [(None, None), (None, Lookahead()), (KEEP_ALL, Lookahead()), (LazyPrefill(), None)]
ways = pytest.mark.parametrize("way", WAYS, ids=["bare", "drafts", "keep_all", "short"])


class Biased(LogitsProcessor):
    """Adds a bias that differs between rows, and notes what it is called with."""

    def __init__(self, num_rows, vocab_size=101):
        generator = torch.Generator().manual_seed(1)
        self.bias = 20 * torch.rand(num_rows, vocab_size, generator=generator)
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((tuple(input_ids.shape), tuple(scores.shape)))
        return scores + self.bias


class EndsRows(StoppingCriteria):
    """Ends each row at a length of its own: holds one entry per row."""

    def __init__(self, lengths):
        self.lengths, self.num_calls = torch.tensor(lengths), 0

    def __call__(self, input_ids, scores, **kwargs):
        self.num_calls += 1
        return torch.tensor(
            [input_ids.shape[1] >= self.lengths[row] for row in range(len(input_ids))]
        )


@ways
def test_a_processor_of_ones_own_sees_the_batch_as_transformers_shows_it(way):
    model, ours, theirs = tiny("llama")[0], Biased(3), Biased(3)
    expected = model.generate(**batch(), **PLAIN, logits_processor=[theirs])
    out, stats = run(model, way, batch(), logits_processor=[ours])
    assert out.tolist() == expected.tolist()
    assert ours.seen == theirs.seen
    assert [s.prompt_tokens for s in stats] == [40, 34, 28]
    assert [s.answer_tokens for s in stats] == [14] * 3


@ways
def test_a_criterion_that_holds_an_entry_per_row_is_asked_once_per_step(way):
    model, ours, theirs = tiny("llama")[0], EndsRows([45, 50, 48]), EndsRows([45, 50, 48])
    asked = {"pad_token_id": 0, "eos_token_id": 7}
    expected = model.generate(**batch(), **PLAIN, **asked, stopping_criteria=[theirs])
    out, stats = run(model, way, batch(), **asked, stopping_criteria=[ours])
    assert out.tolist() == expected.tolist()
    assert ours.num_calls == theirs.num_calls
    assert [s.answer_tokens for s in stats] == [5, 10, 8]
    assert all(s.ttft_s > 0 and s.decode_s > 0 for s in stats)


def test_scores_of_a_batch_that_is_seen_as_a_whole_are_those_of_transformers():
    model, asked = tiny("llama")[0], {"return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**batch(), **PLAIN, **asked, logits_processor=[Biased(3)])
    out, _ = run(model, (None, Lookahead()), batch(), **asked, logits_processor=[Biased(3)])
    assert out.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))


def test_a_batch_that_is_seen_as_a_whole_is_not_read_lazily_but_refused_by_name():
    model = tiny("llama")[0]
    for asked in ({"logits_processor": [Biased(3)]}, {"stopping_criteria": [EndsRows([45] * 3)]}):
        name = type(next(iter(asked.values()))[0]).__name__
        with pytest.raises(RequestError, match=f"{name} may look at the whole batch of 3"):
            run(model, (LAZY, Lookahead()), batch(), **asked)
    assert run(model, (LAZY, None), one(), logits_processor=[Biased(1)])[0].shape == (1, 54)


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_blocks_that_end_in_any_order_leave_nothing_behind(order):
    model = tiny("llama")[0]
    expected = model.generate(**one(), **PLAIN).tolist()
    blocks = [accelerate(model, None, decode) for decode in (None, Lookahead(), None)]
    inside = [block.__enter__() for block in blocks]
    still_open = [0, 1, 2]
    for place in order:
        assert model.generate(**one(), **PLAIN).tolist() == expected
        assert len(inside[still_open[-1]].stats) == 1
        inside[still_open[-1]].stats = []
        blocks[place].__exit__(None, None, None)
        still_open.remove(place)
    assert "generate" not in model.__dict__
    assert model.generate(**one(), **PLAIN).tolist() == expected


def test_a_method_that_somebody_else_puts_on_top_stays_theirs():
    model = tiny("llama")[0]
    block = accelerate(model, None, None)
    block.__enter__()
    try:
        inner = model.generate
        model.generate = lambda **kwargs: ("theirs", inner(**kwargs))
        block.__exit__(None, None, None)
        assert model.generate(**one(), **PLAIN)[0] == "theirs"
    finally:
        del model.generate


# --- models and modes -----------------------------------------------------------------------------


def mamba():
    return families.build(
        "mamba", state_size=8, hidden_size=32, num_attention_heads=..., head_dim=...
    )


def test_a_model_with_a_state_of_its_own_is_not_refused_for_a_cache_that_nobody_gave():
    model = mamba()
    expected = model.generate(**one(), **PLAIN)
    assert run(model, (None, None), one())[0].tolist() == expected.tolist()
    method = custom_generate(None, None)
    out = model.generate(**one(), **PLAIN, custom_generate=method)
    assert out.tolist() == expected.tolist()
    cache = DynamicCache(config=model.config)
    model(**one(), cache_params=cache, use_cache=True)
    with pytest.raises(RequestError, match="cache_params"):
        run(model, (None, None), one(), cache_params=cache)
    with pytest.raises(RequestError, match="cache_params"):
        model.generate(**one(), **PLAIN, cache_params=cache, custom_generate=method)


def test_what_is_made_in_inference_mode_can_be_used_outside_it():
    model = families.FAMILIES["llama"]()
    expected = model.generate(**one(), **PLAIN).tolist()
    with torch.inference_mode():
        block = accelerate(model, KEEP_ALL, Lookahead())
        block.__enter__()
        assert model.generate(**one(), **PLAIN).tolist() == expected
    assert model.generate(**one(), **PLAIN).tolist() == expected
    block.__exit__(None, None, None)


class Wrapper(nn.Module):
    """A parallel wrapper: the model is its `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Adapted(nn.Module):
    """What PEFT's models look like."""

    def __init__(self, model, is_prompt_learning=False):
        super().__init__()
        self.base_model = model
        self.active_adapter = "default"
        self.peft_config = {"default": Settings(is_prompt_learning)}

    def get_base_model(self):
        return self.base_model

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


class Settings:
    def __init__(self, is_prompt_learning):
        self.is_prompt_learning = is_prompt_learning


def test_a_block_around_a_wrapped_model_works_on_the_model_inside():
    model = tiny("llama")[0]
    expected = model.generate(**one(), **PLAIN).tolist()
    for outer in (
        torch.compile(model, backend="eager"),
        Adapted(model),
        Adapted(torch.compile(model, backend="eager")),
    ):
        out, stats = run(outer, (None, Lookahead()), one())
        assert out.tolist() == expected
        assert len(stats) == 1
    assert "generate" not in model.__dict__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: nn.Linear(2, 2), "a Linear is no model"),
        (lambda model: Wrapper(nn.Linear(2, 2)), "a Wrapper is no model"),
        (lambda model: Adapted(model, is_prompt_learning=True), "Settings puts learned tokens"),
        (lambda model: {"model": model}, "a dict is no model"),
    ],
)
def test_what_is_no_model_is_refused_by_name(given, message):
    with (
        pytest.raises(UnsupportedModelError, match=message),
        accelerate(given(tiny("llama")[0]), None, None),
    ):
        pass


def test_a_cache_that_holds_something_is_refused_whether_or_not_it_is_marked():
    model = families.FAMILIES["llama"]()
    cache = DynamicCache(config=model.config)
    model(**one(20), past_key_values=cache, use_cache=True)
    method = custom_generate(None, None)
    with pytest.raises(RequestError, match="past_key_values"):
        model.generate(**one(40), **PLAIN, past_key_values=cache, custom_generate=method)
    cache._is_user_defined = False  # as some versions of transformers leave it
    with pytest.raises(RequestError, match="past_key_values"):
        refuse(model.generation_config, [], {"past_key_values": cache})


def test_a_block_and_a_method_take_strategies_by_name(tmp_path):
    model = families.FAMILIES["llama"]()
    expected = model.generate(**one(), **PLAIN).tolist()
    assert run(model, ("off", "lookahead"), one())[0].tolist() == expected
    named = custom_generate("balanced", "off")  # shorter than what is pruned
    assert model.generate(**one(), **PLAIN, custom_generate=named).tolist() == expected
    with pytest.raises(ConfigError, match="no such"):
        custom_generate("no such")
    with pytest.raises(ConfigError, match="no such"), accelerate(model, decode="no such"):
        pass
