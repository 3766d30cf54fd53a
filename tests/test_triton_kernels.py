"""The kernels for GPUs compute what torch computes, and a row the same in any company.

They run in Triton's interpreter on the CPU, which must be chosen before Triton is imported: so
`test_triton.py` runs this file in a process of its own. It has no products of bfloat16, so numbers
are in float16.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import FakeDrafter, engine_for, finish, prompts, request_for, tiny
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from lazyahead.hf import dense_attention, fused, packed
from lazyahead.hf.fused import _WAYS
from lazyahead.hf.triton_loops import TritonLoops

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton.py, in Triton's interpreter", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
"""The interpreter computes in numpy."""


@pytest.fixture(scope="module")
def loops() -> TritonLoops:
    from lazyahead.hf import triton_kernels

    return TritonLoops(triton_kernels)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).half()


def near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("width", "sizes"), [(256, (48,)), (80, (33, 16)), (272, (16, 7, 40)), (21, (5,))]
)
@torch.no_grad()
def test_layers_that_share_an_input_are_one_product(
    loops: TritonLoops, width: int, sizes: tuple[int, ...], has_bias: bool
) -> None:
    layers = [nn.Linear(width, size, bias=has_bias, dtype=torch.float16) for size in sizes]
    product = loops.linear([(layer.weight, layer.bias) for layer in layers])
    rows = drawn(1, 16, width)
    whole = product(rows)
    near(whole, torch.cat([layer(rows) for layer in layers], -1))
    for count in (1, 2, 7):
        assert torch.equal(product(rows[:, 3 : 3 + count]), whole[:, 3 : 3 + count]), count
    assert product(rows[:, :0]).shape == (1, 0, sum(sizes))


@torch.no_grad()
def test_numbers_of_another_kind_are_for_torch_to_take_or_refuse(loops: TritonLoops) -> None:
    product = loops.linear([(drawn(16, 32), None)])
    with pytest.raises(RuntimeError, match="dtype"):
        product(torch.zeros(1, 32))


@pytest.mark.parametrize("way", _WAYS)
def test_norms_round_as_they_are_told(loops: TritonLoops, way: tuple[float, bool]) -> None:
    offset, rounds = way
    rows, weight = drawn(2, 5, 48), drawn(48)
    scaled = rows.float() * (rows.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    scaled = scaled.half().float() if rounds else scaled
    wanted = (scaled * (weight.float() + offset)).half()
    found = loops.rms_norm(rows, weight, 1e-5, offset, rounds)
    assert (found != wanted).float().mean() < 0.01
    near(found, wanted)
    assert loops.rms_norm(rows[:, :0], weight, 1e-5, offset, rounds).shape == (2, 0, 48)
    strided = drawn(2, 5, 96)[..., :48]
    assert torch.equal(
        loops.rms_norm(strided, weight, 1e-5, *way),
        loops.rms_norm(strided.contiguous(), weight, 1e-5, *way),
    )


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_are_gated_as_torch_does(loops: TritonLoops, rows: int) -> None:
    gate, up = (drawn(1, rows, 2208) * 8).split_with_sizes([1104, 1104], -1)
    found = loops.silu_mul(gate, up)
    near(found, silu(gate) * up)
    assert (found != silu(gate) * up).float().mean() < 0.01
    assert torch.equal(loops.silu_mul(gate.contiguous(), up), found)


@pytest.mark.parametrize(
    ("num_heads", "num_kv", "width", "values"), [(4, 2, 32, 16), (5, 5, 80, 80)]
)
@pytest.mark.parametrize("num_keys", [1, 128, 300])
def test_few_rows_attend_to_what_they_see(
    loops: TritonLoops, num_heads: int, num_kv: int, width: int, values: int, num_keys: int
) -> None:
    groups, num_rows = num_heads // num_kv, 7
    buffers = drawn(1, num_kv, 400, width), drawn(1, num_kv, 400, values)
    keys, valued = (buffer[:, :, :num_keys] for buffer in buffers)
    query = drawn(1, num_rows, num_heads, width).transpose(1, 2)
    seen = drawn(num_rows, num_keys) > 0
    seen[:, 0] = True
    bias = torch.zeros(num_rows, num_keys).masked_fill(~seen, -torch.inf).half()
    folded = bias.repeat(groups, 1)
    found = loops.attend(query, keys, valued, folded, 0.2)
    spread = keys.repeat_interleave(groups, 1), valued.repeat_interleave(groups, 1)
    whole = [part.float() for part in (query, *spread)]
    wanted = scaled_dot_product_attention(
        whole[0], whole[1], whole[2], attn_mask=bias.float(), scale=0.2
    )
    near(found, wanted.half())
    for row in range(num_rows):
        part = slice(row, row + 1)
        alone = loops.attend(query[:, :, part], keys, valued, bias[part].repeat(groups, 1), 0.2)
        assert torch.equal(alone, found[:, :, part]), "in any company"
    hidden = torch.full((num_rows, 400 - num_keys), -torch.inf).half()
    longer = torch.cat([bias, hidden], 1).repeat(groups, 1)
    assert torch.equal(loops.attend(query, *buffers, longer, 0.2), found), "hidden keys are nothing"
    if num_keys == 300:
        lone = query[:, :, :1]
        assert torch.equal(
            loops.attend(lone, keys, valued, None, 0.2),
            loops.attend(lone, keys, valued, torch.zeros_like(folded[:groups]), 0.2),
        )


def test_answers_are_the_same_drafted_and_in_a_batch(
    loops: TritonLoops, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (packed, fused, dense_attention):
        monkeypatch.setattr(module, "triton_loops", lambda like: loops)
    family, texts = "llama:float16", prompts(20, 17)

    def answers(drafter: FakeDrafter | None, *batches: list[list[int]]) -> list[list[int]]:
        engine = engine_for(family, None, drafter)
        engine.runner.pack(None)  # type: ignore[union-attr]
        written = []
        for batch in batches:
            requests = [request_for(engine, text, 6) for text in batch]
            finish(engine, requests)
            written += [list(request.answer) for request in requests]
        return written

    alone = answers(None, *[[text] for text in texts])
    known = {tuple(text): answer for text, answer in zip(texts, alone, strict=True)}
    assert answers(None, texts) == alone
    assert answers(FakeDrafter("sometimes", known), *[[text] for text in texts]) == alone
    assert all("forward" not in module.__dict__ for module in tiny(family)[0].modules())
