"""The code of docs/how-to-extend.md runs, and does what the page says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import byte_level, save_model
from transformers import AutoModelForCausalLM

from lazyahead import LLM, LazyPrefill, Sampling, accelerate
from lazyahead.draft.factory import describe
from lazyahead.errors import ConfigError
from lazyahead.prefill.score import SCORERS

PAGE = Path(__file__).parents[1] / "docs" / "how-to-extend.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
PROMPT = "The code of the red door is 417. " * 36
SAMPLING = Sampling(max_new_tokens=48, ignore_eos=True)


@pytest.fixture(autouse=True)
def all_drafts(monkeypatch):
    """Every draft is verified, so that the number of steps does not depend on the clock."""
    monkeypatch.setattr("lazyahead.build.row_cost_of", lambda model: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = save_model(tmp_path_factory.mktemp("docs") / "tiny")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def names(model):
    """What the page defines, in the order in which it is read."""
    names = {"model": model, "tokenizer": byte_level(), "prompt": PROMPT, "__name__": "my_code"}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def lines_of(block):
    return [line for line in block.splitlines() if line.strip()]


def test_a_scorer_has_at_most_15_lines_and_a_drafter_25(names):
    scorer, drafter, _ = BLOCKS
    assert len(lines_of(scorer)) <= 15
    assert len(lines_of(drafter)) <= 25
    assert len(names["completion"].token_ids) > 0


def test_the_drafter_changes_no_text_and_saves_steps(model, names):
    plain, drafted = (
        LLM(model, tokenizer=byte_level(), prefill=None, decode=decode)
        for decode in (None, names["Repeat"]())
    )
    expected = plain.generate(PROMPT, sampling=SAMPLING)
    completion = drafted.generate(PROMPT, sampling=SAMPLING)
    assert completion.token_ids == expected.token_ids
    assert completion.stats.num_steps < expected.stats.num_steps
    assert describe(drafted.decode)["drafter"] == "my_code:Repeat"


def test_the_drafter_works_inside_accelerate(model, names):
    ids = torch.tensor([names["llm"].encode(PROMPT).token_ids])
    asked = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    expected = model.generate(ids, **asked)
    with accelerate(model, prefill=None, decode=names["Repeat"]()) as accelerated:
        assert model.generate(ids, **asked).tolist() == expected.tolist()
    assert accelerated.stats[0].num_steps < 31


def test_the_text_is_the_same_with_both_in_use(model, names):
    prefill = LazyPrefill(scorer=names["LoudestHead"]())
    alone = LLM(model, tokenizer=byte_level(), prefill=prefill, decode=None)
    expected = alone.generate(PROMPT, sampling=SAMPLING)
    assert names["llm"].generate(PROMPT, sampling=SAMPLING).token_ids == expected.token_ids
    assert expected.stats.prompt_tokens_computed < 1.0


def test_the_scorer_is_called_with_the_shapes_that_the_page_names(model, names, monkeypatch):
    shapes = []
    kind = names["LoudestHead"]
    score = kind.__call__

    def seen(self, attention, positions):
        shapes.append((*attention.shape, *positions.shape))
        return score(self, attention, positions)

    monkeypatch.setattr(kind, "__call__", seen)
    LLM(model, tokenizer=byte_level(), prefill=LazyPrefill(scorer=kind())).generate(PROMPT)
    assert shapes
    assert all(len(shape) == 3 and shape[0] == 4 and shape[1] == shape[2] for shape in shapes)


def test_the_scorer_is_described_saved_and_loaded(names, tmp_path, monkeypatch):
    prefill = LazyPrefill(scorer=names["LoudestHead"](window_size=2))
    described = prefill.to_dict()["scorer"]
    assert described == {
        "name": "my_code:LoudestHead",
        "window_size": 2,
        "head_reduction": "max",
    }
    path = tmp_path / "mine.toml"
    prefill.save(path)
    with pytest.raises(ConfigError, match="my_code:LoudestHead"):
        LazyPrefill.load(path)
    monkeypatch.setitem(SCORERS, described["name"], names["LoudestHead"])
    monkeypatch.setitem(SCORERS, "loudest_head", names["LoudestHead"])
    assert replace(LazyPrefill.load(path)).scorer == prefill.scorer


def test_sessions_that_it_read_are_saved_and_loaded(names, tmp_path):
    llm = names["llm"]
    session = llm.session()
    first = llm.generate(PROMPT, sampling=SAMPLING, session=session)
    llm.save_session(session, tmp_path / "session")
    loaded = llm.load_session(tmp_path / "session")
    text = PROMPT + first.text + " Again:"
    answers = [
        llm.generate(text, sampling=SAMPLING, session=used).token_ids for used in (session, loaded)
    ]
    assert answers[0] == answers[1]
