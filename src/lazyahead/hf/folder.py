"""The files of a model folder, looked at before they are loaded: damage is named in one line."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lazyahead.cache.safetensors_header import read_header
from lazyahead.errors import ModelError

OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
"""Files that must hold a JSON object, where they are there."""
NAMED = 3
"""Keys that an error names."""


def check_objects(folder: Path) -> None:
    """Raises ModelError, naming the file and the remedy, when a config or the tokenizer is a
    git-lfs pointer or no JSON object."""
    for name in OBJECTS:
        if (folder / name).exists():
            _check_object(folder / name)


def check_weights(folder: Path) -> None:
    """Raises ModelError, naming the file and the remedy, when weights are a git-lfs pointer, cut
    short or otherwise damaged."""
    for path in _weight_files(folder):
        try:
            read_header(path)
        except (ValueError, OSError) as error:
            raise ModelError(_damaged(path, error)) from None


def check_keys(name: str, info: dict[str, Any]) -> None:
    """`info` is what transformers found in loading. Raises ModelError when weights are missing,
    unexpected or of another shape than the model's."""
    words = {
        "missing_keys": "has no",
        "mismatched_keys": "has another shape than its config says for",
        "unexpected_keys": "has weights that its config knows nothing of:",
    }
    for kind, word in words.items():
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(kind) or ())
        if keys:
            remedy = "the files do not belong together or are incomplete, fetch them again"
            raise ModelError(f"cannot load model {name!r}: it {word} {_listed(keys)}; {remedy}")
    if info.get("error_msgs"):
        raise ModelError(f"cannot load model {name!r}: {info['error_msgs'][0]}")


def _check_object(path: Path) -> None:
    raw = path.read_bytes()
    try:
        if raw.startswith(b"version https://git-lfs"):
            raise ValueError("a git-lfs pointer stands in its place; run `git lfs pull`")
        if not isinstance(json.loads(raw.decode("utf-8")), dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise ModelError(_damaged(path, error)) from None


def _weight_files(folder: Path) -> list[Path]:
    """Those that are loaded: one, or the parts that an index names."""
    whole, index = folder / "model.safetensors", folder / OBJECTS[-1]
    if whole.exists() or not index.exists():
        return sorted(folder.glob(whole.name))
    weight_map = json.loads(index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(_damaged(index, ValueError("it names no weights")))
    parts = sorted({folder / str(file) for file in weight_map.values()})
    missing = [path.name for path in parts if not path.exists()]
    if missing:
        raise ModelError(f"{folder} lacks {_listed(missing)}; fetch the folder again")
    return parts


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error) if "git lfs pull" in str(error) else f"{error}; fetch it again"
    return f"{path} is damaged: {reason}"


def _listed(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:NAMED])
    return first if len(names) <= NAMED else f"{first} and {len(names) - NAMED} more"
