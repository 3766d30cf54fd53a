"""The products of attention in blocks of keys: scores, weights and sums, each row with one order of
summation.

Scores come out of the product already shifted: the query carries m in an extra column and keys
carry -1 there, where m is the larger of the row's score with its own key and with the first key.
That takes no pass over the scores, needs no running maximum and keeps their bf16 rounding small
where the weight is. A row whose sum says that m was far too small is computed anew with the
logarithm of that sum added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lazyahead.cache.blocks import EXTRA, Blocks
from lazyahead.hf.native import fits, native
from lazyahead.hf.plan import Plan, Span
from lazyahead.hf.rows import AttentionParams

LARGE = 2.0**22
"""A row sum beyond this, or none, says that the shift was too small to be exact."""


class Work:
    """One call of `attend`: what its strips share. Shapes: H_kv key heads, R rows, G grouped heads,
    C = R * G."""

    def __init__(
        self,
        folded: Tensor,
        own: Tensor,
        keys: Blocks,
        values: Blocks,
        layout: Plan,
        heads: AttentionParams,
        out: Tensor,
    ) -> None:
        """`folded` (H_kv, T, G, D) queries, `own` (H_kv, T, D) the rows' keys, `out`
        (H_kv, T, G, D_v) for the answers."""
        self.folded, self.layout, self.heads, self.out = folded, layout, heads, out
        self.keys, self.values = keys, values
        self.key_blocks, self.value_blocks = keys.blocks, values.blocks
        self.dtype = folded.dtype
        self.num_kv, self.num_rows, self.groups, self.width = folded.shape
        self.own = own
        self._scratch: Tensor | None = None

    def finish(self, rows: slice, shift: Tensor, answer: Tensor, total: Tensor) -> None:
        if self.heads.sinks is not None:
            logits = self.heads.sinks.float().view(self.num_kv, 1, self.groups, 1)
            total = total + torch.exp(logits - shift.float() * self.heads.scaling)
        torch.div(answer, total, out=self.out[:, rows])

    def shift(self, rows: slice) -> Tensor:
        """(H_kv, R, G, 1) what to take from a row's raw scores: about their maximum."""
        folded = self.folded[:, rows]
        if self.heads.softcap is not None:  # scores are bounded
            return folded.new_zeros(*folded.shape[:-1], 1)
        shift = dot(folded, self.own[:, rows, None])
        first = dot(folded, self.key_blocks[0, :, :1, None, : self.width])
        if self.layout.sees_first is not None:
            first = first.masked_fill(~self.layout.sees_first[rows], -torch.inf)
        shift = torch.maximum(shift, first)
        if self.heads.sinks is not None:
            sinks = (self.heads.sinks / self.heads.scaling).to(self.dtype)
            shift = torch.maximum(shift, sinks.view(self.num_kv, 1, self.groups, 1))
        return shift

    def shifted(self, rows: slice, shift: Tensor) -> Tensor:
        """(H_kv, R, G, D + EXTRA) queries whose products with keys are scores less the shift."""
        return torch.cat([self.folded[:, rows], shift, shift], -1)

    def strip(self, query: Tensor, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """What rows (H_kv, R, G, D + EXTRA) sum up over spans: answers (H_kv, R, G, D_v), sums
        (H_kv, R, G, 1)."""
        num_rows = query.shape[1]
        count = num_rows * self.groups
        rows = query.reshape(self.num_kv, count, -1)
        sums = Sums()
        for span in spans:
            part = slice(span.block, span.block + span.num_blocks)
            keys = self.key_blocks[part, :, : span.width]
            values = self.value_blocks[part, :, : span.width]
            scores = self.scores(rows, keys)
            for block, bias in span.biases:
                hide(scores[block], bias)
            sums.add(scores, values)
        shape = (self.num_kv, num_rows, self.groups, -1)
        if sums.total is None or sums.answer is None:  # no span
            zero = torch.zeros((*shape[:-1], 1), device=query.device)
            return zero.expand(*shape[:-1], self.value_blocks.shape[-1]).clone(), zero
        return sums.answer.view(shape), sums.total.view(shape)

    def scores(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Rows (H, C, D + EXTRA) over keys (blocks, H, W, D + EXTRA): (blocks, H, C, W)."""
        count = keys.shape[0]
        shape = (count, rows.shape[0], rows.shape[1], keys.shape[2])
        size = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = rows.new_empty(size)
        scores = self._scratch[:size].view(shape)
        softcap, shift = self.heads.softcap, rows[..., -1:]
        if softcap is not None:  # the shift is taken from what is capped
            rows = torch.nn.functional.pad(rows[..., : self.width], (0, EXTRA))
        repeated = rows if count == 1 else torch.cat([rows] * count)
        columns = keys.reshape(-1, *keys.shape[2:]).transpose(1, 2)
        torch.bmm(repeated, columns, out=scores.view(-1, *shape[2:]))
        if softcap is not None:
            capped = torch.tanh(scores.float() * (self.heads.scaling / softcap))
            scores.copy_(capped.mul_(softcap).sub_(shift))
        return scores

    def top(self, part: Tensor, spans: Sequence[Span]) -> Tensor:
        """(H_kv, R, G, 1) the highest raw score of each row over what it sees of the spans."""
        num_rows = part.shape[1]
        flat = part.reshape(self.num_kv, num_rows * self.groups, -1)
        top = part.new_full((self.num_kv, num_rows, self.groups, 1), -torch.inf)
        for span in spans:
            part_of = slice(span.block, span.block + span.num_blocks)
            keys = self.key_blocks[part_of, :, : span.width, : self.width]
            scores = flat @ keys.transpose(2, 3)
            for block, bias in span.biases:
                hide(scores[block], bias)
            top = torch.maximum(top, scores.amax(-1).amax(0).view(top.shape))
        return top


class Sums:
    """Sums over blocks, added in rising order, in fp32."""

    def __init__(self, answer: Tensor | None = None, total: Tensor | None = None) -> None:
        self.answer, self.total = answer, total
        """(H, C, D_v) and (H, C, 1)"""

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Scores (blocks, H, C, W), which become weights, over values (blocks, H, W, D_v)."""
        shape = scores.shape
        totals = weighed(scores)
        answers = torch.bmm(scores.view(-1, *shape[2:]), values.reshape(-1, *values.shape[2:]))
        if self.answer is None or self.total is None or shape[0] > 1:
            answers = answers.float()
        for answer, total in zip(answers.view(*shape[:3], -1), totals, strict=True):
            if self.answer is None or self.total is None:
                self.answer, self.total = answer, total.float()
            else:
                self.answer.add_(answer)
                self.total.add_(total)


def is_exact(total: Tensor) -> bool:
    return total.amax().item() < LARGE  # also false where one is no number


def is_large(total: Tensor) -> Tensor:
    """For each row whether its shift was too small."""
    return ~(total < LARGE)


def raised(shift: Tensor, total: Tensor, top: Callable[[], Tensor]) -> Tensor:
    """The shift of rows, higher where it was too small: by the logarithm of the sum, or to the
    highest score where the sum is no number."""
    higher, is_known = (shift + total.log()).to(shift.dtype), total.isfinite()
    if not bool(is_known.all()):
        higher = torch.where(is_known, higher, top())
    return torch.where(is_large(total), higher, shift)


def weighed(scores: Tensor) -> Tensor:
    """Scores (..., W) become weights in place: the sum of each row (..., 1)."""
    loops = native(scores.dtype)
    return scores.exp_().sum(-1, keepdim=True) if loops is None else loops.weigh(scores)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The products (H_kv, R, G, 1) of rows (H_kv, R, G, D) with rows that are spread to them."""
    loops = native(left.dtype)
    if loops is None or not fits(1, left.shape[-1]):
        return (left * right).sum(-1, keepdim=True)
    return loops.dot(left, right)


def hide(scores: Tensor, bias: Tensor | slice) -> None:
    """Makes -inf of the scores (H_kv, R * G, W) that rows do not see."""
    if isinstance(bias, slice):
        scores[:, :, : bias.start] = -torch.inf
        scores[:, :, bias.stop :] = -torch.inf
    else:
        scores.view(scores.shape[0], bias.shape[0], -1, scores.shape[2]).add_(bias)
