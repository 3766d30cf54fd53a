"""Loading a model from a folder, a GGUF file or a hub name: no remote code, one clear sentence
when it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lazyahead.errors import (
    ConfigError,
    ModelError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from lazyahead.hf.attach import attachment_of, dtype_name
from lazyahead.hf.folder import check_keys, check_objects, check_weights
from lazyahead.hf.gguf import gguf_config, is_gguf, load_gguf
from lazyahead.hf.ranks import accelerator, load_options, num_ranks

T = TypeVar("T")
NETWORK_TIMEOUT_S = 5.0
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


def load(
    name: str, dtype: str | torch.dtype = "auto", device: str = "auto", tp: int = 1
) -> tuple[PreTrainedModel, Any]:
    """Model (in eval mode) and tokenizer. With `tp` above 1, this rank's share of the model: every
    rank of the process group must call it. `int8`: in bfloat16, with linear layers in 8-bit
    integers for our engines.

    Raises ConfigError for an unknown dtype or device, ModelNotFoundError when there is nothing to
    load, UnsupportedModelError when transformers does not know the architecture, ModelError when
    files are damaged or weights are missing.
    """
    dtype = checked_dtype(dtype)
    if dtype == "int8":
        if tp > 1:
            raise ConfigError(f"dtype int8 is for one process, got tp={tp}; use bfloat16")
        model, tokenizer = load(name, "bfloat16", device)
        attachment_of(model).quantize(model)
        return model, tokenizer
    target, name = _device(device), _expanded(name)
    if is_gguf(name):
        return load_gguf(name, dtype, target)
    _check_folder(name)
    if Path(name).exists():
        model_config(name)  # an unknown family is told before its weights are looked at
        check_weights(Path(name))
    try:
        model, tokenizer = _nearest(name, lambda **where: _parts(name, dtype, tp, **where))
        if tp == 1:
            return model.eval().to(target), tokenizer
        if num_ranks(model) != tp:
            raise UnsupportedModelError(
                f"transformers has not shared {name} out to {tp} ranks; load it without tp"
            )
        return model.eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{name} does not fit on {target}; choose a smaller model or dtype"
        ) from error
    except OSError as error:
        reason = _first_line(error)
        raise ModelNotFoundError(f"cannot load model {name!r}: {reason}") from None
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged file leads transformers to
        raise UnsupportedModelError(f"cannot load model {name!r}: {_first_line(error)}") from None


def adopt(model: PreTrainedModel, dtype: str | torch.dtype, device: str) -> None:
    """A model that was loaded elsewhere, as it is; `int8` lets one in bfloat16 compute in 8-bit
    integers. Raises ConfigError for another dtype or device than it has."""
    dtype, own = checked_dtype(dtype), dtype_name(model)
    if dtype == "int8" and own == "bfloat16":
        attachment_of(model).quantize(model)
    elif dtype not in ("auto", own):
        raise ConfigError(f"the model was loaded in {own}; load it in {dtype}, or leave dtype out")
    wanted = model.device if device == "auto" else _device(device)
    if wanted.type != model.device.type or wanted.index not in (None, model.device.index):
        raise ConfigError(
            f"the model is on {model.device}; move it to {device}, or leave device out"
        )


def checked_dtype(dtype: str | torch.dtype) -> str:
    """One of `DTYPES`. Raises ConfigError."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name alone. Raises ModelError when it cannot be loaded."""
    name = _expanded(name)
    _check_there(name, "tokenizer")
    try:
        return _nearest(
            name,
            lambda **where: AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where),
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load tokenizer {name!r}: {_first_line(error)}") from None


def _nearest(name: str, get: Callable[..., T]) -> T:
    """From the hub's local cache where it is all there, else from the network: a cached model waits
    for nobody."""
    if not Path(name).exists():
        try:
            return get(local_files_only=True)
        except OSError:
            _check_network(name)
    return get()


