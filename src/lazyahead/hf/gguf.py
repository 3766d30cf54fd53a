"""GGUF files: read through transformers, dequantised, and converted to a safetensors folder.

A GGUF file holds quantised weights, the tokenizer and the chat template. transformers dequantises
it at load; what comes out here is an ordinary model with no trace of the quantisation, so that it
can be saved, moved and accelerated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)

from lazyahead.errors import (
    ConfigError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from lazyahead.hf.gguf_rope import FACTORS, llama3_scaling
from lazyahead.hf.gguf_tokenizer import check_tokenizer

SUFFIX = ".gguf"
MAGIC = b"GGUF"
SCALING_IS_READ = ("gpt-oss", "gpt_oss")
"""Architectures whose rotary scaling transformers takes over from a GGUF file."""
Progress = Callable[[str, float], None]
"""Hears what is being done and the fraction of it that is done."""


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return Path(name).suffix.lower() == SUFFIX


def load_gguf(
    path: str | Path,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    progress: Progress = lambda *_: None,
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a GGUF file, dequantised to `dtype`; "auto" is bfloat16.

    Raises ConfigError where the extra `gguf` is missing, ModelNotFoundError for a file that is not
    there, damaged or truncated, UnsupportedModelError for an architecture or a quantisation that
    transformers cannot read, OutOfMemoryError.
    """
    file, reader, scaling = check_gguf(path)
    where = {"gguf_file": file.name, "trust_remote_code": False}
    target = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
        check_tokenizer(file, reader.fields, tokenizer)
        with _heard(progress):
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=target, attn_implementation="sdpa", **_dequantise(), **where
            )
        return _plain(model, target, scaling).to(device), tokenizer
    except UnsupportedModelError:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{file} does not fit on {device}; choose a smaller model"
        ) from error
    except Exception as error:  # the readers raise whatever the bytes lead them to
        raise _unsupported(file, error) from error


def gguf_config(path: str | Path) -> Any:
    """The model config of a GGUF file. Raises as `load_gguf`."""
    file, _, scaling = check_gguf(path)
    try:
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:
        raise _unsupported(file, error) from error
    if scaling is not None:
        config.rope_parameters = scaling
    return config


def convert_gguf(
    path: str | Path, folder: str | Path, dtype: str = "auto", progress: Progress = lambda *_: None
) -> PreTrainedModel:
    """Writes a safetensors folder with tokenizer and generation config; returns the model.

    The folder appears when it is complete. Raises ConfigError for a folder that is not empty or a
    place that cannot be written, otherwise as `load_gguf`.
    """
    target = check_target(folder)
    progress("reading", 0.0)
    model, tokenizer = load_gguf(path, dtype, progress=progress)
    progress("writing", 1.0)
    partial = target.with_name(f".{target.name}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model


def check_target(folder: str | Path) -> Path:
    """The folder to write. Raises ConfigError for one that is not empty or cannot be made."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not an empty folder; name a new one, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    return target


def check_gguf(path: str | Path) -> tuple[Path, Any, dict[str, Any] | None]:
    """The file, found to be whole as far as its header tells, what reads it, and the rotary scaling
    that transformers leaves out, as its `rope_parameters`. Raises as `load_gguf`."""
    file = Path(path)
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(MAGIC))
    except OSError as error:
        raise ModelNotFoundError(
            f"{file} cannot be read: {error.strerror}; check the path"
        ) from None
    if magic != MAGIC:
        raise ModelNotFoundError(
            f"{file} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}; fetch it again"
        )
    _need_extra(file)
    reader = _read(file)
    return file, reader, _check_contents(file, reader)


def _need_extra(file: Path) -> None:
    """Raises ConfigError where a package that reads GGUF is missing."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ConfigError(f"{file} needs the package {package}; pip install 'lazyahead[gguf]'")


def _read(file: Path) -> Any:
    """A reader of the file: some seconds where the vocabulary is large. Raises for a damaged or
    truncated file."""
    from gguf import GGUFReader  # an extra

    try:
        return GGUFReader(file)
    except Exception as error:
        raise _damaged(file, error) from None


def _check_contents(file: Path, reader: Any) -> dict[str, Any] | None:
    """Llama 3's rotary scaling, where the file has it. Raises for a damaged file, and for other
    scaling, which would be lost."""
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = _text(reader, "general.architecture")
        scaling = _text(reader, f"{architecture}.rope.scaling.type")
    except Exception as error:
        raise _damaged(file, error) from None
    if architecture is None or not tensors:
        raise UnsupportedModelError(
            f"{file} holds no model: no architecture or no tensors; give another file"
        )
    if any(name.startswith("rope_") for name in tensors):
        base = reader.get_field(f"{architecture}.rope.freq_base")
        theta = float(base.contents()) if base is not None else 10_000.0
        found = llama3_scaling(tensors[FACTORS].data, theta) if FACTORS in tensors else None
        if found is not None and architecture == "llama":
            return found
        scaling = "its own factors"
    if scaling not in (None, "none") and architecture not in SCALING_IS_READ:
        raise UnsupportedModelError(
            f"{file} scales its rotary embedding by {scaling}, which transformers does not read "
            f"from GGUF ({architecture}); use the model's safetensors folder"
        )
    return None


def _text(reader: Any, key: str) -> str | None:
    """A text field of the header; None where there is none."""
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


@contextmanager
def _heard(progress: Progress) -> Iterator[None]:
    """Tensors as they are dequantised go to `progress` instead of a bar of transformers' own."""

    def tell(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        total = len(tensors) if isinstance(tensors, Sized) else 0
        for number, tensor in enumerate(tensors):
            progress("dequantising", number / total if total else 0.0)
            yield tensor

    before = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    modeling_gguf_pytorch_utils.tqdm = tell
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = before


def _dequantise() -> dict[str, Any]:
    """Asks for dense weights where transformers would keep them packed (5.23 and later)."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _plain(
    model: PreTrainedModel, dtype: torch.dtype, scaling: dict[str, Any] | None
) -> PreTrainedModel:
    """The same weights in a model that was never quantised, so that it can be saved and moved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if scaling is not None:
        config.rope_parameters = scaling
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():  # those that no state holds
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    if scaling is not None:
        plain.model.rotary_emb = type(plain.model.rotary_emb)(config=config)
    plain.generation_config = model.generation_config
    return plain.eval()


def _damaged(file: Path, error: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{file} is damaged or truncated ({_first_line(error)}); fetch it again"
    )


def _unsupported(file: Path, error: Exception) -> UnsupportedModelError:
    """What transformers said, with the file and a remedy."""
    return UnsupportedModelError(
        f"{file} cannot be loaded through transformers: {_first_line(error)}; "
        "use another quantisation of the model, or its safetensors folder"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
