"""Kernels for NVIDIA GPUs in Triton: imported where they run, by `triton_loops.py`, which says what
they compute. Sums are in fp32.

No kernel is compiled for a number of rows, so that the rows of every pass meet the same one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run on the CPU, in numpy: `TRITON_INTERPRET=1`."""


@triton.jit(do_not_specialize=["num_rows"])
def linear_rows(
    rows,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out,
    num_rows,
    width,
    size_0,
    size_1,
    size_2,
    NUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`OUTPUTS` of the outputs of `NUM` layers, for all rows (R, width), R <= `ROWS`. The weights
    are the left side of the product: each is read once, whatever the number of rows."""
    block = tl.program_id(0)
    weight, bias, size, start = weight_0, bias_0, size_0, 0
    total = size_0
    if NUM > 1:
        blocks = tl.cdiv(size_0, OUTPUTS)
        total += size_1
        if block >= blocks:
            weight, bias, size, start = weight_1, bias_1, size_1, size_0
            block -= blocks
            if NUM > 2:
                blocks = tl.cdiv(size_1, OUTPUTS)
                if block >= blocks:
                    weight, bias, size, start = weight_2, bias_2, size_2, size_0 + size_1
                    block -= blocks
    if NUM > 2:
        total += size_2
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    is_output, is_row = outputs < size, row < num_rows
    weights = weight + outputs.to(tl.int64)[:, None] * width + columns[None, :]
    inputs = rows + row[None, :] * width + columns[:, None]
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in range(0, width, COLUMNS):
        if IS_EVEN:
            left = tl.load(weights, is_output[:, None], 0.0, eviction_policy="evict_first")
            right = tl.load(inputs, is_row[None, :], 0.0)
        else:
            is_column = columns < width - first
            is_weight = is_output[:, None] & is_column[None, :]
            left = tl.load(weights, is_weight, 0.0, eviction_policy="evict_first")
            right = tl.load(inputs, is_row[None, :] & is_column[:, None], 0.0)
        sums = tl.dot(left, right, sums)
        weights += COLUMNS
        inputs += COLUMNS
    if HAS_BIAS:
        sums += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)[:, None]
    places = out + row[None, :] * total + (start + outputs)[:, None]
    tl.store(places, sums.to(out.dtype.element_ty), is_output[:, None] & is_row[None, :])


@triton.jit
def rms_norm_rows(
    rows,
    weight,
    out,
    epsilon,
    width,
    OFFSET: tl.constexpr,
    ROUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row (width,), width <= `COLUMNS`."""
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, COLUMNS)
    is_column = columns < width
    row = tl.load(rows + start + columns, is_column, 0.0).to(tl.float32)
    factors = tl.load(weight + columns, is_column, 0.0).to(tl.float32) + OFFSET
    row *= tl.rsqrt(tl.sum(row * row) / width + epsilon)
    if ROUNDS:
        row = row.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + start + columns, (row * factors).to(out.dtype.element_ty), is_column)


@triton.jit
def silu_mul_rows(gate, up, out, stride, width, COLUMNS: tl.constexpr):
    """`COLUMNS` numbers of a row (width,) of gates and of ups, which lie `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    x = tl.load(gate + row * stride + columns, is_column, 0.0).to(tl.float32)
    factors = tl.load(up + row * stride + columns, is_column, 0.0).to(tl.float32)
    power = tl.exp(-x) if IS_INTERPRETED else libdevice.exp(-x)  # this one has torch's bits
    gated = tl.div_rn(x, 1.0 + power).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (gated * factors).to(out.dtype.element_ty), is_column)


@triton.jit(
    do_not_specialize=[
        *("num_queries", "num_rows", "num_keys", "has_bias", "bias_stride"),
        *("query_head_stride", "query_row_stride"),
    ]
)
def attend_parts(
    query,
    keys,
    values,
    bias,
    sums,
    tops,
    totals,
    num_queries,
    num_rows,
    num_keys,
    has_bias,
    bias_stride,
    query_head_stride,
    query_row_stride,
    key_head_stride,
    value_head_stride,
    scaling,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """`ROWS` of the queries (G * R) of a key head over one part of `KEYS` of its keys: of each the
    highest logit (in powers of two), the sum of its weights, and their sum of values."""
    part, block = tl.program_id(0), tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    place = block * ROWS + tl.arange(0, ROWS)
    is_query = place < num_queries
    key = part * KEYS + tl.arange(0, KEYS)
    is_key = key < num_keys
    columns, value_columns = tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    is_column, is_value = columns < WIDTH, value_columns < VALUE_WIDTH
    heads = head * (num_queries // num_rows) + place // num_rows
    queries = query + heads * query_head_stride + (place % num_rows) * query_row_stride
    left = tl.load(queries[:, None] + columns[None, :], is_query[:, None] & is_column[None, :], 0.0)
    places = key.to(tl.int64)
    at = keys + head * key_head_stride + places[None, :] * WIDTH + columns[:, None]
    right = tl.load(at, is_key[None, :] & is_column[:, None], 0.0)
    logits = tl.dot(left, right) * (scaling * 1.4426950408889634)
    is_pair = is_query[:, None] & is_key[None, :]
    bias_at = bias + place[:, None] * bias_stride + key[None, :]
    logits += tl.load(bias_at, is_pair & (has_bias != 0), 0.0).to(tl.float32)
    logits = tl.where(is_key[None, :], logits, -float("inf"))
    top = tl.max(logits, 1)
    weights = tl.exp2(logits - tl.where(top == -float("inf"), 0.0, top)[:, None])
    at = values + head * value_head_stride + places[:, None] * VALUE_WIDTH + value_columns[None, :]
    right = tl.load(at, is_key[:, None] & is_value[None, :], 0.0)
    answers = tl.dot(weights.to(right.dtype), right)
    row = head * num_queries + place
    at = tl.num_programs(0) * row + part
    tl.store(tops + at, top, is_query)
    tl.store(totals + at, tl.sum(weights, 1), is_query)
    at = sums + at[:, None] * VALUE_WIDTH + value_columns[None, :]
    tl.store(at, answers, is_query[:, None] & is_value[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_parts"])
def merge_parts(
    sums,
    tops,
    totals,
    out,
    num_rows,
    num_heads,
    num_parts,
    VALUE_WIDTH: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The answer of one query (of H * R), `PARTS` parts at a time: parts that it sees nothing of
    change no bits."""
    query = tl.program_id(0).to(tl.int64)
    parts, columns = tl.arange(0, PARTS), tl.arange(0, VALUE_COLUMNS)
    is_column = columns < VALUE_WIDTH
    tops += query * num_parts
    highest = tl.full((PARTS,), -float("inf"), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + parts
        highest = tl.maximum(highest, tl.load(tops + part, part < num_parts, -float("inf")))
    top = tl.max(highest, 0)
    total = tl.zeros((PARTS,), tl.float32)
    answer = tl.zeros((PARTS, VALUE_COLUMNS), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + parts
        is_part = part < num_parts
        factors = tl.exp2(tl.load(tops + part, is_part, -float("inf")) - top)
        total += factors * tl.load(totals + query * num_parts + part, is_part, 0.0)
        at = sums + (query * num_parts + part)[:, None] * VALUE_WIDTH + columns[None, :]
        answer += factors[:, None] * tl.load(at, is_part[:, None] & is_column[None, :], 0.0)
    answer = tl.sum(answer, 0) / tl.sum(total, 0)
    head, row = query // num_rows, query % num_rows
    at = out + (row * num_heads + head) * VALUE_WIDTH + columns
    tl.store(at, answer.to(out.dtype.element_ty), is_column)
