"""Attention over keys that lie in one row, by torch's own kernels: what GPUs run, and a CPU in
fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from lazyahead.cache.kv import LayerKV
from lazyahead.hf.band import attend_band, can_attend_band
from lazyahead.hf.rows import NUM_SINKS, AttentionParams, LocalWindow, QueryRows
from lazyahead.hf.scores import mask_of, sees_everything, weights_of
from lazyahead.hf.triton_loops import can_attend, triton_loops

_FEW = 64
"""Up to this many rows, the query heads that share keys are folded into rows: no key is read twice.
"""
_LOCAL_BLOCK = 256
"""Rows per block where rows see only what is near: larger ones see more that is not."""
_BAND_FROM = 16_384
"""Tokens from which on a window pays where a fused kernel reads everything without one: below, rows
attend to everything. Measured on an H200: 3.3 ms either way at 16k with 32 heads."""
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
        return _attend_few(query, kv.keys, kv.values, None, heads)
    local = rows.local if heads.window is None and heads.chunk is None else None
    fused = plain and can_attend_band(query, kv.values)
    if local is not None and not fused:
        return _attend_local(query, kv, rows, local, heads)
    if local is not None and local.until >= _BAND_FROM:
        return _attend_fused(query, kv, rows, local, heads)
    is_prompt = num_rows == num_keys or (query.is_cuda and rows.first is not None)
    if is_prompt and rows.ancestors is None and whole and plain:
        return attend_last(query, kv, heads)
    if num_rows <= _FEW and plain:
        bias = _bias(rows, kv, heads, query.shape[1] // kv.keys.shape[1])
        return _attend_few(query, kv.keys, kv.values, bias, heads)
    blocks = [
        _attend_block(query[:, :, start : start + _BLOCK], start, kv, rows, heads)
        for start in range(0, num_rows, _BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def attend_last(query: Tensor, kv: LayerKV, heads: AttentionParams) -> Tensor:
    """Attention of rows that are the last of a text, each over all keys up to its own, without a
    mask in memory: (1, H, T, D) -> (1, H, T, D_v)."""
    keys, values = kv.keys, kv.values
    is_whole = query.shape[2] == len(kv)
    if query.is_cuda and (not is_whole or query.dtype == torch.float32):
        keys, values = repeated(query, keys), repeated(query, values)
    return scaled_dot_product_attention(
        *(query, keys, values),
        attn_mask=None if is_whole else causal_lower_right(query.shape[2], len(kv)),
        is_causal=is_whole,
        scale=heads.scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def repeated(query: Tensor, keys: Tensor) -> Tensor:
    """Keys (1, H_kv, N, D) as (1, H, N, D): a GPU's fused kernels take grouped heads only in half
    precision and without a mask."""
    groups = query.shape[1] // keys.shape[1]
    return keys if groups == 1 else keys.repeat_interleave(groups, 1)


def attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, bias: Tensor, heads: AttentionParams
) -> Tensor:
    """Attention of few rows, query (1, H, T, D), over the slots (1, H_kv, C, D) that `mask` (T, C)
    shows them, or `bias_of` it: (1, H, T, D_v)."""
    if heads.softcap is not None or heads.sinks is not None:
        return _answer(query, keys, values, mask, heads)
    return _attend_few(query, keys, values, bias, heads)


def bias_of(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(G * T, N) what is added to the logits of few rows: 0 where a row sees a key, else -inf. A
    mask (T, N) of booleans would be turned into this at every layer."""
    bias = torch.zeros_like(mask, dtype=dtype)
    return bias.masked_fill_(~mask, -torch.inf).repeat(groups, 1)


def _bias(rows: QueryRows, kv: LayerKV, heads: AttentionParams, groups: int) -> Tensor:
    """`bias_of` what the rows see."""

    def make() -> Tensor:
        return bias_of(mask_of(rows, slice(0, None), kv.positions, heads), groups, kv.keys.dtype)

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
    if query.is_cuda:
        keys, values = repeated(query, keys), repeated(query, values)
    grouped = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=heads.scaling, enable_gqa=grouped
    )


def _attend_fused(
    query: Tensor, kv: LayerKV, rows: QueryRows, local: LocalWindow, heads: AttentionParams
) -> Tensor:
    """As `_attend_local`, without masks."""
    num_rows, first = query.shape[2], rows.last + 1 - query.shape[2]
    num_local = min(max(0, local.until - first), num_rows)
    if 0 < first < local.num_tokens and num_local:
        return _attend_local(query, kv, rows, local, heads)
    parts = []
    if num_local:
        end = first + num_local
        keys, values = kv.keys[:, :, :end], kv.values[:, :, :end]
        part = query[:, :, :num_local]
        parts.append(attend_band(part, keys, values, local.num_tokens, heads.scaling))
    if num_local < num_rows:
        parts.append(attend_last(query[:, :, num_local:], kv, heads))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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


def _attend_few(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, heads: AttentionParams
) -> Tensor:
    """Few rows (1, H, T, D) over keys (1, H_kv, N, D), `bias` (G * T, N) added to their logits:
    (1, H, T, D_v). On a GPU not by a fused kernel that takes a bias: it is planned anew for each
    number of keys."""
    loops = triton_loops(query)
    if loops is not None and can_attend(query, keys, values):
        return loops.attend(query, keys, values, bias, heads.scaling)
    if bias is None or not query.is_cuda:
        return _fold(query, keys, values, bias, heads)
    return _by_products(query, keys, values, bias, heads)


def _by_products(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, heads: AttentionParams
) -> Tensor:
    """The same by two products, logits in the dtype of the query."""
    num_heads, num_rows, num_kv = query.shape[1], query.shape[2], keys.shape[1]
    folded = query.reshape(num_kv, num_heads // num_kv * num_rows, -1)
    logits = torch.baddbmm(bias, folded, keys[0].transpose(1, 2), alpha=heads.scaling)
    weights = logits.softmax(-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values[0]).view(1, num_heads, num_rows, -1)


def _fold(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, heads: AttentionParams
) -> Tensor:
    """Grouped heads as extra rows: (1, H, T, D) -> (1, H_kv, G * T, D) and back."""
    num_heads, num_rows, num_kv = query.shape[1], query.shape[2], keys.shape[1]
    folded = query.reshape(1, num_kv, num_heads // num_kv * num_rows, -1)
    out = scaled_dot_product_attention(folded, keys, values, attn_mask=bias, scale=heads.scaling)
    return out.reshape(1, num_heads, num_rows, -1)  # kernels differ in how their output lies
