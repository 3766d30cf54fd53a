"""The loops in C compute what torch computes, each row alone, and leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from support import prompts
from torch import Tensor, nn

from lazyahead import LLM
from lazyahead.errors import ConfigError
from lazyahead.hf import native as module
from lazyahead.hf.fused import Fused
from lazyahead.hf.native import Native, native
from lazyahead.sampling import Sampling


@pytest.fixture
def loops() -> Native:
    found = native()
    if found is None:
        pytest.skip("no AVX-512 bf16, or no C compiler")
    return found


@pytest.fixture
def anew() -> Iterator[None]:
    """Whether there are loops is decided anew, here and afterwards."""
    module._made.cache_clear()
    yield
    module._made.cache_clear()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-6, atol=1e-6)


def test_weights_are_exponentials_and_their_sum(loops: Native) -> None:
    torch.manual_seed(0)
    scores = drawn(2, 70, 512) * 8 - 4
    scores[:, :, 300:] = -torch.inf
    weights = scores.clone()
    totals = loops.weigh(weights)
    near(weights, scores.float().exp())
    torch.testing.assert_close(
        totals, scores.float().exp().sum(-1, keepdim=True), rtol=1e-5, atol=0
    )
    assert not weights[:, :, 300:].any()
    for num in (1, 4, 33):
        part = scores[:, :num].clone()
        assert torch.equal(loops.weigh(part), totals[:, :num])
        assert torch.equal(part, weights[:, :num])


@pytest.mark.parametrize("score", [torch.inf, torch.nan, 100.0])
def test_sums_out_of_range_are_seen(loops: Native, score: float) -> None:
    scores = torch.zeros(1, 64).bfloat16()
    scores[0, 5] = score
    assert not float(loops.weigh(scores)) < 2**22


@pytest.mark.parametrize("num_rows", [1, 2, 5, 7])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("width", [16, 48, 64, 256])
def test_few_rows_are_answered_over_the_slots_they_see(
    loops: Native, groups: int, width: int, num_rows: int
) -> None:
    rng = random.Random(groups * width)
    torch.manual_seed(0)
    keys, values = drawn(3, 2, 512, width + 2), drawn(3, 2, 512, width)
    keys[..., width], keys[..., width + 1] = -1, 0
    all_keys, all_values = (
        part.transpose(0, 1).flatten(1, 2).float() for part in (keys[..., :width], values)
    )
    query, own = drawn(1, 2 * groups, num_rows, width), drawn(1, 2, num_rows, width)
    for lowest in (0, 512, 700):
        ranges = []
        for row in range(num_rows):
            first = rng.randrange(lowest, lowest + 100)
            ranges.append((first, rng.randrange(first + 1, 1537)))
            own[:, :, row] = all_keys[:, ranges[row][1] - 1]
        seen = torch.tensor(ranges)
        answer, most = loops.attend_rows(query, own, keys, values, seen, 0.1)
        assert 0 < most < 2**22
        for row, (first, end) in enumerate(ranges):
            part = slice(row, row + 1)
            alone = query[:, :, part], own[:, :, part], keys, values, seen[part], 0.1
            assert torch.equal(loops.attend_rows(*alone)[0], answer[:, part]), "in any company"
            folded = query[0, :, row].float().view(2, groups, width) * 0.1
            scores = torch.einsum("hgd,hnd->hgn", folded, all_keys[:, first:end])
            wanted = torch.einsum("hgn,hnd->hgd", scores.softmax(-1), all_values[:, first:end])
            torch.testing.assert_close(
                answer[0, row].float(), wanted.reshape(-1, width), rtol=0.02, atol=0.02
            )


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_rows_are_gated_as_torch_does(loops: Native, rows: int) -> None:
    torch.manual_seed(0)
    both = drawn(1, rows, 192) * 8
    gate, up = both.split_with_sizes([96, 96], -1)
    near(loops.silu_mul(gate, up), nn.functional.silu(gate) * up)
    assert torch.equal(loops.silu_mul(gate.contiguous(), up), loops.silu_mul(gate, up))


def test_threads_share_rows_and_change_no_bits(loops: Native) -> None:
    torch.manual_seed(0)
    rows, weight = drawn(1, 200, 96), drawn(96)
    keys, values = drawn(3, 4, 512, 66), drawn(3, 4, 512, 64)
    keys[..., 64], keys[..., 65] = -1, 0
    query, own = drawn(1, 12, 3, 64), drawn(1, 4, 3, 64)
    seen = torch.tensor([[3, 1534], [0, 1535], [9, 1536]])

    def computed() -> list[Tensor]:
        scores = rows[0, :, :1].expand(200, 512).contiguous()
        return [
            loops.rms_norm(rows, weight, 1e-6, 0.0, True),
            loops.silu_mul(rows, rows.flip(1)),
            loops.weigh(scores),
            scores,
            loops.dot(rows.view(2, 100, 1, 96).expand(-1, -1, 3, -1), rows.view(2, 100, 1, 96)),
            loops.attend_rows(query, own, keys, values, seen, 0.1)[0],
        ]

    before, alone = torch.get_num_threads(), computed()
    try:
        torch.set_num_threads(2)
        together = computed()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, together))


class Mlp(nn.Module):
    """Has the parts of a gated MLP, and does something else with them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down_proj, self.act_fn = nn.Linear(96, 64), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


