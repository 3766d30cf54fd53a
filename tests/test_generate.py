"""transformers' own entry: whatever `generate` honours is honoured, what cannot be is refused by
name."""

from contextlib import nullcontext

import families
import pytest
import tiny as disk
import torch
from support import CALM, KEEP_ALL, LAZY, tiny
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)

from lazyahead import LazyPrefill, Lookahead, accelerate, custom_generate
from lazyahead.errors import RequestError, UnsupportedModelError

PLAIN = {"do_sample": False, "max_new_tokens": 14}
FAMILIES = ["llama", "gemma2", "gemma3", "gpt_oss", "mistral_window", "smollm3", "llama4"]
WAYS = [(None, None), (None, Lookahead()), (KEEP_ALL, Lookahead())]


def batch(num_rows=3, length=40, vocab=96):
    """Rows that repeat themselves (so that drafts are found), padded on the left to different
    lengths."""
    ids = torch.randint(3, vocab, (num_rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, length // 2 :] = ids[:, : length // 2]
    mask = torch.ones_like(ids)
    for row in range(1, num_rows):
        mask[row, : 6 * row] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one(length=40):
    return {name: value[:1] for name, value in batch(1, length).items()}


def run(model, way, inputs, **options):
    with accelerate(model, *way) as accelerated:
        out = model.generate(**inputs, **{**PLAIN, **options})
    return out, accelerated.stats


class Favour(LogitsProcessor):
    """A processor of the caller's own: pushes one token every third step."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] % 3 == 0:
            scores = scores.clone()
            scores[:, 17] += 30.0
        return scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS, ids=["bare", "drafts", "keep_all"])
def test_a_padded_batch_gets_the_answers_of_transformers(family, way):
    model = tiny(family)[0]
    out, stats = run(model, way, batch())
    if (
        family == "llama4"
    ):  # transformers counts its chunks from the padding; each row alone is the truth
        for row, ids in enumerate(batch()["input_ids"]):
            alone = ids[None, 6 * row :]
            expected = model.generate(alone, attention_mask=torch.ones_like(alone), **PLAIN)
            assert out[row, 6 * row :].tolist() == expected[0].tolist()
    else:
        assert out.tolist() == model.generate(**batch(), **PLAIN).tolist()
    assert [s.prompt_tokens for s in stats] == [40, 34, 28]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[token] for token in range(3, 60)]},
        {"sequence_bias": {(9,): 6.0, (10, 11): 4.0}},
        {"min_new_tokens": 6, "eos_token_id": list(range(3, 60))},
        {"eos_token_id": list(range(3, 40))},
        {"suppress_tokens": list(range(3, 70))},
        {"begin_suppress_tokens": list(range(3, 90))},
        {"forced_eos_token_id": 7},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 7},
        {"renormalize_logits": True},
        {"encoder_repetition_penalty": 1.3},
        {"max_length": 47, "max_new_tokens": None},
        {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 4 + row, 5 + len(ids) % 7]},
        {"logits_processor": LogitsProcessorList([Favour()])},
        {"watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_setting_of_generation_is_honoured(options):
    model = tiny("llama")[0]
    expected = model.generate(**batch(), **{**PLAIN, **options})
    for way in WAYS[1:]:
        assert run(model, way, batch(), **options)[0].tolist() == expected.tolist()


def test_the_models_own_generation_config_is_honoured():
    model = families.FAMILIES["llama"]()
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.max_new_tokens = 9
    expected = model.generate(**batch())
    with accelerate(model, None, Lookahead()):
        assert model.generate(**batch()).tolist() == expected.tolist()
        config = model.generation_config
        assert model.generate(**batch(), generation_config=config).tolist() == expected.tolist()


@pytest.mark.parametrize("way", WAYS[1:])
def test_scores_and_logits_are_those_of_transformers(way):
    model = tiny("llama")[0]
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
    }
    expected = model.generate(**batch(), **PLAIN, **asked)
    out, _ = run(model, way, batch(), **asked)
    assert out.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(out[name]) == len(expected[name])
        for ours, theirs in zip(out[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    bare, _ = run(model, way, batch(), return_dict_in_generate=True)
    assert bare.scores is None
    assert bare.logits is None


def test_each_of_several_sequences_per_prompt_is_a_draw_of_its_own():
    model, asked = (
        tiny("llama")[0],
        {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
    )
    outs = []
    for decode in (None, Lookahead(), None):
        torch.manual_seed(3)
        outs.append(run(model, (LAZY, decode), batch(2), **asked)[0])
    assert outs[0].shape == (6, 54)
    assert outs[0].tolist() == outs[1].tolist() == outs[2].tolist()
    assert len({tuple(row) for row in outs[0].tolist()}) == 6


class StopAt(StoppingCriteria):
    """Stops at a length, and notes what it was shown."""

    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.shape[1], None if scores is None else len(scores)))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria_are_asked_at_every_token_and_obeyed_at_once():
    model = tiny("llama")[0]
    asked = {"return_dict_in_generate": True, "output_scores": True}
    ours, theirs = StopAt(46), StopAt(46)
    expected = model.generate(**one(), **PLAIN, **asked, stopping_criteria=[theirs])
    out, _ = run(model, (None, Lookahead()), one(), **asked, stopping_criteria=[ours])
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.sequences.shape[1] == 46
    assert ours.seen == theirs.seen


def test_stop_strings_end_the_answer_where_transformers_ends_it():
    tokenizer = disk.byte_level()
    model = families.build("llama", vocab_size=len(tokenizer))
    plain = model.generate(**one(), **PLAIN)
    stop = tokenizer.decode(plain[0, 44:46])
    asked = {"stop_strings": [stop], "tokenizer": tokenizer}
    expected = model.generate(**one(), **PLAIN, **asked)
    assert expected.shape[1] < 54
    assert run(model, (None, Lookahead()), one(), **asked)[0].tolist() == expected.tolist()
    with pytest.raises(RequestError, match="tokenizer"):
        run(model, (None, None), one(), stop_strings=[stop])
    model.generation_config.stop_strings = [stop]
    assert (
        run(model, (None, Lookahead()), one(), tokenizer=tokenizer)[0].tolist() == expected.tolist()
    )
    assert model.generation_config.stop_strings == [stop]


def test_arguments_may_be_given_by_place():
    model, inputs, ours, theirs = tiny("llama")[0], one(), Streamer(), Streamer()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for told in (theirs, ours):
        with accelerate(model, None, None) if told is ours else nullcontext():
            model.generate(inputs["input_ids"], config, None, None, None, None, None, told)
    assert ours.heard == theirs.heard


class Streamer:
    """As transformers' own: the prompt first, then tokens, then the end."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.heard.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_hears_what_transformers_would_tell_it():
    model, ours, theirs = tiny("llama")[0], Streamer(), Streamer()
    model.generate(**one(), **PLAIN, streamer=theirs)
    run(model, (None, Lookahead()), one(), streamer=ours)
    assert ours.ended
    assert ours.heard == theirs.heard
    with pytest.raises(RequestError, match="batch of 3"):
        run(model, WAYS[1], batch(), streamer=Streamer())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beams", {"num_beams": 2}),
        ("assistant_model", {"assistant_model": "the model itself"}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("past_key_values", {"past_key_values": object()}),
        ("inputs_embeds", {"inputs_embeds": torch.zeros(1, 40, 64)}),
        ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
        ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
        ("guidance_scale", {"guidance_scale": 2.0}),
        ("cache_implementation", {"cache_implementation": "static"}),
        ("custom_generate", {"custom_generate": lambda *args, **kwargs: None}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name, options):
    model = tiny("llama")[0]
    options = {
        key: model if value == "the model itself" else value for key, value in options.items()
    }
    with pytest.raises(RequestError, match=name):
        run(model, WAYS[1], one(), **options)
    assert run(model, WAYS[1], one())[0].shape == (1, 54)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.tensor([[1] * 39 + [0]])}, "pad on the left"),
        ({"attention_mask": torch.zeros(1, 40, dtype=torch.long)}, "empty"),
        ({"position_ids": torch.arange(5, 45)[None]}, "position_ids"),
    ],
)
def test_inputs_that_would_be_read_otherwise_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        run(tiny("llama")[0], WAYS[1], {**one(), **options})


