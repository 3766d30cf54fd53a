"""Sessions on disk: one safetensors file with a header that says which model and way of reading it
belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lazyahead.cache.kv import GrowableTensor
from lazyahead.cache.safetensors_header import Header, read_header
from lazyahead.cache.session import Session
from lazyahead.cache.session_check import (
    KV_PARTS,
    STASH_PARTS,
    Expected,
    as_real,
    check_header,
    check_places,
    checksum,
    counts,
)
from lazyahead.errors import SessionFileError
from lazyahead.hf.attach import dtype_name
from lazyahead.hf.fingerprint import model_fingerprint, weights_fingerprint
from lazyahead.hf.load import max_context
from lazyahead.prefill.config import LazyPrefill

FORMAT = "lazyahead-session-2"
EARLIER = ("lazyahead-session-1",)
MAX_HEADER_BYTES = 16 << 20


def save_session(
    session: Session, path: str | Path, model: PreTrainedModel, prefill: LazyPrefill | None
) -> None:
    """Writes the session whole or not at all. Raises SessionFileError for one that is running or
    holds nothing."""
    if session.in_use:
        raise SessionFileError("the session is answering; save it when the answer has ended")
    if not session.num_layers or not len(session):
        raise SessionFileError("the session holds nothing that could be saved")
    if Path(path).exists() and not Path(path).is_file():
        raise SessionFileError(f"{path} is no file; name one")
    tensors = _tensors(session)
    header = {
        "format": FORMAT,
        **_owner(model, prefill),
        "prompt_len": str(session.prompt_len),
        "prefill_lens": json.dumps(session.prefill_lens),
    }
    header["checksum"] = checksum(header, tensors)
    path = Path(path).resolve()  # a link stays one
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, header)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise SessionFileError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    finally:
        with suppress(OSError):
            part.unlink()


def load_session(
    path: str | Path,
    model: PreTrainedModel,
    prefill: LazyPrefill | None,
    empty: Session,
    like: Callable[[], Session],
) -> Session:
    """Fills `empty` from a file. `like` gives a session of two tokens that the same engine has
    read: states of the file must have its shapes.

    Raises SessionFileError when the file is damaged, or of another model or way of reading.
    """
    try:
        header = read_header(path, MAX_HEADER_BYTES)
        _check_owner(path, header.metadata, _owner(model, prefill))
        if not empty.num_layers:
            raise ValueError("this model keeps a state of its own, which no file holds")
        expected = _expected(model, like())
        check_header(header, expected)
        with safe_open(str(path), framework="pt", device="cpu") as file:
            places = {name: file.get_tensor(name) for name in _places(header)}
            check_places(header, places, expected)
            tensors = {name: file.get_tensor(name) for name in header.tensors}
        if header.metadata.get("checksum") != checksum(header.metadata, tensors):
            raise ValueError("its checksum does not fit its content")
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} holds what is no number")
        return _fill(empty, header, tensors, expected.like)
    except FileNotFoundError:
        raise SessionFileError(f"no session at {path}") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SessionFileError(f"{path} is damaged or no session: {reason}") from None


def _tensors(session: Session) -> dict[str, Tensor]:
    """What a session holds, on the CPU, by its name in the file."""
    tensors = {
        "token_ids": torch.tensor(session.token_ids, dtype=torch.long),
        "pending": torch.tensor(session.pending, dtype=torch.long),
    }
    for layer, kv in enumerate(session.kv):
        for part in KV_PARTS:
            tensors[f"kv.{layer}.{part}"] = getattr(kv, part)
    for layer, stash in session.stashes.items():
        if len(stash):
            for part in STASH_PARTS:
                tensors[f"stash.{layer}.{part}"] = getattr(stash, part)[stash.live]
    for index, table in enumerate(session.token_args):
        rows = as_real(table.rows[: len(session)])
        tensors[f"table.{index}"] = rows.nan_to_num()  # rows that were never written hold anything
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _expected(model: PreTrainedModel, like: Session) -> Expected:
    return Expected(
        like,
        hidden_size=int(model.config.get_text_config().hidden_size),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        max_context=max_context(model),
    )


def _places(header: Header) -> list[str]:
    """The tensors that say where things stand: small, and enough to check the rest."""
    return [name for name, entry in header.tensors.items() if entry.dtype == "I64"] + [
        name for name in header.tensors if name.startswith("table.")
    ]


def _fill(session: Session, header: Header, tensors: dict[str, Tensor], like: Session) -> Session:
    device = like.kv[0].keys.device
    session.token_ids = tensors["token_ids"].tolist()
    session.pending = tensors["pending"].tolist()
    session.prompt_len, session.prefill_lens = counts(header)
    for layer, kv in enumerate(session.kv):
        kv.append(*(tensors[f"kv.{layer}.{part}"].to(device) for part in KV_PARTS))
    for layer, stash in session.stashes.items():
        if f"stash.{layer}.hidden" in tensors:
            stash.add(*(tensors[f"stash.{layer}.{part}"].to(device) for part in STASH_PARTS))
    for index, known in enumerate(like.token_args):
        if f"table.{index}" in tensors:
            rows = tensors[f"table.{index}"].to(device)
            table = GrowableTensor()
            table.append(torch.view_as_complex(rows) if known.rows.is_complex() else rows)
            session.token_args.append(table)
    return session


def _owner(model: PreTrainedModel, prefill: LazyPrefill | None) -> dict[str, str]:
    """What must be the same when the file is read again."""
    settings = None if prefill is None else prefill.to_dict()
    return {
        "model": model_fingerprint(model),
        "weights": weights_fingerprint(model),
        "dtype": f"torch.{dtype_name(model)}",
        "prefill": json.dumps(settings, sort_keys=True),
    }


def _check_owner(path: str | Path, metadata: dict[str, str], owner: dict[str, str]) -> None:
    given = metadata.get("format")
    if given in EARLIER:
        raise SessionFileError(
            f"{path} was saved by an earlier version ({given}); read its document again and save "
            "the session anew"
        )
    if given != FORMAT:
        raise SessionFileError(f"{path} is no lazyahead session (format {given!r})")
    words = {
        "model": "of another model or tokenizer",
        "weights": "of a model with other weights",
        "dtype": "in another dtype",
        "prefill": "read by other settings of prefill",
    }
    for name, word in words.items():
        if metadata.get(name) != owner[name]:
            raise SessionFileError(
                f"{path} is a session {word}; load it with the settings that it was saved with"
            )
