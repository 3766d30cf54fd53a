"""Attention whose every row has one order of summation, whoever shares its pass, and whose work is
large products.

A row's keys stand in canonical order: the committed slots, then the row's own path of drafts. They
lie in blocks of `BLOCK` slots, counted from slot 0. Per block there is one product for the scores,
one exponential, one sum and one product with the values, and the blocks are added in fp32 in rising
order. A block that a row does not see adds exact zeros, so it does not matter which blocks a
neighbour needs. What this asks of the processor: a batched product gives a row the same bits
whatever the number of rows and of batches.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lazyahead.cache.blocks import BLOCK, EXTRA, Blocks
from lazyahead.hf.branches import answer_drafts
from lazyahead.hf.native import fits, native
from lazyahead.hf.plan import Plan, Span
from lazyahead.hf.products import LARGE, Work, dot, hide, is_exact, is_large, raised, weighed
from lazyahead.hf.rows import AttentionParams


def attend(
    query: Tensor,
    own: Tensor,
    keys: Blocks,
    values: Blocks,
    layout: Plan,
    heads: AttentionParams,
) -> Tensor:
    """Attention of T rows, query (1, H, T, D), whose own keys `own` (1, H_kv, T, D) stand last in
    `keys`: (1, T, H, D_v), contiguous, as the projection behind it wants it."""
    num_heads, num_rows, num_kv = query.shape[1], query.shape[2], own.shape[1]
    answer = _few_rows(query, own, keys.blocks, values.blocks, layout, heads)
    if answer is not None:
        return answer
    if heads.softcap is None:  # else scores are capped after scaling
        query, heads = query * heads.scaling, heads._replace(scaling=1.0)
    groups = num_heads // num_kv
    folded = query.view(num_kv, groups, num_rows, -1).transpose(1, 2)  # (H_kv, T, G, D)
    out = query.new_empty(num_rows, num_kv, groups, values.blocks.shape[-1])
    _run(Work(folded, own[0], keys, values, layout, heads, out.transpose(0, 1)))
    return out.view(1, num_rows, num_heads, -1)


def _few_rows(
    query: Tensor, own: Tensor, keys: Tensor, values: Tensor, layout: Plan, heads: AttentionParams
) -> Tensor | None:
    """The rows of a decode step, with as few calls as can be and the same arithmetic as `Work`.
    None: not for this path."""
    is_plain = heads.softcap is None and heads.sinks is None
    if not is_plain or layout.seen is None or layout.sees_first is not None:
        return None
    loops = native(query.dtype)
    if loops is not None and fits(query.shape[1] // own.shape[1], query.shape[3], values.shape[3]):
        answer, most = loops.attend_rows(query, own, keys, values, layout.seen, heads.scaling)
        return answer if most < LARGE else None
    spans = layout.strips[0].spans
    if query.shape[2] > 1 or len(spans) > 1:
        return None
    return _one_row_by_torch(query, own, keys, values, spans[0], heads)


def _one_row_by_torch(
    query: Tensor, own: Tensor, keys: Tensor, values: Tensor, span: Span, heads: AttentionParams
) -> Tensor | None:
    (block, count, _, biases), num_kv, width = span, own.shape[1], query.shape[3]
    folded = (query * heads.scaling).view(num_kv, -1, width)
    first = keys[0, :, :1, :width]
    if count < keys.shape[0]:
        keys, values = keys[block : block + count], values[block : block + count]
    shift, of_first = (dot(folded[:, None], key[:, None])[:, 0] for key in (own[0], first))
    shift = torch.maximum(shift, of_first)
    rows = torch.cat([folded, shift, shift], -1)
    if count > 1:
        rows = torch.cat([rows] * count)  # several times as fast as `repeat`
    scores = torch.bmm(rows, keys.view(-1, BLOCK, width + EXTRA).transpose(1, 2))
    for at, bias in biases:
        hide(scores[at * num_kv : (at + 1) * num_kv], bias)
    sums = weighed(scores).float()
    answers = torch.bmm(scores, values.view(scores.shape[0], BLOCK, -1)).float()
    total, *more_sums = torch.split(sums, num_kv)
    answer, *more_answers = torch.split(answers, num_kv)
    for part, other in zip(more_sums, more_answers, strict=True):
        torch._foreach_add_([total, answer], [part, other])
    if not is_exact(total):
        return None
    return (answer / total).to(query.dtype).view(1, 1, query.shape[1], -1)


def _run(work: Work) -> None:
    """All strips, then the drafts on several branches."""
    num_plain = work.layout.num_plain
    held = []
    for strip in work.layout.strips:
        rows = slice(strip.first, strip.end)
        shift = work.shift(rows)
        answer, total = work.strip(work.shifted(rows, shift), strip.spans)
        if strip.first >= num_plain:
            held.append((answer, total))
            continue
        if not is_exact(total):
            top = partial(work.top, work.folded[:, rows], strip.spans)
            shift = raised(shift, total, top)
            bad = is_large(total).flatten(2).any(2).any(0).nonzero()[:, 0]
            spans = [span.only(bad) for span in strip.spans]
            query = work.shifted(rows, shift)[:, bad]
            answer[:, bad], total[:, bad] = work.strip(query, spans)
        work.finish(rows, shift, answer, total)
    if work.layout.branches is not None:
        answer_drafts(work, work.layout.branches, held)
