"""Whether a saved session fits a model, a way of reading and itself, told from its header and its
positions before anything else is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazyahead.cache.safetensors_header import Header
from lazyahead.cache.session import Session

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
"""Names that safetensors gives to the dtypes of states and tables."""
WHOLE = ("token_ids", "pending")
KV_PARTS = ("keys", "values", "positions")
STASH_PARTS = ("hidden", "positions", "slots")


@dataclass(frozen=True)
class Expected:
    """What a session of this model and way of reading looks like."""

    like: Session
    """One of two tokens, read by the same engine."""
    hidden_size: int
    vocab_size: int
    max_context: int


def check_header(header: Header, expected: Expected) -> None:
    """Raises ValueError for a tensor that is missing, too much, or of another dtype or shape."""
    like, tensors = expected.like, header.tensors
    num_tokens = _rows(header, "token_ids", "I64", (), (), expected.max_context)
    _rows(header, "pending", "I64", (), (), expected.max_context)
    names = [*WHOLE]
    for layer, kv in enumerate(like.kv):
        count = _rows(header, f"kv.{layer}.positions", "I64", (), (), num_tokens)
        for part in ("keys", "values"):
            rows: Tensor = getattr(kv, part)
            around = (tuple(rows.shape[:2]), tuple(rows.shape[3:]))  # (1, H_kv, N, D)
            _rows(header, f"kv.{layer}.{part}", DTYPES[rows.dtype], *around, count, exact=True)
        names += [f"kv.{layer}.{part}" for part in KV_PARTS]
    for layer in like.stashes:
        own = [f"stash.{layer}.{part}" for part in STASH_PARTS]
        if any(name in tensors for name in own):
            count = _rows(header, own[1], "I64", (), (), num_tokens)
            _rows(header, own[2], "I64", (), (), count, exact=True)
            states = (DTYPES[like.kv[0].keys.dtype], (), (expected.hidden_size,))
            _rows(header, own[0], *states, count, exact=True)
            names += own
    if any(name.startswith("table.") for name in tensors):
        for index, table in enumerate(like.token_args):
            rows = as_real(table.rows)
            _rows(header, f"table.{index}", DTYPES[rows.dtype], (), rows.shape[1:], num_tokens)
            names.append(f"table.{index}")
    if unknown := sorted(tensors.keys() - set(names)):
        raise ValueError(f"this model has no place for {unknown[0]}")


def _rows(
    header: Header,
    name: str,
    dtype: str,
    before: Sequence[int],
    behind: Sequence[int],
    count: int,
    exact: bool = False,
) -> int:
    """How many rows a tensor has: at most `count`, or just so many. Raises ValueError when it is
    another tensor than expected."""
    entry = header.tensors.get(name)
    if entry is None:
        raise ValueError(f"it lacks {name}")
    place = len(before)
    shape = (*entry.shape[:place], *entry.shape[place + 1 :])
    if len(entry.shape) <= place or shape != (*before, *behind) or entry.dtype != dtype:
        said = [*before, "N", *behind]
        raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)} and not {dtype} {said}")
    found = entry.shape[place]
    if found > count or (exact and found != count):
        raise ValueError(f"{name} has {found} rows where {count} belong")
    return found


def check_places(header: Header, tensors: Mapping[str, Tensor], expected: Expected) -> None:
    """Raises ValueError for token ids outside the vocabulary, and unless every token is, at each
    layer, either cached or waiting at or below it, once."""
    for name in WHOLE:
        ids = tensors[name]
        if bool(((ids < 0) | (ids >= expected.vocab_size)).any()):
            raise ValueError(f"{name} holds what is no token of this model")
    num_tokens = tensors["token_ids"].numel()
    if not num_tokens:
        raise ValueError("it holds no token")
    waiting = torch.zeros(num_tokens, dtype=torch.bool)
    below = torch.arange(num_tokens)
    for layer in range(expected.like.num_layers):
        if f"stash.{layer}.slots" in tensors:
            places, slots = tensors[f"stash.{layer}.positions"], tensors[f"stash.{layer}.slots"]
            here = _marked(f"stash.{layer}.positions", places, num_tokens)
            _marked(f"stash.{layer}.slots", slots, below.numel())
            if bool((here & waiting).any()) or not torch.equal(below[slots], places):
                raise ValueError(f"what waits at layer {layer} does not stand in the layer below")
            waiting |= here
        below = tensors[f"kv.{layer}.positions"]
        cached = _marked(f"kv.{layer}.positions", below, num_tokens)
        if not torch.equal(cached, ~waiting):
            raise ValueError(f"layer {layer} holds other tokens than those that do not wait")
    _check_tables(tensors, waiting, len(expected.like.token_args))
    _check_counts(header, tensors, expected.like.num_layers)


def _marked(name: str, places: Tensor, end: int) -> Tensor:
    """(end,) which places occur. Raises ValueError for one outside 0..end-1, or twice."""
    if bool(((places < 0) | (places >= end)).any()):
        raise ValueError(f"{name} points outside of {end} places")
    marked = torch.zeros(end, dtype=torch.bool)
    marked[places] = True
    if int(marked.sum()) != places.numel():
        raise ValueError(f"{name} holds a place twice")
    return marked


def _check_tables(tensors: Mapping[str, Tensor], waiting: Tensor, num_tables: int) -> None:
    """The model's position tables must reach to the last token that waits."""
    last = int(waiting.nonzero().max()) if bool(waiting.any()) else -1
    for index in range(num_tables):
        table = tensors.get(f"table.{index}")
        if last >= 0 and (table is None or len(table) <= last):
            raise ValueError(f"table.{index} ends before token {last}, which waits")


def _check_counts(header: Header, tensors: Mapping[str, Tensor], num_layers: int) -> None:
    """Lengths in the header must lie within the tensors'."""
    num_tokens = tensors["token_ids"].numel()
    prompt_len, lengths = counts(header)
    if not 0 <= prompt_len <= num_tokens:
        raise ValueError(f"a prompt of {prompt_len} tokens in a text of {num_tokens}")
    held = [tensors[f"kv.{layer}.positions"].numel() for layer in range(num_layers)]
    fits = all(0 <= length <= most for length, most in zip(lengths, held, strict=False))
    if lengths and (len(lengths) != num_layers or not fits):
        raise ValueError("prefill_lens do not fit the layers")


def counts(header: Header) -> tuple[int, list[int]]:
    """Length of the prompt, and slots of each layer when it had been read. Raises ValueError when
    they are no numbers."""
    prompt_len, lengths = (
        json.loads(header.metadata.get(name, "null")) for name in ("prompt_len", "prefill_lens")
    )
    numbers = [prompt_len, *lengths] if isinstance(lengths, list) else [None]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in numbers):
        raise ValueError("prompt_len or prefill_lens are no numbers")
    return prompt_len, lengths


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of everything in the file but the checksum itself. Tensors lie on the CPU."""
    digest = hashlib.blake2b(digest_size=16)
    texts = sorted((name, text) for name, text in metadata.items() if name != "checksum")
    digest.update(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_real(rows: Tensor) -> Tensor:
    """A table as it is saved: complex numbers as pairs."""
    return torch.view_as_real(rows) if rows.is_complex() else rows
