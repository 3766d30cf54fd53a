"""The one attention function: causal by position, for a few rows or many, never a full attention
map.

Keys stand in order of computation, each with its position. A query row sees the keys at its own
position and before; a draft row sees, among the drafts, only its ancestors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lazyahead.cache.kv import LayerKV

_FEW = 64
"""Up to this many rows, the query heads that share keys are folded into rows: no key is read twice.
"""
NUM_SINKS = 4
"""First tokens of a text that every row sees: models pay them attention for nothing."""
_LOCAL_BLOCK = 256
"""Rows per block where rows see only what is near: larger ones see more that is not."""
_BLOCK = 512
"""Rows per block where a mask is needed, so that no mask is larger than (512, N)."""


class AttentionParams(NamedTuple):
    """What a layer says about its attention."""

    scaling: float
    window: int | None = None
    """Sliding window: a row sees keys less than this many positions back."""
    chunk: int | None = None
    """Chunked attention: a row sees keys of its own chunk of this many positions."""
    softcap: float | None = None
    """Logits x become softcap * tanh(x / softcap)."""
    sinks: Tensor | None = None
    """(H,) one logit per head that takes part in the softmax and leads nowhere."""


class LocalWindow(NamedTuple):
    """Rows before position `until` see only the `num_tokens` keys up to their own and the first few
    of the text."""

    num_tokens: int
    until: int


class QueryRows(NamedTuple):
    """The query rows of one request at one layer."""

    positions: Tensor
    """(T,), rising but for drafts."""
    last: int
    """Highest position, known without asking the device."""
    ancestors: Tensor | None = None
    """(M, M) for the last M rows, which are drafts: [i, j] says that j is i or comes before it."""
    masks: dict[tuple[AttentionParams, int], Tensor] | None = None
    """Masks that layers with the same rows and keys share, by heads and how often they repeat."""
    local: LocalWindow | None = None
    """Where rows see less than all; their positions then rise by one, and every earlier token has
    its key."""


def attend(query: Tensor, kv: LayerKV, rows: QueryRows, heads: AttentionParams) -> Tensor:
    """Attention of T rows (query (1, H, T, D)) over a layer's keys, whose last T are the rows' own:
    (1, H, T, D_v).

    A row that comes alone is the last of its text: no key lies behind it."""
    num_rows, num_keys = query.shape[2], len(kv)
    plain = heads.softcap is None and heads.sinks is None
    whole = _sees_everything(rows, heads)
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


def attention_weights(
    query: Tensor,
    kv: LayerKV,
    rows: QueryRows,
    heads: AttentionParams,
) -> Tensor:
    """The attention weights (H, Q, N), fp32, of the last Q rows (query (1, H, Q, D)): small Q
    only."""
    num_queries = query.shape[2]
    mask = None
    if num_queries > 1 or rows.ancestors is not None or not _sees_everything(rows, heads):
        mask = _mask(rows, slice(rows.positions.numel() - num_queries, None), kv.positions, heads)
    return _weights(query, kv.keys, mask, heads)[0].reshape(query.shape[1], num_queries, -1)


def reduce_heads(weights: Tensor, how: str) -> Tensor:
    """Attention weights (H, Q, N) to (Q, N): `mean` (eq. 1 of LazyLLM) or `max` over heads.

    The one place where heads are reduced: under tensor parallelism, ranks agree here.
    """
    return weights.amax(0) if how == "max" else weights.mean(0)


def _sees_everything(rows: QueryRows, heads: AttentionParams) -> bool:
    """No window and no chunk hides an earlier key from any row."""
    if heads.window is not None and rows.last >= heads.window:
        return False
    return heads.chunk is None or rows.last < heads.chunk


def _bias(rows: QueryRows, kv: LayerKV, heads: AttentionParams, groups: int) -> Tensor:
    """(G * T, N) what is added to the logits of few rows: 0 where a row sees a key, else -inf. A
    mask of booleans would be turned into this at every layer."""

    def make() -> Tensor:
        hidden = ~_mask(rows, slice(0, None), kv.positions, heads)
        return kv.keys.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf).repeat(groups, 1)

    return _shared(rows, heads, groups, make)


def _shared(
    rows: QueryRows, heads: AttentionParams, groups: int, make: Callable[[], Tensor]
) -> Tensor:
    """What `make` makes, remembered for the next layer."""
    if rows.masks is None:
        return make()
    kind = (heads._replace(scaling=0.0, softcap=None, sinks=None), groups)
    if kind not in rows.masks:
        rows.masks[kind] = make()
    return rows.masks[kind]


def _mask(rows: QueryRows, part: slice, key_positions: Tensor, heads: AttentionParams) -> Tensor:
    """(T, N) what the rows of `part` see of the keys."""
    queries = rows.positions[part, None]
    mask = key_positions <= queries
    if heads.window is not None:
        mask &= key_positions > queries - heads.window
    if heads.chunk is not None:
        mask &= key_positions // heads.chunk == queries // heads.chunk
    if rows.ancestors is not None:  # drafts are the last rows and the last keys
        num_drafts, start = rows.ancestors.shape[0], part.start or 0
        first_draft = rows.positions.numel() - num_drafts
        skip = max(0, first_draft - start)  # rows of this part before the drafts
        seen = rows.ancestors[start + skip - first_draft :][: max(0, mask.shape[0] - skip)]
        mask[skip : skip + seen.shape[0], -num_drafts:] &= seen
    return mask


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
        mask = _shared(rows, heads, 0, lambda: _mask(rows, part, kv.positions[:seen], heads))
    else:
        mask = _mask(rows, part, kv.positions[:seen], heads)
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
                    *(block, keys, values), attn_mask=None if causal else bias, is_causal=causal, scale=heads.scaling,
                    enable_gqa=grouped,
                )
            )  # fmt: skip
        start += size
    if start < num_rows:
        blocks.append(_attend_block(query[:, :, start:], start, kv, rows, heads))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _answer(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: AttentionParams
) -> Tensor:
    """What no kernel computes: soft caps and sinks. (1, H, T, D) -> (1, H, T, D_v)."""
    weights = _weights(query, keys, mask, heads).to(values.dtype)
    return (weights @ values).view(1, query.shape[1], query.shape[2], -1)


def _fold(query: Tensor, kv: LayerKV, bias: Tensor | None, heads: AttentionParams) -> Tensor:
    """Grouped heads as extra rows: (1, H, T, D) -> (1, H_kv, G * T, D) and back."""
    num_heads, num_rows, num_kv = query.shape[1], query.shape[2], kv.keys.shape[1]
    folded = query.reshape(1, num_kv, num_heads // num_kv * num_rows, -1)
    out = scaled_dot_product_attention(
        folded, kv.keys, kv.values, attn_mask=bias, scale=heads.scaling
    )
    return out.view(1, num_heads, num_rows, -1)


def _weights(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    heads: AttentionParams,
) -> Tensor:
    """Softmax of the logits in fp32, (1, H_kv, G * T, N)."""
    num_heads, num_rows, num_kv = query.shape[1], query.shape[2], keys.shape[1]
    groups = num_heads // num_kv
    folded = query.reshape(1, num_kv, groups * num_rows, -1)
    logits = _logits(folded, keys, heads)
    if mask is not None:
        logits = logits.masked_fill(~mask.repeat(groups, 1), -torch.inf)
    if heads.sinks is None:
        return logits.softmax(-1)
    sinks = (
        heads.sinks.float()
        .view(1, num_kv, groups, 1)
        .expand(-1, -1, -1, num_rows)
        .reshape(1, num_kv, -1, 1)
    )
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


def _logits(folded: Tensor, keys: Tensor, heads: AttentionParams) -> Tensor:
    logits = (folded @ keys.transpose(2, 3)).float() * heads.scaling
    return logits if heads.softcap is None else heads.softcap * torch.tanh(logits / heads.softcap)