def test_an_encoder_decoder_is_refused_on_entry():
    config = AutoConfig.for_model(
        "t5", vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    with (
        pytest.raises(UnsupportedModelError, match="encoder-decoder"),
        accelerate(model, None, None),
    ):
        pass
    assert "generate" not in model.__dict__


def test_after_the_block_the_model_is_as_before_also_after_an_exception():
    model = tiny("llama")[0]

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(model, (LAZY, Lookahead()), one(), logits_processor=[Fails()])
    assert "generate" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    expected = model.generate(**one(), **PLAIN)
    with accelerate(model, None, None) as accelerated:
        with pytest.raises(KeyError):
            model.generate(**one(), **PLAIN, logits_processor=[Fails()])
        assert accelerated.engine.is_idle
        assert model.generate(**one(), **PLAIN).tolist() == expected.tolist()


def test_blocks_may_be_nested_and_the_inner_one_counts():
    model = tiny("llama")[0]
    expected = model.generate(**one(), **PLAIN).tolist()
    with accelerate(model, LAZY, None) as outer:
        with accelerate(model, None, Lookahead()) as inner:
            assert model.generate(**one(), **PLAIN).tolist() == expected
        assert not outer.stats
        assert len(inner.stats) == 1
        model.generate(**one(), **PLAIN)
        assert outer.stats[0].prompt_tokens_computed < 1
        assert len(inner.stats) == 1
    assert model.generate(**one(), **PLAIN).tolist() == expected


def test_custom_generate_serves_a_single_call():
    model, streamer = tiny("llama")[0], Streamer()
    expected = model.generate(**one(), **PLAIN).tolist()
    method = custom_generate(KEEP_ALL, Lookahead(), streamer)
    assert model.generate(**one(), **PLAIN, custom_generate=method).tolist() == expected
    assert streamer.ended
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("prefill", [LAZY, CALM, LazyPrefill.paper(), LazyPrefill.random_drop()])
def test_drafts_change_no_text_however_the_prompt_is_read(prefill):
    model = tiny("gemma3")[0]
    texts = []
    for decode in (None, Lookahead(), Lookahead(mode="parallel")):
        torch.manual_seed(0)
        texts.append(
            run(
                model,
                (prefill, decode),
                batch(),
                do_sample=True,
                temperature=0.5,
                max_new_tokens=40,
            )[0].tolist()
        )
    assert texts[0] == texts[1] == texts[2]


def test_a_step_can_bring_several_tokens():
    _, stats = run(
        tiny("llama")[0], (None, Lookahead()), one(), max_new_tokens=60, repetition_penalty=0.7
    )
    assert stats[0].answer_tokens == 60
    assert stats[0].tokens_per_step >= 1.0


def test_a_processor_of_ones_own_is_not_copied_for_a_single_sequence():
    class Counts(LogitsProcessor):
        def __init__(self):
            self.count = 0

        def __call__(self, input_ids, scores):
            self.count += 1
            return scores

    mine = Counts()
    run(tiny("llama")[0], (None, Lookahead()), one(), logits_processor=[mine])
    assert mine.count == 14
