"""The one attention function: causal by position, for a few rows or many, never a full attention
map.

Keys stand in order of computation, each with its position. A query row sees the keys at its own
position and before; a draft row sees, among the drafts, only its ancestors.
"""

from __future__ import annotations

from torch import Tensor

from lazyahead.cache.kv import LayerKV
from lazyahead.hf import blockwise, dense_attention
from lazyahead.hf.plan import Plan, plan
from lazyahead.hf.rows import AttentionParams, QueryRows


def attend(
    query: Tensor, own_keys: Tensor, kv: LayerKV, rows: QueryRows, heads: AttentionParams
) -> Tensor:
    """Attention of T rows (query (1, H, T, D)) over a layer's keys, whose last T are the rows' own,
    `own_keys` (1, H_kv, T, D): (1, T, H, D_v).

    A row that comes alone is the last of its text: no key lies behind it."""
    if not kv.is_blocked:
        return dense_attention.attend(query, kv, rows, heads).transpose(1, 2)
    layout = _plan(rows, kv, heads, query)
    return blockwise.attend(query, own_keys, kv.key_blocks, kv.value_blocks, layout, heads)


def _plan(rows: QueryRows, kv: LayerKV, heads: AttentionParams, query: Tensor) -> Plan:
    """Planned at the first layer of its kind."""
    local = rows.local if heads.window is None and heads.chunk is None else None
    groups = query.shape[1] // kv.key_blocks.num_heads
    kind = (heads.window, heads.chunk, local is not None, groups)
    plans = {} if rows.shared is None else rows.shared.plans
    if kind not in plans:
        places = (rows.positions, kv.positions)
        plans[kind] = plan(*places, heads, groups, query.dtype, rows.ancestors, local)
    return plans[kind]
