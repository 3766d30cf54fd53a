"""The weights that ship, the tokenizer, the measures, and training that resumes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lazyahead import LLM, LazyPrefill, Lookahead
from lazyahead.hf.probe import probe
from lazyahead.reader import Sample, reader_path, samples, score
from lazyahead.reader import metrics as measure
from lazyahead.reader.batches import ANSWER_WEIGHT, make_batch
from lazyahead.reader.circuit import SIZES, Size, build_model
from lazyahead.reader.plans import Stage
from lazyahead.reader.train import Run, train
from lazyahead.reader.vocabulary import study
from lazyahead.results import Completion
from lazyahead.sampling import Sampling

TINY = Size(width=192, head_dim=32, mlp=64, num_layers=8)
STAGES = (Stage(length=128, batch=2, steps=3, lr_start=0.0, lr_end=1e-3, repeats=0.5, dense=1.0),)


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


def test_the_circuit_copies_before_any_training(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = build_model(SIZES["small"], study(tokenizer, num_pages=60)).eval()
    span = torch.randint(3, 2048, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model(torch.cat([span, span], 1)).logits[0, 110:199].argmax(-1)
    assert (found == span[0, 11:]).float().mean() > 0.8


def test_batches_follow_from_the_step(tokenizer) -> None:  # type: ignore[no-untyped-def]
    stage = Stage(length=400, batch=3, steps=1, lr_start=0, lr_end=0, repeats=0.3, dense=0.3)
    first, again, other = (make_batch(stage, step, tokenizer) for step in (5, 5, 6))
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.positions, again.positions)
    assert not torch.equal(first.token_ids, other.token_ids)
    assert first.token_ids.shape == first.weights.shape == first.positions.shape == (3, 401)
    assert (first.positions.diff() >= 1).all()
    assert first.positions.max() < 16384
    assert (first.weights == ANSWER_WEIGHT).any()


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        AutoTokenizer.from_pretrained(reader_path()).save_pretrained(tmp_path / name / "weights")
    train(Run(tmp_path / "whole", TINY, STAGES, log_every=1))
    for stop in (1, 3):
        progress = train(Run(tmp_path / "broken", TINY, STAGES, log_every=1), until=stop)
        assert progress.step == stop
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    assert _weights(whole) == _weights(broken)
    assert _losses(whole) == _losses(broken)
    assert not list(tmp_path.rglob("*.pt"))


def _weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "step-000003" / "model.safetensors").read_bytes()


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_the_reader_can_be_read_lazily_and_drafted_for() -> None:
    model = AutoModelForCausalLM.from_pretrained(reader_path(), dtype=torch.float32)
    support = probe(model)
    assert (support.level, support.num_layers) == ("full", model.config.num_hidden_layers)


def test_what_only_the_answer_asks_for_is_called_back_from_the_first_boundary() -> None:
    model = AutoModelForCausalLM.from_pretrained(reader_path(), dtype=torch.float32)
    lazy, drafting = LazyPrefill(), Lookahead()
    never = replace(lazy, revive="never")
    answers: dict[str, list[Completion]] = {}
    for name, prefill, decode in (
        ("full", None, None),
        ("lazy", lazy, None),
        ("drafted", lazy, drafting),
        ("never", never, None),
    ):
        llm = LLM(model, tokenizer=load_tokenizer(), prefill=prefill, decode=decode)
        answers[name] = [
            llm.generate(sample.document, sample.question, sampling=Sampling(max_new_tokens=100))
            for sample in samples("summarization", 1024, n=2)
        ]
    texts = {name: [answer.text for answer in given] for name, given in answers.items()}
    assert texts["lazy"] == texts["drafted"] == texts["full"]
    assert texts["never"] != texts["full"]
    assert all(answer.stats.revived > 0 for answer in answers["lazy"])