def test_only_modules_that_prove_to_compute_the_same_are_replaced(loops: Native) -> None:
    model = Mlp().bfloat16()
    with Fused(model).attached():
        assert "forward" not in model.__dict__
    model.act_fn = nn.SiLU()
    rows = drawn(1, 9, 64)
    with torch.no_grad():
        plain = model(rows)
        with Fused(model).attached():
            assert "forward" in model.__dict__
            near(model(rows), plain)
        assert "forward" not in model.__dict__


def test_batches_of_others_are_computed_whole(loops: Native) -> None:
    model = Mlp().bfloat16()
    model.act_fn = nn.SiLU()
    rows = drawn(2, 9, 64)
    with torch.no_grad():
        plain = model(rows)
        with Fused(model).attached():
            near(model(rows), plain)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_norms_keep_their_way_of_rounding(loops: Native, family: str) -> None:
    model = FAMILIES[family]().bfloat16()
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.randn_like(norm.weight))
        rows = [drawn(1, 64, norm.weight.numel()) for norm in norms]
        plain = [norm(part) for norm, part in zip(norms, rows, strict=True)]
        with Fused(model).attached():
            assert all("forward" in norm.__dict__ for norm in norms)
            for norm, part, wanted in zip(norms, rows, plain, strict=True):
                whole = norm(part)
                assert (whole != wanted).float().mean() < 0.01
                assert torch.equal(norm(part[:, 5:9]), whole[:, 5:9])


def test_gradients_and_hooks_are_as_without(loops: Native) -> None:
    model = build("llama").bfloat16()
    mlp: Any = model.model.layers[0].mlp
    seen: list[Tensor] = []
    with Fused(model).attached():
        rows = drawn(1, 4, 64).requires_grad_()
        mlp(model.model.norm(rows)).sum().backward()
        assert rows.grad is not None
    handle = mlp.act_fn.register_forward_hook(lambda *args: seen.append(args[2]))
    with Fused(model).attached(), torch.no_grad():
        mlp(rows)
    handle.remove()
    assert seen


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_torch_does_it_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    sampling = Sampling(max_new_tokens=8, ignore_eos=True)
    monkeypatch.setenv("LAZYAHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_COMPILERS", ("no-such-compiler", "false"))
    assert native() is None
    (completion,) = LLM(build("llama").bfloat16(), prefill=None).generate(
        prompts(40), sampling=sampling
    )
    assert len(completion.token_ids) == 8


@pytest.mark.usefixtures("anew")
def test_a_library_that_others_may_write_is_not_loaded(
    loops: Native, anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAZYAHEAD_CACHE", str(tmp_path))
    module._made.cache_clear()
    assert native() is not None
    (library,) = tmp_path.rglob("*.so")
    library.chmod(0o777)
    module._made.cache_clear()
    assert native() is None


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYAHEAD_NATIVE", "0")
    assert native() is None
    module._made.cache_clear()
    monkeypatch.setenv("LAZYAHEAD_NATIVE", "yes")
    with pytest.raises(ConfigError, match="yes"):
        native()


def test_a_wrong_setting_is_named_and_no_reason_to_defer_nothing(
    anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYAHEAD_NATIVE", "yes")
    with pytest.raises(ConfigError, match="LAZYAHEAD_NATIVE is 0 or 1, got 'yes'"):
        LLM(FAMILIES["llama"]().bfloat16())
