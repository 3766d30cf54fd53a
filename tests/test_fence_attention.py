"""The attention function against the definition, written out key by key in float64."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lazyahead.cache import kv as kv_module
from lazyahead.cache.kv import LayerKV
from lazyahead.hf import attention
from lazyahead.hf.rows import AttentionParams, LocalWindow, QueryRows
from lazyahead.hf.scores import attention_weights

SIZE = 8


def attend(query: Tensor, kv: LayerKV, rows: QueryRows, heads: AttentionParams) -> Tensor:
    """(1, H, T, D_v), the rows' own keys being the last of the layer."""
    own = kv.keys[:, :, len(kv) - query.shape[2] :]
    return attention.attend(query, own, kv, rows, heads).transpose(1, 2)


@pytest.fixture(params=["blocks", "one row"], autouse=True, scope="module")
def layout(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keys in blocks, as bfloat16 on the CPU, and in one row, as everything else."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "blocks":
            patch.setattr(kv_module, "BLOCKED_DTYPE", torch.float32)
        yield


def sees(query: int, key: int, heads: AttentionParams) -> bool:
    """Whether a row at position `query` sees a key at position `key`, drafts aside."""
    if key > query or (heads.window is not None and key <= query - heads.window):
        return False
    return heads.chunk is None or key // heads.chunk == query // heads.chunk


def visible(rows: QueryRows, key_positions: Tensor, heads: AttentionParams) -> Tensor:
    """(T, N), from the definition: causal by position; rows that look near see that; among drafts,
    ancestors only."""
    queries, keys = rows.positions.tolist(), key_positions.tolist()
    mask = torch.tensor([[sees(query, key, heads) for key in keys] for query in queries])
    if rows.local is not None:
        distance = rows.positions[:, None] - key_positions
        mask &= (
            (distance < rows.local.num_tokens)
            | (key_positions < 4)
            | (rows.positions[:, None] >= rows.local.until)
        )
    if rows.ancestors is not None:
        num = rows.ancestors.shape[0]
        mask[-num:, -num:] &= rows.ancestors
    return mask


def reference(
    query: Tensor, kv: LayerKV, rows: QueryRows, heads: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Output (1, H, T, D_v) and attention (H, T, N)."""
    groups = query.shape[1] // kv.keys.shape[1]
    keys, values = (part.double().repeat_interleave(groups, dim=1) for part in (kv.keys, kv.values))
    logits = query.double() @ keys.transpose(2, 3) * heads.scaling
    if heads.softcap is not None:
        logits = heads.softcap * torch.tanh(logits / heads.softcap)
    logits = logits.masked_fill(~visible(rows, kv.positions, heads), -math.inf)
    if heads.sinks is not None:
        sinks = heads.sinks.double().view(1, -1, 1, 1).expand(-1, -1, logits.shape[2], -1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., : len(kv)]
    return (weights @ values).float(), weights[0].float()


def ancestors_of(parents: list[int]) -> Tensor:
    """(M, M) from each draft's parent, -1 for the root."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def filled(key_positions: list[int], num_kv: int) -> LayerKV:
    kv = LayerKV()
    num = len(key_positions)
    kv.append(
        torch.randn(1, num_kv, num, SIZE),
        torch.randn(1, num_kv, num, SIZE),
        torch.tensor(key_positions),
    )
    return kv


@st.composite
def cases(draw: Any) -> tuple[Tensor, LayerKV, QueryRows, AttentionParams]:
    """Rows in any gaps between the keys that are there, a tree of drafts behind them, any kind of
    head."""
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    num_tokens = draw(st.integers(1, 48))
    chosen = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    in_flight = [place for place, is_in in enumerate(chosen) if is_in] or [num_tokens - 1]
    cached = draw(st.permutations([place for place in range(num_tokens) if place not in in_flight]))
    cached = cached[: draw(st.integers(0, len(cached)))]
    if len(in_flight) == 1:  # a row that comes alone is the last of its text
        cached = [place for place in cached if place < in_flight[0]]
    parents = [draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(0, 6)))]
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    positions = (
        in_flight + [in_flight[-1] + depth for depth in depths]
        if not cached or max(cached) < in_flight[-1]
        else in_flight
    )
    ancestors = ancestors_of(parents) if len(positions) > len(in_flight) else None
    num_kv, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    heads = AttentionParams(
        scaling=draw(st.sampled_from([0.2, 1.0])),
        window=draw(st.sampled_from([None, 1, 5, 200])),
        chunk=draw(st.sampled_from([None, 1, 7, 200])),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=torch.randn(num_kv * groups) if draw(st.booleans()) else None,
    )
    kv = filled([*cached, *positions], num_kv)
    return (
        torch.randn(1, num_kv * groups, len(positions), SIZE),
        kv,
        QueryRows(torch.tensor(positions), max(positions), ancestors),
        heads,
    )