def _check_network(name: str) -> None:
    """One quick look, as the hub retries for half a minute. Raises ModelNotFoundError where nobody
    answers."""
    if constants.HF_HUB_OFFLINE:
        raise ModelNotFoundError(
            f"{name!r} is not in the local cache and HF_HUB_OFFLINE is set; give a model folder"
        )
    try:
        get_session().head(constants.ENDPOINT, timeout=NETWORK_TIMEOUT_S)
    except Exception as error:
        reason = _first_line(error)
        raise ModelNotFoundError(
            f"{name!r} is not in the local cache and {constants.ENDPOINT} does not answer "
            f"({reason}); give a model folder, or look at the network"
        ) from None


def _parts(name: str, dtype: str, tp: int, **where: bool) -> tuple[PreTrainedModel, Any]:
    """The tokenizer first: it is small, and says at once that there is nothing.

    Without its files some families would make an empty one up, so that the cache must have one of
    them.
    """
    if where and not any(
        isinstance(try_to_load_from_cache(name, file), str) for file in VOCABULARIES
    ):
        raise OSError(f"the local cache has no tokenizer of {name!r}")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    shares: dict[str, Any] = {}
    if tp > 1:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        shares = load_options(config, tp, name)
    return _weights(name, dtype, "sdpa", **shares, **where), tokenizer


def _weights(name: str, dtype: str, attention: str, **options: Any) -> PreTrainedModel:
    """The model with `attention`, or eager where the family refuses it; never what its config asks
    for, which may be code from elsewhere."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # so that all of them can be named
            output_loading_info=True,
            **options,
        )
    except ValueError as error:
        if attention == "eager" or "scaled_dot_product_attention" not in str(error):
            raise
        return _weights(name, dtype, "eager", **options)
    check_keys(name, info)
    loaded: PreTrainedModel = model
    return loaded


def max_context(model: PreTrainedModel) -> int:
    """Positions that the model was made for; a very large number where it does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 30


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: of the generation config, else of the model or the tokenizer."""
    for owner in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        if value is not None:
            return tuple(value) if isinstance(value, list | tuple) else (int(value),)
    return ()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {_first_line(error)}") from None


def check_parallel(name: str, device: str, tp: int) -> None:
    """Raises ConfigError and ModelError for what cannot be shared out to `tp` ranks."""
    name = _expanded(name)
    if is_gguf(name):
        raise ConfigError(
            f"tp={tp} takes a model folder, got {name!r}; write one with `lazyahead convert`"
        )
    if device not in ("auto", accelerator()):
        raise ConfigError(
            f"tp={tp} runs on {accelerator()}, one rank a device, got device {device!r}; leave it "
            "out"
        )
    load_options(model_config(name), tp, name)


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~/") else name


def _check_there(name: str, what: str) -> None:
    """Raises ModelNotFoundError for a path that does not exist; a hub name is no path."""
    if Path(name).exists():
        return
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ModelNotFoundError(
            f"no {what} at {name!r}; check the path, or give a hub name as owner/name"
        )


def _check_folder(name: str) -> None:
    """What traces like a path must be a folder with a config and safetensors weights."""
    _check_there(name, "model folder")
    folder = Path(name)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{name!r} is a file; give the folder that holds config.json and the weights"
        )
    if not (folder / "config.json").exists():
        raise ModelNotFoundError(f"{name!r} holds no config.json, so it is no model folder")
    if not list(folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"{name!r} holds no *.safetensors; other formats can run code when loaded, convert it "
            "with save_pretrained"
        )
    check_objects(folder)


def model_config(name: str) -> Any:
    """The config alone. Raises as `load`."""
    name = _expanded(name)
    if is_gguf(name):
        return gguf_config(name)
    _check_folder(name)
    try:
        return _nearest(
            name, lambda **where: AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        )
    except OSError as error:
        raise ModelNotFoundError(f"cannot load model {name!r}: {_first_line(error)}") from None
    except ModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"cannot load model {name!r}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said[:300]
