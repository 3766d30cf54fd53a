"""What each family of transformers supports, and that every way of reading and writing gives its
own greedy text."""

import functools
from importlib.metadata import version
from typing import Any

import pytest
import torch
from families import FAMILIES, prompt
from families_more import HYBRID_FAMILIES, MORE_FAMILIES
from transformers import PreTrainedModel

from lazyahead import LLM, LazyPrefill, Lookahead, Sampling, accelerate, probe
from lazyahead.engine.engine import Engine
from lazyahead.engine.request import Request
from lazyahead.errors import UnsupportedModelError
from lazyahead.hf.probe import examine
from lazyahead.hf.runner import Runner
from lazyahead.prefill.score import Window
from lazyahead.sampling import Picker

ALL = {**FAMILIES, **MORE_FAMILIES, **HYBRID_FAMILIES}
NOT_FULL = {
    "axk2": "layers of type indexed_attention",
    "bart_decoder": "logits differ",  # its positions follow from the length of its own cache
    "bloom": "not called through",
    "codegen": "not called through",
    "cpmant": "not called through",
    "deepseek_v32": "layers of type indexed_attention",
    "deepseek_v4": "layers of type compressed_sparse_attention",
    "diffllama": "layer 0 calls its attention 2 times",
    "doge": "does not fit the seams",  # its mask depends on values
    "dots3_note": "layers of type indexed_attention",
    "falcon": "not called through",
    "falcon_alibi": "not called through",
    "gemma3n": "share keys and values",
    "gemma4_shared": "share keys and values",
    "glm_moe_dsa": "layers of type indexed_attention",
    "gpt_neo": "not called through",
    "gpt_neox_japanese": "not called through",
    "gptj": "not called through",
    "hrm_text": "do not come from one stack",
    "hy_v4": "layers of type indexed_attention",
    "longcat_flash": "layer 0 calls its attention 2 times",
    "minimax_m3_sparse": "layers of type minimax_m3_sparse",
    "mpt": "not called through",
    "openai_gpt": "not called through",
    "xglm": "not called through",
} | dict.fromkeys(HYBRID_FAMILIES, "")
NONE = {
    "cpmant": "cannot go on from its cache",
    "openai_gpt": "no cache",
    "recurrent_gemma": "no cache",
}
IS_NEWEST = version("transformers").startswith("5.23.")
PROMPTS = [prompt(length, seed=length)[0].tolist() for length in (40, 57, 23)]
KEEP_ALL = LazyPrefill(schedule=((0.3, 1.0), (0.6, 1.0)), min_tokens=0)
LAZY = LazyPrefill(
    schedule=((0.3, 0.5), (0.6, 0.3)),
    min_tokens=0,
    protect_last=4,
    scorer=Window(4, 3),
    revive_threshold=0.02,
)


@functools.cache
def made(name: str) -> PreTrainedModel:
    try:
        return ALL[name]()
    except Exception:
        if IS_NEWEST:
            raise
        pytest.skip("this transformers knows another config of the family")


@functools.cache
def plain_answers(name: str, num_tokens: int = 6) -> list[list[int]]:
    """Greedy answers of transformers alone to PROMPTS."""
    model, answers = made(name), []
    for ids in PROMPTS:
        inputs = torch.tensor([ids])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
        answers.append(output[0, len(ids) :].tolist())
    return answers


def answers_of(
    name: str, prefill: LazyPrefill | None, prompts: list[list[int]], prefill_chunk_size: int = 512
) -> list[Request]:
    """Greedy answers of the engine, all prompts at once."""
    model = made(name)
    _, spec = examine(model)
    assert spec is not None
    engine = Engine(Runner(model, spec), prefill, None, prefill_chunk_size=prefill_chunk_size)
    requests = [
        Request(ids, Picker(), session=engine.new_session(), max_new_tokens=6, min_tokens=0)
        for ids in prompts
    ]
    with engine:
        for request in requests:
            engine.submit(request)
        while not engine.is_idle:
            engine.step()
    return requests


def texts(requests: list[Request]) -> list[list[int]]:
    return [request.answer for request in requests]


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_each_family_has_its_level_and_a_reason(name: str) -> None:
    support = probe(made(name))
    if name not in NOT_FULL:
        assert support.level == "full", support.reason
        assert len(support.layer_types) == support.num_layers
        return
    expected = "none" if name in NONE else "decode-only"
    if not IS_NEWEST:  # reasons differ
        assert support.level != "full"
        return
    assert support.level == expected, support.reason
    assert NOT_FULL[name] in support.reason
    assert NONE.get(name, "") in support.reason


