"""The weights that ship, the tokenizer and the measures."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lazyahead import LLM, LazyPrefill, Lookahead
from lazyahead.hf.probe import probe
from lazyahead.reader import Sample, reader_path, samples, score
from lazyahead.reader import metrics as measure
from lazyahead.results import Completion
from lazyahead.sampling import Sampling


@cache
def load_tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(reader_path())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are no faster on two threads, and far slower when another process holds one of
    the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return load_tokenizer()


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_single_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.tokenize("48312") == list("48312")


def test_the_weights_load_and_fit(tokenizer) -> None:  # type: ignore[no-untyped-def]
    size = sum(file.stat().st_size for file in reader_path().glob("*.safetensors"))
    assert size <= 16 * 2**20
    model = AutoModelForCausalLM.from_pretrained(reader_path(), dtype=torch.float32)
    assert model.config.max_position_embeddings >= 16384
    assert model.config.num_hidden_layers >= 8
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size


def test_the_reader_answers(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = AutoModelForCausalLM.from_pretrained(reader_path(), dtype=torch.float32).eval()
    scores = []
    for sample in samples("single_doc_qa", 512, seed=1, n=4):
        ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
            )
        scores.append(
            score(sample, tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        )
    assert sum(scores) / len(scores) >= 0.75


def test_measures_have_their_known_values() -> None:
    assert measure.token_f1("The cat, sat!", "a cat sat") == 1.0
    assert measure.token_f1("red house", "red door") == 0.5
    assert measure.token_f1("", "door") == 0.0
    assert measure.rouge_l("a b c d", "a b x d") == pytest.approx(0.75)
    assert measure.edit_similarity("result = f(x)\nmore", "result = f(x)") == 1.0
    assert measure.edit_similarity("abcd", "abce") == pytest.approx(0.75)
    assert measure.numbers_right("12 or 13", "The key is 12.") == 0.5
    assert measure.exact_line(" Label: a is b\n", "Label: a is b") == 1.0


def test_quoting_the_question_scores_nothing() -> None:
    sample = Sample(
        "single_doc_qa",
        "",
        "What is the emblem of Velmora Mill?",
        "The emblem of Velmora Mill is oak.",
    )
    assert score(sample, "The emblem of Velmora Mill is oak.") == 1.0
    assert score(sample, "The emblem of Velmora Mill is lion.") == 0.0


def test_the_reader_can_be_read_lazily_and_drafted_for() -> None:
    model = AutoModelForCausalLM.from_pretrained(reader_path(), dtype=torch.float32)
    support = probe(model)
    assert (support.level, support.num_layers) == ("full", model.config.num_hidden_layers)


def test_a_tenth_of_the_tokens_behind_half_of_the_layers_give_the_full_answer() -> None:
    model = AutoModelForCausalLM.from_pretrained(reader_path(), dtype=torch.float32)
    lazy = LazyPrefill(((0.5, 0.1),), protect_last=8)
    answers: dict[str, list[Completion]] = {}
    for name, prefill, decode in (
        ("full", None, None),
        ("lazy", lazy, None),
        ("drafted", lazy, Lookahead()),
    ):
        llm = LLM(model, tokenizer=load_tokenizer(), prefill=prefill, decode=decode)
        answers[name] = [
            llm.generate(sample.document, sample.question, sampling=Sampling(max_new_tokens=100))
            for sample in samples("summarization", 1024, n=2)
        ]
    texts = {name: [answer.text for answer in given] for name, given in answers.items()}
    assert texts["lazy"] == texts["drafted"] == texts["full"]
    assert all(answer.stats.prompt_tokens_computed < 0.7 for answer in answers["lazy"])
    assert all(answer.stats.revived > 0 for answer in answers["lazy"])
