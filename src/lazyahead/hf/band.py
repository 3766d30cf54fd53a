"""Local attention as a few large calls of fused kernels without a mask: what a GPU is fast at.

Rows are cut into blocks as long as the window. A row then attends to the rows of its own block up
to itself, to the end of the block before, and to the first few keys of the text. The first is
causal attention within a block, the second is causal attention with rows and keys in reverse order,
the third a handful of logits. The three are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lazyahead.hf.rows import NUM_SINKS


def can_attend_band(query: Tensor, values: Tensor) -> bool:
    """Whether a fused kernel that also returns the log-sum-exp takes these tensors."""
    width = query.shape[-1]
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and is_half and width % 8 == 0 and width == values.shape[-1] <= 256


def attend_band(query: Tensor, keys: Tensor, values: Tensor, window: int, scaling: float) -> Tensor:
    """Attention of the rows at the positions F to N - 1, query (1, H, N - F, D), keys and values
    (1, H_kv, N, D) by position: row i over the keys i - window + 1 to i, and over the first
    `NUM_SINKS`: (1, H, N - F, D). F is 0, or at least `window`."""
    num_rows, first = query.shape[2], keys.shape[2] - query.shape[2]
    start = max(0, first - window)
    rows, of_keys, of_values = (
        _blocks(part, window) for part in (query, keys[:, :, start:], values[:, :, start:])
    )
    num = rows.shape[0]
    num_with = of_keys.shape[0] - 1  # blocks of rows that have one before them
    answer, weight = _causal(rows, of_keys[-num:], of_values[-num:], scaling)
    answers, weights = [_joined(answer)], [_joined(weight)]
    if num_with:
        back = rows[-num_with:, :, :-1].flip(2)
        before = of_keys[:-1, :, 1:].flip(2), of_values[:-1, :, 1:].flip(2)
        answer, weight = _causal(back, *before, scaling)
        more = num - num_with  # the last row of each block sees nothing of the block before
        answers.append(_joined(pad(answer.flip(2), (0, 0, 0, 1, 0, 0, more, 0))))
        weights.append(_joined(pad(weight.flip(2), (0, 1, 0, 0, more, 0), value=-torch.inf)))
    groups = query.shape[1] // keys.shape[1]
    sinks, sink_values = (
        part[0, :, :NUM_SINKS].repeat_interleave(groups, 0) for part in (keys, values)
    )
    logits = (_joined(rows) @ sinks.transpose(1, 2)).float() * scaling  # (H, N - F, sinks)
    places = torch.arange(first, first + logits.shape[1], device=query.device)[:, None]
    near = places - window < torch.arange(sinks.shape[1], device=query.device)
    logits.masked_fill_(near, -torch.inf)
    top = torch.stack([*weights, logits.amax(-1)]).amax(0)
    shares = [(weight - top).exp_() for weight in weights]
    of_sinks = (logits - top[..., None]).exp_()
    total = sum(shares, of_sinks.sum(-1))
    merged = (of_sinks / total[..., None]).to(query.dtype) @ sink_values
    for answer, share in zip(answers, shares, strict=True):
        merged = torch.addcmul(merged, answer, (share / total).to(query.dtype)[..., None])
    return merged[None, :, :num_rows]


def _blocks(rows: Tensor, window: int) -> Tensor:
    """(1, H, N, D) -> (blocks, H, window, D), the last block filled up with zeros."""
    num_heads, num_rows, width = rows.shape[1:]
    filled = pad(rows, (0, 0, 0, -num_rows % window))
    return filled.reshape(num_heads, -1, window, width).transpose(0, 1)


def _joined(blocks: Tensor) -> Tensor:
    """(blocks, H, window, ...) -> (H, N, ...)."""
    return blocks.transpose(0, 1).flatten(1, 2)


def _causal(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention of as many rows as keys, and the log-sum-exp of each row (B, H, N)."""
    if query.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, True, False, scale=scaling
        )
    else:
        groups = query.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, True, scale=scaling
        )
    return found[0], found[1]
