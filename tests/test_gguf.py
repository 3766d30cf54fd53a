"""GGUF files: loaded, converted, and refused in one clear line."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import prompt
from tiny_gguf import tiny_llama, write_gguf
from transformers import PreTrainedModel

from lazyahead import LLM, Sampling
from lazyahead.cli import run
from lazyahead.errors import (
    ConfigError,
    LazyAheadError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from lazyahead.hf import gguf as gguf_module
from lazyahead.hf.gguf import convert_gguf, load_gguf
from lazyahead.hf.gguf_tokenizer import check_tokenizer
from lazyahead.hf.load import load, model_config


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def test_a_file_holds_the_model_that_was_written(model: PreTrainedModel, file: Path) -> None:
    loaded, tokenizer = load(str(file), dtype="float32")
    torch.testing.assert_close(loaded(prompt(40)).logits, model(prompt(40)).logits)
    assert not hasattr(loaded.config, "quantization_config")
    assert tokenizer.decode(tokenizer("The code, naïve")["input_ids"]) == "The code, naïve"
    assert tokenizer.chat_template
    assert model_config(str(file)).num_hidden_layers == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_converted_folder_is_the_file(file: Path, tmp_path: Path, dtype: str) -> None:
    convert_gguf(file, tmp_path / "folder", dtype)
    direct, _ = load_gguf(file, dtype)
    converted, tokenizer = load(str(tmp_path / "folder"))
    assert converted.dtype == direct.dtype == getattr(torch, dtype)
    assert torch.equal(converted(prompt(40)).logits, direct(prompt(40)).logits)
    assert converted.generation_config.eos_token_id == direct.generation_config.eos_token_id == 1
    assert tokenizer.chat_template
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_tied_head_is_saved_once_and_a_free_one_too(tmp_path: Path) -> None:
    from safetensors import safe_open

    for is_tied in (True, False):
        name = f"tied_{is_tied}"
        model = tiny_llama(is_tied)
        converted = convert_gguf(
            write_gguf(tmp_path / f"{name}.gguf", model), tmp_path / name, "float32"
        )
        with safe_open(tmp_path / name / "model.safetensors", "pt") as weights:
            assert ("lm_head.weight" in weights.keys()) != is_tied  # noqa: SIM118
        again, _ = load(str(tmp_path / name))
        assert torch.equal(again(prompt(40)).logits, converted(prompt(40)).logits)
        torch.testing.assert_close(again(prompt(40)).logits, model(prompt(40)).logits)


def test_an_llm_answers_from_a_file(file: Path) -> None:
    llm = LLM(str(file))
    assert llm.model.dtype == torch.bfloat16
    assert llm.generate("The code", sampling=Sampling(max_new_tokens=3)).stats.answer_tokens <= 3


def damaged(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(file: Path, tmp_path: Path, share: float) -> None:
    content = file.read_bytes()
    short = damaged(tmp_path / "short.gguf", content[: int(len(content) * share)])
    with pytest.raises(ModelNotFoundError, match=r"short\.gguf is damaged or truncated"):
        load(str(short))


@pytest.mark.parametrize("place", [4, 8, 16, 24, 200])
def test_a_damaged_header_is_named(file: Path, tmp_path: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    broken = damaged(tmp_path / "broken.gguf", bytes(content))
    with pytest.raises(LazyAheadError, match=r"broken\.gguf") as caught:
        load(str(broken))
    assert "\n" not in str(caught.value)


def test_another_format_and_no_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"other\.gguf is no GGUF file.*PK"):
        load(str(damaged(tmp_path / "other.gguf", b"PK\x03\x04 a zip")))
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf cannot be read.*check the path"):
        load(str(tmp_path / "none.gguf"))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"folder\.gguf cannot be read"):
        load(str(tmp_path / "folder.gguf"))


def test_an_unknown_architecture_is_named(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes().replace(b"llama", b"lemon")
    strange = damaged(tmp_path / "strange.gguf", content)
    with pytest.raises(UnsupportedModelError, match=r"strange\.gguf.*lemon"):
        load(str(strange))


class Characters:
    """A tokenizer whose merges are lost."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) for letter in text]


