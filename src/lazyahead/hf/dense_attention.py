"""Attention over keys that lie in one row, by torch's own kernels: what devices other than the CPU
run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lazyahead.cache.kv import LayerKV
from lazyahead.hf.rows import NUM_SINKS, AttentionParams, LocalWindow, QueryRows
from lazyahead.hf.scores import mask_of, sees_everything, weights_of

_FEW = 64
"""Up to this many rows, the query heads that share keys are folded into rows: no key is read twice.
"""
_LOCAL_BLOCK = 256
"""Rows per block where rows see only what is near: larger ones see more that is not."""
_BLOCK = 512
"""Rows per block where a mask is needed, so that no mask is larger than (512, N)."""


def attend(query: Tensor, kv: LayerKV, rows: QueryRows, heads: AttentionParams) -> Tensor:
    """Attention of T rows (query (1, H, T, D)) over a layer's keys, whose last T are the rows' own:
    (1, H, T, D_v).

    A row that comes alone is the last of its text: no key lies behind it."""
    num_rows, num_keys = query.shape[2], len(kv)
    plain = heads.softcap is None and heads.sinks is None
    whole = sees_everything(rows, heads)
    if num_rows == 1 and whole and plain:
        return _fold(query, kv, None, heads)
    if rows.local is not None and heads.window is None and heads.chunk is None:
        return _attend_local(query, kv, rows, rows.local, heads)
    if num_rows == num_keys and rows.ancestors is None and whole and plain and num_rows > 1:
        grouped = query.shape[1] != kv.keys.shape[1]
        return scaled_dot_product_attention(
            query, kv.keys, kv.values, is_causal=True, scale=heads.scaling, enable_gqa=grouped
        )
    if num_rows <= _FEW and plain:
        return _fold(query, kv, _bias(rows, kv, heads, query.shape[1] // kv.keys.shape[1]), heads)
    blocks = [
        _attend_block(query[:, :, start : start + _BLOCK], start, kv, rows, heads)
        for start in range(0, num_rows, _BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _bias(rows: QueryRows, kv: LayerKV, heads: AttentionParams, groups: int) -> Tensor:
    """(G * T, N) what is added to the logits of few rows: 0 where a row sees a key, else -inf. A
    mask of booleans would be turned into this at every layer."""

    def make() -> Tensor:
        hidden = ~mask_of(rows, slice(0, None), kv.positions, heads)
        return kv.keys.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf).repeat(groups, 1)

    return _shared(rows, heads, groups, make)


def _shared(
    rows: QueryRows, heads: AttentionParams, groups: int, make: Callable[[], Tensor]
) -> Tensor:
    """What `make` makes, remembered for the next layer."""
    if rows.shared is None:
        return make()
    kind = (heads._replace(scaling=0.0, softcap=None, sinks=None), groups)
    if kind not in rows.shared.masks:
        rows.shared.masks[kind] = make()
    return rows.shared.masks[kind]


def _attend_block(
    query: Tensor, start: int, kv: LayerKV, rows: QueryRows, heads: AttentionParams
) -> Tensor:
    num_rows, total = query.shape[2], rows.positions.numel()
    seen = (
        len(kv) - total + start + num_rows if rows.ancestors is None else len(kv)
    )  # later rows are later keys
    keys, values = kv.keys[:, :, :seen], kv.values[:, :, :seen]
    part = slice(start, start + num_rows)
    if num_rows == total:
        mask = _shared(rows, heads, 0, lambda: mask_of(rows, part, kv.positions[:seen], heads))
    else:
        mask = mask_of(rows, part, kv.positions[:seen], heads)
    if heads.softcap is not None or heads.sinks is not None:
        return _answer(query, keys, values, mask, heads)
    grouped = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=heads.scaling, enable_gqa=grouped
    )


def _attend_local(
    query: Tensor, kv: LayerKV, rows: QueryRows, local: LocalWindow, heads: AttentionParams
) -> Tensor:
    """Block by block, each over the few keys it sees; the last rows over all. Slots stand by
    position here."""
    num_rows, first = query.shape[2], rows.last + 1 - query.shape[2]
    num_local, grouped = (
        min(max(0, local.until - first), num_rows),
        query.shape[1] != kv.keys.shape[1],
    )
    blocks, start, mask = [], 0, None
    while start < num_local:
        size = min(local.num_tokens if first + start == 0 else _LOCAL_BLOCK, num_local - start)
        low, end = first + start + 1 - local.num_tokens, first + start + size
        parts = (slice(0, end),) if low <= NUM_SINKS else (slice(0, NUM_SINKS), slice(low, end))
        keys, values = (
            torch.cat([of[:, :, part] for part in parts], 2) for of in (kv.keys, kv.values)
        )
        if (
            mask is None or len(parts) == 1 or mask.shape != (size, keys.shape[2])
        ):  # further on all blocks look alike
            queries, places = (
                rows.positions[start : start + size, None],
                torch.cat([kv.positions[at] for at in parts]),
            )
            mask = (places <= queries) & (
                (places > queries - local.num_tokens) | (places < NUM_SINKS)
            )
            bias = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        block = query[:, :, start : start + size]
        if heads.softcap is not None or heads.sinks is not None:
            blocks.append(_answer(block, keys, values, mask, heads))
        else:
            causal = end == size  # the first block, in which all is near
            blocks.append(
                scaled_dot_product_attention(
                    *(block, keys, values),
                    attn_mask=None if causal else bias,
                    is_causal=causal,
                    scale=heads.scaling,
                    enable_gqa=grouped,
                )
            )
        start += size
    if start < num_rows:
        blocks.append(_attend_block(query[:, :, start:], start, kv, rows, heads))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _answer(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: AttentionParams
) -> Tensor:
    """What no kernel computes: soft caps and sinks. (1, H, T, D) -> (1, H, T, D_v)."""
    weights = weights_of(query, keys, mask, heads).to(values.dtype)
    return (weights @ values).view(1, query.shape[1], query.shape[2], -1)


def _fold(query: Tensor, kv: LayerKV, bias: Tensor | None, heads: AttentionParams) -> Tensor:
    """Grouped heads as extra rows: (1, H, T, D) -> (1, H_kv, G * T, D) and back."""
    num_heads, num_rows, num_kv = query.shape[1], query.shape[2], kv.keys.shape[1]
    folded = query.reshape(1, num_kv, num_heads // num_kv * num_rows, -1)
    out = scaled_dot_product_attention(
        folded, kv.keys, kv.values, attn_mask=bias, scale=heads.scaling
    )
    return out.view(1, num_heads, num_rows, -1)
