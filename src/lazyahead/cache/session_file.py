"""Sessions on disk: one safetensors file with a header that says which model and way of reading it
belongs to."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lazyahead.cache.kv import GrowableTensor
from lazyahead.cache.session import Session
from lazyahead.errors import SessionFileError
from lazyahead.hf.fingerprint import model_fingerprint
from lazyahead.prefill.config import LazyPrefill

FORMAT = "lazyahead-session-1"


def save_session(
    session: Session, path: str | Path, model: PreTrainedModel, prefill: LazyPrefill | None
) -> None:
    """Writes the session whole or not at all. Raises SessionFileError for one that is running or
    holds nothing."""
    if session.in_use:
        raise SessionFileError("the session is answering; save it when the answer has ended")
    if not session.num_layers or not len(session):
        raise SessionFileError("the session holds nothing that could be saved")
    tensors: dict[str, Tensor] = {}
    for layer, kv in enumerate(session.kv):
        for name in ("keys", "values", "positions"):
            tensors[f"kv.{layer}.{name}"] = getattr(kv, name).contiguous()
    for layer, stash in session.stashes.items():
        if len(stash):
            for name in ("hidden", "positions", "slots"):
                tensors[f"stash.{layer}.{name}"] = getattr(stash, name)[stash.live].contiguous()
    for index, table in enumerate(session.token_args):
        tensors[f"table.{index}"] = (
            torch.view_as_real(table.rows) if table.rows.is_complex() else table.rows.clone()
        )
    header = {
        "format": FORMAT,
        **_owner(model, prefill),
        "token_ids": json.dumps(session.token_ids),
        "pending": json.dumps(session.pending),
        "prompt_len": str(session.prompt_len),
        "prefill_lens": json.dumps(session.prefill_lens),
        "complex_tables": json.dumps(
            [i for i, table in enumerate(session.token_args) if table.rows.is_complex()]
        ),
    }
    path = Path(path)
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
    path: str | Path, model: PreTrainedModel, prefill: LazyPrefill | None, empty: Session
) -> Session:
    """Fills `empty` from a file. Raises SessionFileError when it is damaged or of another model or
    way of reading."""
    try:
        with safe_open(str(path), framework="pt", device=str(model.device)) as file:
            header = file.metadata() or {}
            _check_owner(path, header, _owner(model, prefill))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return _fill(empty, header, tensors)
    except FileNotFoundError:
        raise SessionFileError(f"no session at {path}") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise SessionFileError(
            f"{path} is damaged or no session: {str(error).splitlines()[0]}"
        ) from None


def _fill(session: Session, header: dict[str, str], tensors: dict[str, Tensor]) -> Session:
    session.token_ids, session.pending = (
        json.loads(header["token_ids"]),
        json.loads(header["pending"]),
    )
    session.prompt_len, session.prefill_lens = (
        int(header["prompt_len"]),
        json.loads(header["prefill_lens"]),
    )
    for layer, kv in enumerate(session.kv):
        kv.append(*(tensors[f"kv.{layer}.{name}"] for name in ("keys", "values", "positions")))
    for layer, stash in session.stashes.items():
        if f"stash.{layer}.hidden" in tensors:
            stash.add(
                *(tensors[f"stash.{layer}.{name}"] for name in ("hidden", "positions", "slots"))
            )
    is_complex = json.loads(header["complex_tables"])
    for index in range(sum(name.startswith("table.") for name in tensors)):
        rows = tensors[f"table.{index}"]
        table = GrowableTensor()
        table.append(torch.view_as_complex(rows) if index in is_complex else rows)
        session.token_args.append(table)
    num_waiting = 0
    for layer, kv in enumerate(session.kv):
        num_waiting += len(session.stashes[layer]) if layer in session.stashes else 0
        if len(kv) + num_waiting != len(session):
            raise ValueError(
                f"{len(session)} tokens, but {len(kv)} cached and {num_waiting} waiting at layer {layer}"
            )
    return session


def _owner(model: PreTrainedModel, prefill: LazyPrefill | None) -> dict[str, str]:
    """What must be the same when the file is read again."""
    return {
        "model": model_fingerprint(model),
        "dtype": str(model.dtype),
        "prefill": "none" if prefill is None else json.dumps(prefill.to_dict()["schedule"]),
    }


def _check_owner(path: str | Path, header: dict[str, str], owner: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise SessionFileError(f"{path} is no lazyahead session (format {header.get('format')!r})")
    words = {
        "model": "of another model or tokenizer",
        "dtype": "in another dtype",
        "prefill": "read by another schedule",
    }
    for name, word in words.items():
        if header.get(name) != owner[name]:
            raise SessionFileError(
                f"{path} is a session {word}; load it with the settings that it was saved with"
            )
