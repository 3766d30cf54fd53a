"""Where models come from: a folder, the hub's local cache, the network last, and never code."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny import save_model

from lazyahead.errors import ModelNotFoundError
from lazyahead.hf import load as loading
from lazyahead.hf.load import load, model_config

NAME = "someone/some-model"


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The folder in which the hub's cache keeps a model that was loaded before. The network fails
    loudly."""
    repository = tmp_path / "models--someone--some-model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    torch.manual_seed(0)
    save_model(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "get_session", lambda: pytest.fail("the network was asked"))
    return snapshot


@pytest.fixture
def no_network(monkeypatch):
    """Asked, it fails at once; returns how often it was."""
    asked = []

    def get_session():
        asked.append(1)
        raise ConnectionError("no route")

    monkeypatch.setattr(loading, "get_session", get_session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


def test_a_cached_model_asks_no_network(cached):
    model, tokenizer = load(NAME, "float32")
    assert model.config.model_type == "llama"
    assert tokenizer("a")["input_ids"]
    assert model_config(NAME).model_type == "llama"


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_is_cached_in_part_is_looked_for_and_the_error_is_one_line(
    cached, no_network, missing
):
    (cached / missing).unlink()
    with pytest.raises(ModelNotFoundError, match=NAME) as error:
        load(NAME, "float32")
    assert "\n" not in str(error.value)
    assert "no route" in str(error.value)
    assert no_network == [1]


def test_a_tokenizer_is_never_made_up(cached, no_network):
    """Qwen's is an empty one where its files are missing."""
    save_model(cached, "qwen2")
    assert load(NAME, "float32")[1]("a")["input_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (cached / name).unlink()
    with pytest.raises(ModelNotFoundError, match="no route"):
        load(NAME, "float32")


def test_cached_weights_that_can_run_code_are_not_taken(cached, no_network):
    model = load(str(cached), "float32")[0]
    (cached / "model.safetensors").unlink()
    torch.save(model.state_dict(), cached / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError):
        load(NAME, "float32")


def test_a_name_that_nobody_has_is_looked_for_once(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="does not answer"):
        model_config(NAME)
    assert no_network == [1]


def test_a_folder_asks_neither_cache_nor_network(cached, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(cached, folder)
    assert load(str(folder), "float32")[0].dtype == torch.float32
