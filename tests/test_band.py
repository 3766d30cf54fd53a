"""Local attention without masks, as GPUs compute it, equals the one with masks."""

import pytest
import torch

from lazyahead.cache.kv import LayerKV
from lazyahead.hf.band import can_attend_band
from lazyahead.hf.dense_attention import _attend_fused, attend, attend_last
from lazyahead.hf.rows import AttentionParams, LocalWindow, QueryRows, Shared


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(
    ("num_keys", "window", "first"),
    [(40, 8, 0), (37, 8, 0), (12, 16, 0), (100, 16, 40), (64, 16, 32), (50, 16, 3)],
)
def test_rows_see_the_same_keys_without_a_mask(
    heads: tuple[int, int], num_keys: int, window: int, first: int
) -> None:
    """Whole prompts, and chunks that begin within the first window or behind it; lengths that are
    no multiple of the window; the last rows see everything."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads[0], num_keys - first, 16, generator=generator)
    keys, values = torch.randn(2, 1, heads[1], num_keys, 16, generator=generator)
    kv, places = LayerKV(), torch.arange(num_keys)
    kv.append(keys, values, places)
    local = LocalWindow(window, num_keys - 3)
    rows = QueryRows(places[first:], num_keys - 1, None, Shared(), first, local)
    params = AttentionParams(16**-0.5)
    expected = attend(query, kv, rows, params)
    torch.testing.assert_close(_attend_fused(query, kv, rows, local, params), expected)


def test_rows_at_the_end_of_a_text_need_no_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 5, 16, generator=generator)
    keys, values = torch.randn(2, 1, 2, 12, 16, generator=generator)
    kv, places = LayerKV(), torch.arange(12)
    kv.append(keys, values, places)
    params = AttentionParams(0.25)
    expected = attend(query, kv, QueryRows(places[7:], 11, None, Shared()), params)
    torch.testing.assert_close(attend_last(query, kv, params), expected)


def test_a_cpu_attends_with_masks() -> None:
    query = torch.randn(1, 4, 8, 16, dtype=torch.bfloat16)
    assert not can_attend_band(query, query)
