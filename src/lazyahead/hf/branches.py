"""Drafts on several branches: the last blocks of each path are gathered in canonical order."""

from __future__ import annotations

import torch
from torch import Tensor

from lazyahead.cache.blocks import BLOCK, Blocks
from lazyahead.hf.plan import Branches
from lazyahead.hf.products import Sums, Work, is_exact, is_large, raised


def answer_drafts(work: Work, branches: Branches, held: list[tuple[Tensor, Tensor]]) -> None:
    """`held` is what the drafts sum up over the blocks that all of them share."""
    num_plain = work.layout.num_plain
    rows = slice(num_plain, work.num_rows)
    keys, values = _gathered(work.keys, branches), _gathered(work.values, branches)
    shift = work.shift(rows)
    answer, total = _on_branches(work, branches, work.shifted(rows, shift), held, keys, values)
    if not is_exact(total):
        bad = is_large(total)
        strips = [strip for strip in work.layout.strips if strip.first >= num_plain]

        def top() -> Tensor:
            tops = [work.top(work.folded[:, part.first : part.end], part.spans) for part in strips]
            own = _top_on_branches(work, branches, work.folded[:, rows], keys)
            return torch.maximum(torch.cat(tops, 1), own)

        shift = raised(shift, total, top)
        query = work.shifted(rows, shift)
        parts = [query[:, strip.first - num_plain : strip.end - num_plain] for strip in strips]
        held = [work.strip(part, strip.spans) for part, strip in zip(parts, strips, strict=True)]
        new = _on_branches(work, branches, query, held, keys, values)
        answer, total = torch.where(bad, new[0], answer), torch.where(bad, new[1], total)
    work.finish(rows, shift, answer, total)


def _gathered(part: Blocks, branches: Branches) -> Tensor:
    """(blocks, H_kv * L, BLOCK, width) the last blocks of each of L paths: whole copies, in which
    the few rows that lie elsewhere are put in their place."""
    path, block, place, slot = branches.moved
    common = part.blocks[branches.blocks][:, :, None]  # (blocks, H_kv, 1, BLOCK, width)
    by_path = common.expand(-1, -1, branches.rows.shape[0], -1, -1).clone(
        memory_format=torch.contiguous_format
    )
    by_path[block, :, path, place] = part.wide_at(slot)
    return by_path.flatten(1, 2)


def _on_branches(
    work: Work,
    branches: Branches,
    query: Tensor,
    held: list[tuple[Tensor, Tensor]],
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adds the gathered blocks to what the drafts hold of the common ones."""
    paths, most = branches.rows.shape
    chosen, count = branches.rows.flatten(), most * work.groups

    def spread(part: Tensor) -> Tensor:  # (H_kv, M, G, x) -> (H_kv * L, Q * G, x)
        return part[:, chosen].reshape(work.num_kv * paths, count, -1)

    sums = Sums(*(spread(torch.cat(parts, 1)) for parts in zip(*held, strict=True)))
    scores = work.scores(spread(query), keys)
    live = scores.view(-1, work.num_kv, paths, most, work.groups, BLOCK)
    live.add_(branches.bias[:, None])
    sums.add(scores, values)
    assert sums.answer is not None
    assert sums.total is not None
    shape = (work.num_kv, paths * most, work.groups, -1)
    answer, total = (of.reshape(shape) for of in (sums.answer, sums.total))
    return answer[:, branches.source], total[:, branches.source]


def _top_on_branches(work: Work, branches: Branches, folded: Tensor, keys: Tensor) -> Tensor:
    """(H_kv, M, G, 1) the highest raw score of each draft over the gathered blocks."""
    paths, most = branches.rows.shape
    count = most * work.groups
    chosen = folded[:, branches.rows.flatten()]
    flat = chosen.reshape(work.num_kv * paths, count, -1)
    scores = flat @ keys[..., : work.width].transpose(2, 3)
    by_row = scores.reshape(-1, work.num_kv, paths, most, work.groups, BLOCK)
    top = (by_row + branches.bias[:, None]).amax(-1, keepdim=True).amax(0)
    return top.flatten(1, 2)[:, branches.source]
