"""Packed linear layers give the bits of plain ones, each row the same in any company, and leave
nothing behind."""

import pytest
import torch
from families import FAMILIES
from support import prompts
from torch import nn

from lazyahead import LLM
from lazyahead.bench.shapes import build_shape
from lazyahead.errors import ConfigError
from lazyahead.hf import few_rows as few_rows_module
from lazyahead.hf import packed
from lazyahead.hf.attach import attachment_of
from lazyahead.hf.few_rows import few_rows
from lazyahead.hf.native import native
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


@pytest.mark.parametrize(("width", "size"), [(576, 192), (640, 2048), (1536, 576), (2048, 640)])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_few_rows_have_the_bits_that_they_have_among_many(width, size, has_bias):
    if native() is None:
        pytest.skip("no AVX-512 bf16, or no C compiler")
    torch.manual_seed(width)
    layers = [nn.Linear(width, n, bias=has_bias, dtype=torch.bfloat16) for n in (size, 64)]
    product = few_rows(layers)
    assert product is not None
    rows = torch.randn(1, 512, width).bfloat16()
    wanted = torch.cat([layer(rows) for layer in layers], -1)
    for count in range(1, 17):
        parts = rows[:, : 512 // count * count].split(count, 1)
        found = torch.cat([product(part) for part in parts], 1)
        assert torch.equal(found, wanted[:, : found.shape[1]]), count


def test_rows_are_left_to_torch_where_it_sums_in_another_order(monkeypatch):
    monkeypatch.setattr(few_rows_module, "_PARTS", (7 * 8,))
    few_rows_module._part.cache_clear()
    try:
        assert few_rows([nn.Linear(576, 192, dtype=torch.bfloat16)]) is None
        model, _ = mlp("bfloat16")
        assert packed_of(model, False) is None
    finally:
        few_rows_module._part.cache_clear()


@torch.no_grad()
def test_without_packed_weights_few_rows_have_the_same_bits_and_take_no_memory():
    model, rows = mlp("bfloat16")
    held, plain = packed_of(model, False), model(rows)
    if native() is None:
        assert held is None
        return
    assert held.nbytes == 0
    with held.attached():
        found = torch.cat([model(part) for part in rows.split(4, 1)], 1)
        assert torch.equal(found, plain)
        assert torch.equal(model(rows), plain)


def test_passes_are_filled_up_only_where_some_product_needs_it():
    model = build_shape("tiny", max_context=512)
    llm = LLM(model, prefill=None, packed=False)
    attachment = attachment_of(model)
    with llm.engine.runner.attached():
        assert attachment.fewest_rows == (4 if native() is None else 1)
    weight = model.lm_head.weight  # no longer what was packed
    weight.data = weight.data.clone()
    with llm.engine.runner.attached():
        assert attachment.fewest_rows == 4
    experts = LLM(FAMILIES["mixtral"]().bfloat16(), prefill=None)
    if experts.support.level == "full":
        with experts.engine.runner.attached():
            assert attachment_of(experts.model).fewest_rows == 4
    with LLM(FAMILIES["llama"](), prefill=None).engine.runner.attached() as runner:
        assert attachment_of(runner.model).fewest_rows == 1