class Headless:
    """A tokenizer that begins texts with a token only when told to, or never."""

    bos_token_id = 0

    def __init__(self, listens: bool) -> None:
        self.listens, self.add_bos_token = listens, False

    def encode(self, text: str, **_: Any) -> list[int]:
        return [1]

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, 1] if self.listens and self.add_bos_token else [1]}


def test_a_tokenizer_that_transformers_reads_wrongly_is_refused(file: Path) -> None:
    def asks(tokens: list[str], begins: bool) -> dict[str, Field]:
        fields = {"tokens": tokens, "add_bos_token": begins}
        return {f"tokenizer.ggml.{name}": Field(value) for name, value in fields.items()}

    words = ["▁question", "Ġanswer", "based", "<pad>", "▁der"]
    fields = asks(words, begins=False)
    check_tokenizer(file, fields, Headless(listens=False))
    with pytest.raises(UnsupportedModelError, match=r"loses the merges of .*tiny\.gguf"):
        check_tokenizer(file, fields, Characters())
    fields = asks(words, begins=True)
    tokenizer = Headless(listens=True)
    check_tokenizer(file, fields, tokenizer)
    assert tokenizer("a")["input_ids"] == [0, 1]
    with pytest.raises(UnsupportedModelError, match="loses the first token"):
        check_tokenizer(file, fields, Headless(listens=False))


class Field(NamedTuple):
    """A field of a GGUF file."""

    value: Any

    def contents(self) -> Any:
        return self.value


def test_rotary_scaling_that_would_be_lost_is_refused(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    changes = {"llama__rope__scaling__type": "yarn"}
    path = write_gguf(tmp_path / "long.gguf", model, **changes)
    with pytest.raises(UnsupportedModelError, match=r"long\.gguf.*yarn"):
        load(str(path))


def test_llama_3s_rotary_scaling_is_put_back(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_llama(rope_parameters=rope, head_dim=16)
    frequencies = model.model.rotary_emb.inv_freq
    unscaled = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = (unscaled / frequencies).numpy()
    assert max(factors) > 7
    path = write_gguf(tmp_path / "llama3.gguf", model, factors)
    convert_gguf(path, tmp_path / "folder", "float32")
    for name in (str(path), str(tmp_path / "folder")):
        loaded, _ = load(name, dtype="float32")
        torch.testing.assert_close(loaded(prompt(400)).logits, model(prompt(400)).logits)
        assert model_config(name).rope_parameters["rope_type"] == "llama3"
    strange = write_gguf(tmp_path / "strange.gguf", model, factors * 1.5)
    with pytest.raises(UnsupportedModelError, match=r"strange\.gguf.*its own factors"):
        load(str(strange))


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_extra_is_named(file: Path, missing: str, monkeypatch: Any) -> None:
    found = gguf_module.find_spec
    monkeypatch.setattr(
        gguf_module, "find_spec", lambda name: None if name == missing else found(name)
    )
    with pytest.raises(ConfigError, match=rf"{missing}.*pip install 'lazyahead\[gguf\]'"):
        load(str(file))


def test_convert_writes_json_and_refuses_a_full_folder(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "folder"
    assert run(["convert", str(file), str(folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"lazyahead", "machine", "model", "config", "seed", "runs"} <= set(values)
    assert values["folder"] == str(folder)
    assert values["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert run(["convert", str(file), str(folder)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert run(["convert", str(file), str(tmp_path / "x"), "--dtype", "int4"]) == 2
    assert "int4" in capsys.readouterr().err


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, file: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ConfigError, match="No space left"):
        convert_gguf(file, tmp_path / "folder")
    assert not list(tmp_path.glob("*folder*"))
    assert not list(tmp_path.glob(".*"))
