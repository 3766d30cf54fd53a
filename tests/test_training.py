"""The reader's training: its first circuit, its batches, and runs that can be interrupted."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lazyahead.reader import reader_path
from training.batches import ANSWER_WEIGHT, make_batch
from training.circuit import SIZES, Size, build_model
from training.plans import Stage
from training.train import TrainingRun, train
from training.vocabulary import study

TINY = Size(width=192, head_dim=32, mlp=64, num_layers=8)
STAGES = (Stage(length=128, batch=2, steps=3, lr_start=0.0, lr_end=1e-3, repeats=0.5, dense=1.0),)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are no faster on two threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(reader_path())


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
    train(TrainingRun(tmp_path / "whole", TINY, STAGES, log_every=1))
    for stop in (1, 3):
        progress = train(TrainingRun(tmp_path / "broken", TINY, STAGES, log_every=1), until=stop)
        assert progress.step == stop
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    assert _weights(whole) == _weights(broken)
    assert _losses(whole) == _losses(broken)
    assert not list(tmp_path.rglob("*.pt"))


def _weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "step-000003" / "model.safetensors").read_bytes()


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "curve.jsonl").read_text().splitlines()]