@given(cases())
def test_attention_is_what_the_definition_says(
    case: tuple[Tensor, LayerKV, QueryRows, AttentionParams],
) -> None:
    query, kv, rows, heads = case
    torch.testing.assert_close(attend(query, kv, rows, heads), reference(query, kv, rows, heads)[0])


@given(cases(), st.integers(1, 8))
def test_scores_are_the_attention_of_the_last_rows(
    case: tuple[Tensor, LayerKV, QueryRows, AttentionParams], num: int
) -> None:
    query, kv, rows, heads = case
    num = min(num, query.shape[2])
    assume(num > 1 or int(kv.positions.max()) == rows.last)
    ours = attention_weights(query[:, :, -num:], kv, rows, heads)
    torch.testing.assert_close(ours, reference(query, kv, rows, heads)[1][:, -num:])


@pytest.mark.parametrize("num_cached", [0, 30])
@pytest.mark.parametrize("parents", [[], [-1, 0, -1, 2]], ids=["text", "drafts"])
@pytest.mark.parametrize(
    "heads",
    [
        AttentionParams(0.3),
        AttentionParams(0.3, window=40),
        AttentionParams(0.3, chunk=64),
        AttentionParams(0.3, softcap=2.0),
        AttentionParams(0.3, sinks=torch.ones(4)),
    ],
    ids=["plain", "window", "chunk", "softcap", "sinks"],
)
def test_many_rows_go_in_blocks_unseen(
    num_cached: int, parents: list[int], heads: AttentionParams
) -> None:
    torch.manual_seed(0)
    chain = list(range(num_cached, num_cached + 600))
    depths = [1, 2, 1, 2][: len(parents)]
    positions = [*chain, *(chain[-1] + depth for depth in depths)]
    kv = filled([*range(num_cached), *positions], 2)
    rows = QueryRows(
        torch.tensor(positions), max(positions), ancestors_of(parents) if parents else None
    )
    query = torch.randn(1, 4, len(positions), SIZE)
    torch.testing.assert_close(attend(query, kv, rows, heads), reference(query, kv, rows, heads)[0])


@pytest.mark.parametrize("start", [0, 3, 300])
@pytest.mark.parametrize(
    "near",
    [
        LocalWindow(7, 1190),
        LocalWindow(200, 1190),
        LocalWindow(200, 1200),
        LocalWindow(200, 500),
        LocalWindow(5000, 1190),
    ],
)
@pytest.mark.parametrize(
    "heads",
    [
        AttentionParams(0.3),
        AttentionParams(0.3, softcap=2.0),
        AttentionParams(0.3, sinks=torch.ones(4)),
    ],
)
def test_rows_that_look_near_see_what_is_near_and_the_first_few_and_the_last_rows_see_all(
    start: int, near: LocalWindow, heads: AttentionParams
) -> None:
    torch.manual_seed(0)
    kv, places = filled(list(range(1200)), 2), torch.arange(start, 1200)
    rows, query = QueryRows(places, 1199, local=near), torch.randn(1, 4, len(places), SIZE)
    torch.testing.assert_close(attend(query, kv, rows, heads), reference(query, kv, rows, heads)[0])
