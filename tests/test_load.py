"""Where models come from: a folder, the hub's local cache, the network last, and never code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import save_model

from lazyahead.cache.safetensors_header import read_header
from lazyahead.errors import ConfigError, ModelError, ModelNotFoundError
from lazyahead.hf import load as loading
from lazyahead.hf.load import load, load_tokenizer, model_config

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


# --- damaged folders ------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4831\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    return save_model(tmp_path)


def refused(folder: Path, *parts: str) -> None:
    """Loading fails in one line that holds these."""
    with pytest.raises(ModelError) as error:
        load(str(folder), "float32")
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_missing_weights_are_refused_by_name(folder):
    def without_a_layer(tensors):
        for name in [name for name in tensors if "layers.2." in name]:
            del tensors[name]

    change_weights(folder, without_a_layer)
    refused(folder, "has no model.layers.2.input_layernorm.weight", "6 more")


def test_unexpected_weights_are_refused_by_name(folder):
    change_weights(folder, lambda tensors: tensors.update({"model.layers.9.x": torch.zeros(3)}))
    refused(folder, "model.layers.9.x")


def test_weights_of_another_shape_are_refused_by_name(folder):
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    refused(folder, "another shape", "model.norm.weight")


def test_a_head_that_is_tied_to_the_embedding_is_not_missing(tmp_path):
    save_model(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load(str(tmp_path), "float32")[0].config.tie_word_embeddings


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_git_lfs_pointer_is_named_with_its_remedy(folder, name):
    (folder / name).write_bytes(POINTER)
    refused(folder, name, "git lfs pull")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_weights_that_are_cut_short_are_refused(folder, share):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(folder, "model.safetensors is damaged", "fetch it again")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("text", ['{"a": ', "[]", "", "\udcff"])
def test_a_file_that_is_no_json_object_is_refused(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, f"{name} is damaged")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"hidden_size": 32', '"hidden_size": "x"'),
        ('"num_attention_heads": 4', '"num_attention_heads": 0'),
        ('"model_type": "llama"', '"model_type": "no such"'),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(folder, old, new):
    path = folder / "config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    refused(folder, "cannot load model")


def test_a_missing_part_of_the_weights_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refused(folder, "lacks model-00002-of-00002.safetensors")


def test_a_file_that_is_not_loaded_may_be_a_pointer(folder):
    (folder / "consolidated.safetensors").write_bytes(POINTER)
    assert load(str(folder), "float32")


def test_a_dtype_may_be_torchs_own(folder):
    assert load(str(folder), torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="int16"):
        load(str(folder), torch.int16)


def test_a_tokenizer_is_loaded_alone(folder):
    assert load_tokenizer(str(folder))("a")["input_ids"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [4]},
        [],
    ],
)
def test_a_header_whose_numbers_do_not_agree_is_refused(tmp_path, entry):
    raw = json.dumps({"a": entry}).encode()
    path = tmp_path / "file"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(ValueError, match=r"\w"):
        read_header(path)


def test_a_path_may_begin_at_home_and_one_that_is_not_there_is_told_without_the_network(
    tmp_path, monkeypatch, no_network
):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(tmp_path / "mine")
    assert load("~/mine")[1].get_vocab() == load_tokenizer("~/mine").get_vocab()
    for name in ("~/other", "/no/such/folder"):
        with pytest.raises(ModelNotFoundError, match="no tokenizer at"):
            load_tokenizer(name)
    assert not no_network
