"""Attention weights as such, of a few rows: what boundaries score tokens by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lazyahead.cache.blocks import BLOCK, EXTRA
from lazyahead.cache.kv import LayerKV
from lazyahead.hf.ranks import over_ranks
from lazyahead.hf.rows import AttentionParams, QueryRows

_ONE = 2.0**40
"""Weights are added up as whole numbers of this fineness, so that no order of keys matters."""


def attention_weights(
    query: Tensor, kv: LayerKV, rows: QueryRows, heads: AttentionParams
) -> Tensor:
    """The attention weights (H, Q, N), fp32, of the last Q rows (query (1, H, Q, D)): small Q
    only. Over blocks, a row's weights have the same bits in any company."""
    num_heads, num_queries = query.shape[1:3]
    mask = None
    if num_queries > 1 or rows.ancestors is not None or not sees_everything(rows, heads):
        part = slice(rows.positions.numel() - num_queries, None)
        mask = mask_of(rows, part, kv.positions, heads)
    if kv.is_blocked:
        weights = _over_blocks(query, kv, mask, heads)
    else:
        weights = weights_of(query, kv.keys, mask, heads)[0]
    return weights.reshape(num_heads, num_queries, -1)


def reduce_heads(weights: Tensor, how: str, ranks: int = 1) -> Tensor:
    """Attention weights (H, Q, N) to (Q, N): `mean` (eq. 1 of LazyLLM) or `max` over heads.

    The one place where heads are reduced: under tensor parallelism each of the `ranks` has its own
    H, and they agree here, so that all of them keep the same tokens.
    """
    if how == "max":
        most = weights.amax(0)
        return most if ranks == 1 else over_ranks(most, "max")
    first, *others = weights.unbind(0)
    total = first.clone()
    for weight in others:  # one order, whatever the shape
        total += weight
    if ranks > 1:
        total = over_ranks(total, "sum")
    return total / (weights.shape[0] * ranks)


def sees_everything(rows: QueryRows, heads: AttentionParams) -> bool:
    """No window and no chunk hides an earlier key from any row."""
    if heads.window is not None and rows.last >= heads.window:
        return False
    return heads.chunk is None or rows.last < heads.chunk


def mask_of(rows: QueryRows, part: slice, key_positions: Tensor, heads: AttentionParams) -> Tensor:
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


def weights_of(
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


def _over_blocks(query: Tensor, kv: LayerKV, mask: Tensor | None, heads: AttentionParams) -> Tensor:
    """Softmax of the logits in fp32, (H_kv, G * Q, N); `mask` (Q, N) says what rows see."""
    key_blocks, num_keys = kv.key_blocks.blocks, len(kv)
    num_blocks, num_kv = key_blocks.shape[:2]
    groups, num_queries = query.shape[1] // num_kv, query.shape[2]
    folded = query.reshape(num_kv, groups * num_queries, -1)
    wide = pad(folded, (0, EXTRA))  # zeros meet the keys' extra columns
    products = torch.bmm(
        wide.repeat(num_blocks, 1, 1), key_blocks.reshape(-1, *key_blocks.shape[2:]).transpose(1, 2)
    )
    by_block = products.float().view(num_blocks, *folded.shape[:2], BLOCK)
    logits = by_block.movedim(0, 2).flatten(2) * heads.scaling  # (H_kv, G * Q, blocks * BLOCK)
    if heads.softcap is not None:
        logits = heads.softcap * torch.tanh(logits / heads.softcap)
    logits[..., num_keys:] = -torch.inf
    if mask is not None:
        seen = pad(mask, (0, logits.shape[-1] - num_keys)).repeat(groups, 1)
        logits.masked_fill_(~seen, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    sinks = None
    if heads.sinks is not None:
        sinks = heads.sinks.float().view(num_kv, groups, 1, 1).expand(-1, -1, num_queries, -1)
        sinks = sinks.reshape(num_kv, -1, 1)
        top = torch.maximum(top, sinks)
    weights = logits.sub_(top).exp_()
    total = (weights * _ONE).long().sum(-1, keepdim=True).double() / _ONE
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return weights[..., :num_keys] / total.float()
