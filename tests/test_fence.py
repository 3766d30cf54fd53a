"""Nothing stays behind: hooks, attention and `generate` are as before, whatever happened inside."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, build, prompt
from families_more import HYBRID_FAMILIES, MORE_FAMILIES
from torch import nn
from transformers import PreTrainedModel

import lazyahead
from lazyahead import LLM, LazyPrefill, accelerate, probe
from lazyahead.errors import LazyAheadError
from lazyahead.hf.probe import examine
from lazyahead.hf.runner import Runner
from lazyahead.hf.trace import all_configs, switched, trace

PUBLIC = {
    *(
        "LLM",
        "PRESETS",
        "Completion",
        "LazyAheadError",
        "LazyPrefill",
        "Lookahead",
        "Piece",
        "Reach",
        "Sampling",
    ),
    *("Session", "Stats", "Support", "__version__", "accelerate", "custom_generate", "probe"),
}


class BrokenError(Exception):
    """Raised by a layer on purpose."""


def state(model: PreTrainedModel) -> Any:
    """Everything that an attachment may touch."""
    hooks = [
        (
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            len(module._forward_pre_hooks_with_kwargs),
        )
        for module in model.modules()
    ]
    configs = [(id(config), config._attn_implementation) for config in all_configs(model)]
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    return (
        hooks,
        configs,
        buffers,
        "generate" in vars(model),
        [sorted(vars(module)) for module in model.modules()],
    )


@pytest.fixture(params=["llama", "gemma2", "gemma3_vl", "phi3_longrope", "llama_dynamic"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = {**FAMILIES, **MORE_FAMILIES}[request.param]()
    model(prompt(40))  # some rotary modules make their long tables when first needed
    probe(model)  # and the model's own short passes put them back
    return model


def breaking(layer: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise BrokenError

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def attached_run(model: PreTrainedModel) -> None:
    ids = prompt(40)
    with accelerate(model, prefill=LazyPrefill(min_tokens=0)):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)


def test_after_the_block_the_model_is_as_before(model: PreTrainedModel) -> None:
    before = state(model)
    attached_run(model)
    assert state(model) == before


def test_also_after_an_exception_inside_a_pass(model: PreTrainedModel) -> None:
    _, spec = examine(model)
    assert spec is not None
    before = state(model)
    handle = breaking(spec.layers[2])
    with pytest.raises(BrokenError):
        attached_run(model)
    handle.remove()
    assert state(model) == before
    attached_run(model)


def test_plain_forward_beside_an_attachment_is_the_models_own(model: PreTrainedModel) -> None:
    _, spec = examine(model)
    assert spec is not None
    with torch.no_grad():
        alone = model(prompt(20)).logits
        with Runner(model, spec).attached():
            beside = model(prompt(20)).logits
    assert torch.equal(alone, beside)


def test_nested_attachments_leave_together(model: PreTrainedModel) -> None:
    _, spec = examine(model)
    assert spec is not None
    runner, before = Runner(model, spec), state(model)
    with runner.attached():
        inside = state(model)
        with runner.attached():
            assert state(model) == inside
        assert state(model) == inside
    assert state(model) == before
    with pytest.raises(LazyAheadError, match="not attached"):
        runner.run([])


@pytest.mark.parametrize(
    "name", ["llama", "diffllama", "bloom", "doge", "mamba", "bart_decoder", "cpmant", "gemma3n"]
)
def test_the_probe_leaves_no_trace(name: str) -> None:
    model = {**FAMILIES, **MORE_FAMILIES, **HYBRID_FAMILIES}[name]()
    before = state(model)
    probe(model)
    assert state(model) == before


def test_a_look_that_fails_leaves_no_trace() -> None:
    model = build("llama")
    before = state(model)
    handle = breaking(model.model.layers[2])
    with pytest.raises(BrokenError):
        trace(model, 5)
    handle.remove()
    assert state(model) == before


def test_configs_are_switched_one_by_one() -> None:
    """A part that was given an attention of its own has it again afterwards."""
    model = MORE_FAMILIES["gemma3_vl"]()
    model.config.vision_config._attn_implementation = "eager"
    before = [config._attn_implementation for config in all_configs(model)]
    assert len(set(before)) == 2
    with pytest.raises(BrokenError):
        _break_inside(model)
    assert [config._attn_implementation for config in all_configs(model)] == before


def _break_inside(model: PreTrainedModel) -> None:
    with switched(all_configs(model), "lazyahead"):
        assert {config._attn_implementation for config in all_configs(model)} == {"lazyahead"}
        raise BrokenError


def test_a_paused_stream_leaves_plain_calls_alone_and_an_abandoned_one_leaves_no_trace() -> None:
    model = build("llama")
    before = state(model)
    with torch.no_grad():
        alone = model(prompt(20)).logits
    stream: Iterator[Any] = LLM(model, prefill=LazyPrefill(min_tokens=0)).stream(
        prompt(40)[0].tolist()
    )
    next(stream)
    with torch.no_grad():
        assert torch.equal(model(prompt(20)).logits, alone)
    assert state(model)[1] == before[1]  # attention is the model's own between two steps
    del stream
    assert state(model) == before


def test_importing_does_nothing() -> None:
    """No torch, no transformers, no output, no environment variable, no logging handler."""
    code = (
        "import os, sys, logging; before = dict(os.environ); import lazyahead; "
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'typer'} & set(sys.modules); "
        "print(sorted(heavy), before == dict(os.environ), logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[] True []", "")


def test_public_names() -> None:
    assert set(lazyahead.__all__) == PUBLIC
    assert all(getattr(lazyahead, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lazyahead.nothing
