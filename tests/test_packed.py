"""Packed linear layers give the bits of plain ones, each row the same in any company, and leave
nothing behind."""

import pytest
import torch
from families import FAMILIES
from support import prompts
from torch import nn

from lazyahead import LLM
from lazyahead.errors import ConfigError
from lazyahead.hf import packed
from lazyahead.hf.packed import packed_of
from lazyahead.sampling import Sampling


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(576, 1536, bias=False)
        self.up_proj = nn.Linear(576, 1536, bias=False)
        self.down_proj = nn.Linear(1536, 576)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def mlp(dtype: str) -> tuple[Mlp, torch.Tensor]:
    torch.manual_seed(0)
    model = Mlp().to(getattr(torch, dtype))
    return model, torch.randn(1, 256, 576).to(model.down_proj.weight.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@torch.no_grad()
def test_rows_have_the_same_bits_in_any_company(dtype):
    model, rows = mlp(dtype)
    held, plain = packed_of(model, True), model(rows)
    assert held.nbytes == sum(weight.nbytes for weight in model.parameters() if weight.ndim == 2)
    with held.attached():
        whole = model(rows)
        for size in (4, 5, 8, 33):
            parts = [model(part) for part in rows[:, : 256 // size * size].split(size, 1)]
            assert torch.equal(torch.cat(parts, 1), whole[:, : 256 // size * size]), size
    if dtype == "bfloat16":
        assert torch.equal(plain, whole)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(rows), plain)


@torch.no_grad()
def test_weights_that_changed_since_are_used_as_they_are():
    model, rows = mlp("float32")
    held = packed_of(model, True)
    model.up_proj.weight.mul_(2)
    model.down_proj.weight = nn.Parameter(model.down_proj.weight * 3)
    after = model(rows)
    with held.attached():
        assert torch.equal(model(rows), after)


@torch.no_grad()
def test_layers_that_somebody_has_wrapped_are_left_alone():
    model, rows = mlp("float32")
    held = packed_of(model, True)
    model.up_proj.forward = lambda x: x.new_zeros(*x.shape[:2], 1536)
    with held.attached():
        assert not model(rows).sub(model.down_proj.bias).any()
    assert "forward" in model.up_proj.__dict__


def test_packing_is_a_matter_of_memory_and_of_the_environment(monkeypatch):
    model, _ = mlp("float32")
    assert packed_of(model) is not None
    assert packed_of(model, False) is None
    assert packed_of(nn.LayerNorm(3), True) is None
    monkeypatch.setattr(packed, "_SPARE", 1 << 40)
    assert packed_of(model) is None
    assert packed_of(model, True) is not None
    monkeypatch.setenv("LAZYAHEAD_PACKED", "1")
    assert packed_of(model) is not None
    monkeypatch.setenv("LAZYAHEAD_PACKED", "yes")
    with pytest.raises(ConfigError, match="yes"):
        packed_of(model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "qwen2", "gpt2", "opt"])
def test_answers_are_the_same_packed(family):
    sampling = Sampling(max_new_tokens=12, ignore_eos=True)
    answers = []
    for choice in (False, True):
        llm = LLM(FAMILIES[family]().bfloat16(), prefill=None, packed=choice)
        (completion,) = llm.generate(prompts(40), sampling=sampling)
        answers.append(completion.token_ids)
        assert all("forward" not in module.__dict__ for module in llm.model.modules())
    assert answers[0] == answers[1]
