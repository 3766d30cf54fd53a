"""Linear layers in 8-bit integers: near those in bfloat16, each row the same in any company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from support import prompts
from torch import Tensor, nn

from lazyahead import LLM, LazyPrefill, Lookahead
from lazyahead.bench.prefill import Subject
from lazyahead.cli import run
from lazyahead.errors import ConfigError, SessionFileError, UnsupportedModelError
from lazyahead.hf import attach, int8
from lazyahead.hf.attach import dtype_name
from lazyahead.hf.int8 import why_not
from lazyahead.hf.load import load
from lazyahead.hf.packed import int8_of
from lazyahead.reader import reader_path
from lazyahead.sampling import Sampling

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
SAMPLING = Sampling(max_new_tokens=12, ignore_eos=True)


def layer(width: int, size: int, has_bias: bool = False) -> nn.Linear:
    torch.manual_seed(width)
    return nn.Linear(width, size, bias=has_bias, dtype=torch.bfloat16)


def product_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    (product,) = [group.product for group in int8_of(nn.ModuleList([linear]))._groups]
    return product.forward


def rows_of(count: int, width: int) -> Tensor:
    return (torch.randn(1, count, width) * torch.logspace(-3, 3, count)[:, None]).bfloat16()


SHAPES = [(576, 960, False), (1536, 576, True), (64, 48, True), (40, 24, True), (2048, 32, False)]


@pytest.mark.parametrize(("width", "size", "has_bias"), SHAPES)
@torch.no_grad()
def test_outputs_are_near_those_of_the_plain_layer(width: int, size: int, has_bias: bool) -> None:
    linear = layer(width, size, has_bias)
    rows = rows_of(64, width)
    wanted, found = linear(rows).float(), product_of(linear)(rows).float()
    assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(("width", "size", "has_bias"), SHAPES)
@torch.no_grad()
def test_a_row_has_the_same_bits_in_any_company_and_with_or_without_compiled_loops(
    width: int, size: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, rows = product_of(layer(width, size, has_bias)), rows_of(300, width)
    whole = product(rows)
    for count in (1, 2, 3, 4, 8, 9, 16, 17, 33):
        parts = [product(part) for part in rows.split(count, 1)]
        assert torch.equal(torch.cat(parts, 1), whole), count
    monkeypatch.setattr(int8, "native", lambda *_: None)
    assert torch.equal(product(rows), whole)
    assert torch.equal(product(rows[:, :3]), whole[:, :3])


@pytest.mark.parametrize("loops", [True, False])
@torch.no_grad()
def test_rows_of_zeros_give_the_bias_and_what_is_no_number_stays_none(
    loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loops:
        monkeypatch.setattr(int8, "native", lambda *_: None)
    linear = layer(64, 48, True)
    product = product_of(linear)
    for count in (4, 20):
        rows = torch.zeros(count, 64).bfloat16()
        rows[1, 5], rows[2, 7] = torch.nan, torch.inf
        found = product(rows)
        assert torch.equal(found[0], linear.bias)
        assert not found[1].isfinite().any()
        assert not found[2].isfinite().any()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2", "mixtral"])
def test_answers_do_not_depend_on_drafts_or_on_other_requests(family: str) -> None:
    model = FAMILIES[family]().bfloat16()
    texts = [*prompts(40), *prompts(90), [1, 2, 3, 1, 2, 3, 1, 2]]
    llm = LLM(model, dtype="int8", prefill=None)
    assert dtype_name(llm.model) == "int8"
    if llm.support.level != "full":
        pytest.skip("can only decode in half precision")
    alone = [llm.generate([text], sampling=SAMPLING)[0].token_ids for text in texts]
    assert [one.token_ids for one in llm.generate(texts, sampling=SAMPLING)] == alone
    drafted = LLM(model, prefill=None, decode=Lookahead())
    assert dtype_name(drafted.model) == "int8"
    assert [one.token_ids for one in drafted.generate(texts, sampling=SAMPLING)] == alone


@torch.no_grad()
def test_the_model_itself_stays_as_it_was() -> None:
    model = FAMILIES["llama"]().bfloat16()
    token_ids = torch.tensor([[3, 1, 4, 1, 5]])
    plain = model(token_ids).logits
    llm = LLM(model, dtype="int8", prefill=LazyPrefill(((0.5, 0.5),), min_tokens=0))
    llm.generate(prompts(60), sampling=SAMPLING)
    assert torch.equal(model(token_ids).logits, plain)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_layers_whose_weights_changed_since_run_as_they_are() -> None:
    model = FAMILIES["llama"]().bfloat16()
    llm = LLM(model, dtype="int8", prefill=None, packed=False)
    plain = LLM(FAMILIES["llama"]().bfloat16(), prefill=None, packed=False)
    for weight in model.parameters():
        weight.data = weight.data.clone()
    (found,), (wanted,) = (one.generate([[5, 6, 7]], sampling=SAMPLING) for one in (llm, plain))
    assert found.token_ids == wanted.token_ids


def test_a_session_of_another_dtype_is_refused(tmp_path: Path) -> None:
    plain, quantized = (LLM(dtype=dtype, prefill=None) for dtype in ("bfloat16", "int8"))
    session = plain.read_ahead("Ann has a red hat. " * 20)
    plain.save_session(session, tmp_path / "one")
    with pytest.raises(SessionFileError, match="dtype"):
        quantized.load_session(tmp_path / "one")


def test_where_it_cannot_be_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="loaded in float32; load it in int8"):
        LLM(FAMILIES["llama"](), dtype="int8", prefill=None)
    with pytest.raises(ConfigError, match="packed=True"):
        LLM(dtype="int8", prefill=None, packed=True)
    with pytest.raises(ConfigError, match="tp=2"):
        load(str(reader_path()), "int8", tp=2)
    bare = FAMILIES["llama"]().bfloat16()
    monkeypatch.setattr(attach, "int8_of", lambda _: None)
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        LLM(bare, dtype="int8", prefill=None)
    monkeypatch.setattr(attach, "why_not", lambda: "8-bit products overflow on this processor")
    with pytest.raises(ConfigError, match=r"overflow on this processor; use bfloat16"):
        LLM(dtype="int8", prefill=None)


def test_a_loaded_model_takes_no_other_dtype_or_device() -> None:
    model = FAMILIES["llama"]()
    assert LLM(model, dtype=torch.float32, device="cpu", prefill=None).model is model
    with pytest.raises(ConfigError, match=r"was loaded in float32; load it in bfloat16"):
        LLM(model, dtype="bfloat16", prefill=None)
    with pytest.raises(ConfigError, match=r"is on cpu; move it to meta"):
        LLM(model, device="meta", prefill=None)


def test_a_random_model_of_a_known_shape_is_measured_in_it() -> None:
    assert dtype_name(Subject(shape="tiny", dtype="int8", device="cpu").load(None).model) == "int8"
    with pytest.raises(ConfigError, match="int3"):
        Subject(shape="tiny", dtype="int3").load(None)


def test_the_command_line_answers_and_verifies_in_int8(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--dtype", "int8", "--n", "1", "--length", "300", "--json"]) == 0
    assert '"dtype": "int8"' in capsys.readouterr().out
    assert run(["generate", "Ann has a hat.", "--dtype", "int8", "--max-new-tokens", "4"]) == 0