@pytest.mark.parametrize("name", ["diffllama", "gemma3n", "mamba", "bloom"])
@pytest.mark.parametrize(
    "strategy", [{"prefill": LazyPrefill()}, {"decode": Lookahead()}], ids=["prefill", "decode"]
)
def test_what_a_family_cannot_do_is_refused_by_its_name(
    name: str, strategy: dict[str, Any]
) -> None:
    model, asked = made(name), {"prefill": None, "decode": None, **strategy}
    with pytest.raises(UnsupportedModelError, match=model.config.model_type):
        LLM(model, **asked)
    with (
        pytest.raises(UnsupportedModelError, match=model.config.model_type),
        accelerate(model, **asked),
    ):
        pass


def test_a_family_without_a_way_to_go_on_is_refused_whatever_is_asked() -> None:
    with pytest.raises(UnsupportedModelError, match="openai-gpt"):
        LLM(made("openai_gpt"), prefill=None, decode=None)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("phimoe", {"sliding_attention"}),  # its window stands in the mask alone
        ("moshi", {"full_attention"}),  # its config names a window that is never applied
        ("llama4", {"chunked_attention", "full_attention"}),
        ("gemma3", {"sliding_attention", "full_attention"}),
        ("llama", {"full_attention"}),
    ],
)
def test_what_layers_see_is_read_off_their_masks(name: str, kinds: set[str]) -> None:
    assert set(probe(made(name)).layer_types) == kinds


@pytest.mark.parametrize("name", ["gemma3_vl", "gemma4_vl", "mllama"])
def test_layers_of_models_with_eyes_are_those_that_read(name: str) -> None:
    model = made(name)
    _, spec = examine(model)
    assert spec is not None
    names = {module: name for name, module in model.named_modules()}
    assert all("vision" not in names[layer] for layer in spec.layers)
    assert spec.num_layers == (
        3 if name == "mllama" else 4
    )  # one of mllama's layers only traces at pictures


# --- equality -------------------------------------------------------------------------------------

SAME = [
    *FAMILIES,
    "gemma4",
    "gemma4_unified",
    "phimoe",
    "qwen2_moe_window",
    "beam",
    "phi3_longrope",
    "llama_dynamic",
]


@pytest.mark.parametrize("name", [name for name in SAME if name in ALL])
class TestEquality:
    """Plain transformers' greedy text, token for token."""

    def test_alone(self, name: str) -> None:
        assert texts(answers_of(name, None, PROMPTS[:1])) == plain_answers(name)[:1]

    def test_in_a_batch(self, name: str) -> None:
        assert texts(answers_of(name, None, PROMPTS)) == plain_answers(name)

    def test_with_boundaries_that_keep_all(self, name: str) -> None:
        assert texts(answers_of(name, KEEP_ALL, PROMPTS[:1])) == plain_answers(name)[:1]

    def test_read_in_parts_beside_others(self, name: str) -> None:
        assert texts(answers_of(name, KEEP_ALL, PROMPTS, prefill_chunk_size=16)) == plain_answers(
            name
        )

    @pytest.mark.parametrize("prefill", [LAZY, LazyPrefill.paper()], ids=["demand", "paper"])
    def test_lazily_alone_as_in_a_batch(self, name: str, prefill: LazyPrefill) -> None:
        alone = [answers_of(name, prefill, [ids])[0] for ids in PROMPTS]
        together = answers_of(name, prefill, PROMPTS, prefill_chunk_size=11)
        assert texts(alone) == texts(together)
        assert sum(request.session.num_revived for request in alone) > 0


@pytest.mark.parametrize(
    "name", [name for name in ("llama_dynamic", "phi3_longrope", "gemma4") if name in ALL]
)
def test_drafts_leave_the_text_as_it_is(name: str) -> None:
    """Also across the length at which rotary tables change, and with tables that depend on the
    token."""
    model, ids = (
        made(name),
        torch.randint(2, 6, (1, 10), generator=torch.Generator().manual_seed(1)),
    )
    outputs = []
    for decode in (None, Lookahead()):
        with accelerate(model, prefill=None, decode=decode):
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
            )
        outputs.append(output.tolist())
    assert outputs[0] == outputs[1]


GOES_ON = [
    "mamba",
    "falcon_mamba",
    "jamba",
    "zamba2",
    "minimax",
    "lfm2",
    "qwen3_next",
    "rwkv",
    "bloom",
    "diffllama",
]


@pytest.mark.parametrize("name", [name for name in GOES_ON if name in ALL])
def test_decoding_alone_goes_on_from_its_own_state(name: str) -> None:
    """The second turn continues the first; both give what transformers gives for the whole text."""
    llm = LLM(made(name), prefill=None, decode=None)
    session, sampling = llm.session(), Sampling(max_new_tokens=6, ignore_eos=True)
    text = PROMPTS[2]
    for turn in range(2):
        *_, last = llm.stream(text, sampling=sampling, session=session)
        inputs = torch.tensor([text])
        plain = llm.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False
        )
        assert session.history == plain[0].tolist()
        assert last.finish_reason == "length"
        text = [*session.history, *PROMPTS[turn][:5]]
