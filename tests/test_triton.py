"""Where Triton's kernels are used, where torch's are, and that nothing stays behind.

There is no GPU here: in place of the kernels stands what counts its calls and computes the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import plain_answer, prompts, tiny
from test_graphs import recording, written
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import lazyahead.hf
from lazyahead.engine.engine import Engine
from lazyahead.errors import ConfigError
from lazyahead.hf import dense_attention, fused, packed, triton_loops
from lazyahead.hf.attach import attachment_of
from lazyahead.hf.fused import Fused
from lazyahead.hf.native import MOST_ROWS
from lazyahead.hf.packed import packed_of
from lazyahead.hf.rows import AttentionParams
from lazyahead.hf.runner import Runner
from lazyahead.hf.triton_loops import can_attend


class FakeLoops:
    """What `TritonLoops` computes, by torch."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def rms_norm(
        self, rows: Tensor, weight: Tensor, epsilon: float, offset: float, rounds: bool
    ) -> Tensor:
        self.calls.append("rms_norm")
        scaled = rows.float() * (rows.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        scaled = scaled.to(rows.dtype).float() if rounds else scaled
        return (scaled * (weight.float() + offset)).to(rows.dtype)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls.append("silu_mul")
        return silu(gate) * up

    def linear(self, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Any:
        def product(rows: Tensor) -> Tensor:
            assert rows.numel() <= MOST_ROWS * rows.shape[-1]
            self.calls.append(f"linear of {len(layers)}")
            return torch.cat([linear(rows, *layer) for layer in layers], -1)

        return product

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        self.calls.append("attend")
        params = AttentionParams(scaling)
        return dense_attention._fold(query, keys, values, bias, params)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> FakeLoops:
    """As on a GPU."""
    fake = FakeLoops()
    for module in (packed, fused, dense_attention):
        monkeypatch.setattr(module, "triton_loops", lambda like: fake)
    monkeypatch.setattr(fused, "native", lambda dtype: fake)
    monkeypatch.setattr(packed, "_LARGE", 0)
    return fake


@pytest.fixture
def anew() -> Iterator[None]:
    """Whether there are kernels is decided anew, here and afterwards."""
    triton_loops._made.cache_clear()
    yield
    triton_loops._made.cache_clear()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down_proj, self.act_fn = nn.Linear(96, 64), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


@torch.no_grad()
def test_few_rows_share_a_product_and_many_go_their_own_way(loops: FakeLoops) -> None:
    model, rows = Mlp(), torch.randn(1, 40, 64)
    plain = model(rows)
    held = packed_of(model)
    assert held is not None
    assert held.nbytes == 0
    with held.attached():
        assert torch.equal(model(rows), plain)
        assert not loops.calls
        torch.testing.assert_close(model(rows[:, :16]), plain[:, :16])
        assert loops.calls == ["linear of 2", "linear of 1"]
        torch.testing.assert_close(model(rows[:, 3:4]), plain[:, 3:4])
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_gradients_are_torchs(loops: FakeLoops) -> None:
    model = Mlp()
    held = packed_of(model)
    assert held is not None
    with held.attached(), Fused(model).attached():
        loops.calls.clear()
        model(torch.randn(1, 4, 64)).sum().backward()
    assert not loops.calls
    assert model.gate_proj.weight.grad is not None


@torch.no_grad()
def test_changed_and_wrapped_layers_are_left_alone(loops: FakeLoops) -> None:
    model, rows = Mlp(), torch.randn(1, 4, 64)
    held = packed_of(model)
    assert held is not None
    model.up_proj.weight.mul_(2)
    model.down_proj.forward = lambda x: x[..., :64]  # type: ignore[method-assign]
    wanted = model(rows)
    with held.attached():
        assert torch.equal(model(rows), wanted)
    assert not loops.calls


def test_models_that_ranks_share_are_left_alone(
    loops: FakeLoops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "num_ranks", lambda model: 2)
    monkeypatch.setattr(packed, "_gpu_product", None)
    packed_of(Mlp(), True)


def test_weights_of_a_kind_of_their_own_are_left_alone(loops: FakeLoops) -> None:
    class Quantised(Tensor):
        pass

    model = Mlp()
    weight = model.up_proj.weight.data.as_subclass(Quantised)
    del model.up_proj.weight
    model.up_proj.weight = weight  # type: ignore[assignment]
    assert not packed.has_kernels(model.up_proj)
    assert packed.has_kernels(model.down_proj)
    assert not packed.has_kernels(nn.Linear(63, 96))
    assert not packed.has_kernels(nn.Embedding(64, 96))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_answers_are_those_of_transformers_recorded_and_not(family: str, loops: FakeLoops) -> None:
    (text,) = prompts(40)
    model, spec = tiny(family)
    wanted = plain_answer(family, tuple(text), 14)
    for records in (False, True):
        held = attachment_of(model)
        kept = held.packed, held._fused
        held.packed = held._fused = None
        try:
            engine = Engine(Runner(model, spec), None, None)
            engine.runner.pack(None)  # type: ignore[union-attr]
            recorder = recording(engine) if records else None
            loops.calls.clear()
            assert written(engine, [text]) == [wanted]
            kinds = {"rms_norm", "linear of 3", "linear of 1"}
            assert kinds | ({"attend"} if family != "gemma2" else set()) <= set(loops.calls)
            assert recorder is None or recorder.num_replayed
        finally:
            held.packed, held._fused = kept
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_products_are_attention() -> None:
    torch.manual_seed(0)
    query, params = torch.randn(1, 6, 5, 32), AttentionParams(0.2)
    keys, values = torch.randn(1, 2, 70, 32), torch.randn(1, 2, 70, 16)
    seen = torch.rand(5, 70) > 0.3
    bias = dense_attention.bias_of(seen, 3, torch.float32)
    parts = (query, keys[:, :, :64], values[:, :, :64], bias[:, :64], params)
    found, wanted = dense_attention._by_products(*parts), dense_attention._fold(*parts)
    torch.testing.assert_close(found, wanted)


def test_attention_is_for_few_rows_over_keys_in_one_row() -> None:
    query, keys = torch.zeros(1, 4, 3, 32), torch.zeros(1, 2, 50, 32)
    assert can_attend(query, keys[:, :, :40], keys)
    assert not can_attend(query.repeat(1, 1, 6, 1), keys, keys)
    assert not can_attend(query, keys.transpose(1, 2).contiguous().transpose(1, 2), keys)
    assert not can_attend(query.half(), keys, keys)
    assert not can_attend(query[..., :24], keys[..., :24].contiguous(), keys)


def test_kernels_are_for_half_precision_on_gpus() -> None:
    assert triton_loops.triton_loops(torch.zeros(1)) is None
    assert triton_loops.triton_loops(torch.zeros(1, dtype=torch.bfloat16)) is None
    model = Mlp().bfloat16()
    assert not packed.has_kernels(model.up_proj)


def made() -> Any:
    return triton_loops._made(torch.device("cuda", 0), torch.bfloat16)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_older_gpus_and_those_without_triton_are_left_to_torch(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lazyahead.hf.triton_kernels", raising=False)
    monkeypatch.delattr(lazyahead.hf, "triton_kernels", raising=False)
    assert made() is None


@pytest.mark.usefixtures("anew")
def test_kernels_that_fail_or_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> bool:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    name = "lazyahead.hf.triton_kernels"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(lazyahead.hf, "triton_kernels", ModuleType(name), raising=False)
    monkeypatch.setattr(triton_loops, "_computes_the_same", fail)
    assert made() is None
    assert "no C compiler" in caplog.text
    triton_loops._made.cache_clear()
    monkeypatch.setattr(triton_loops, "_computes_the_same", lambda *args: False)
    assert made() is None
    triton_loops._made.cache_clear()
    monkeypatch.setattr(triton_loops, "_computes_the_same", lambda *args: True)
    assert made() is not None


@pytest.mark.usefixtures("anew")
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYAHEAD_NATIVE", "0")
    assert made() is None
    triton_loops._made.cache_clear()
    monkeypatch.setenv("LAZYAHEAD_NATIVE", "yes")
    with pytest.raises(ConfigError, match="yes"):
        made()


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, lazyahead.hf.packed; assert 'lazyahead.hf.triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_compute_what_torch_computes() -> None:
    pytest.importorskip("triton")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).with_name("test_triton_kernels.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]
