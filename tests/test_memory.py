"""The memory of answers: what it brings, whom it serves, and that nothing is shared without it."""

import sqlite3
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_fallback, byte_level, save_model
from transformers import AutoModelForCausalLM

from lazyahead import LLM, Lookahead, Sampling, accelerate
from lazyahead.draft.answers import AnswerLog, Owner
from lazyahead.draft.factory import drafter_for
from lazyahead.draft.tree import Source
from lazyahead.errors import ConfigError, MemoryFileError
from lazyahead.hf.fingerprint import owner_of, tokenizer_fingerprint

PROMPT = "The code of the red door is"
texts = st.lists(st.integers(0, 3), max_size=40)
SAMPLING = Sampling(max_new_tokens=24, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def all_drafts(monkeypatch):
    """Every draft is verified, so that the number of steps does not depend on the clock."""
    monkeypatch.setattr("lazyahead.build.row_cost_of", lambda model: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("memory") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def llm_for(model, decode):
    return LLM(model, tokenizer=byte_level(), prefill=None, decode=decode)


def live(drafter, history):
    """Requests that came before: (namespace, prompt, answer)."""
    for namespace, prompt, answer in history:
        request = drafter.start(prompt, namespace)
        for token in answer:
            draft = request.propose(8)
            request.extend([token])
            request.feedback(draft, [token])
        request.stop(remember=True)


@given(st.lists(st.tuples(st.sampled_from("ab"), texts, texts), max_size=5), texts)
def test_without_memory_no_request_changes_the_drafts_of_another(history, prompt):
    drafter = drafter_for(Lookahead())
    live(drafter, history)
    assert drafter.start(prompt).propose(16) == drafter_for(Lookahead()).start(prompt).propose(16)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("ab"), texts, texts), max_size=4), texts)
def test_a_namespace_never_changes_the_drafts_of_another(tmp_path_factory, history, prompt):
    config = Lookahead(memory=str(tmp_path_factory.mktemp("log") / "answers.db"), namespace="a")
    other = replace(config, memory=str(tmp_path_factory.mktemp("log") / "answers.db"))
    together, alone = (drafter_for(decode, lambda: Owner("m", "t")) for decode in (config, other))
    live(together, history)
    live(alone, [entry for entry in history if entry[0] == "a"])
    assert together.start(prompt, "a").propose(16) == alone.start(prompt, "a").propose(16)
    reopened = (drafter_for(decode, lambda: Owner("m", "t")) for decode in (config, other))
    drafts = [drafter.start(prompt, "a").propose(16) for drafter in reopened]
    assert drafts[0] == drafts[1]


def test_an_answer_is_found_from_its_first_token_on_in_another_process_life(tmp_path):
    config = Lookahead(memory=str(tmp_path / "answers.db"), memory_prompt_tokens=16)
    prompt, answer = list(range(100, 150)), list(range(200, 240))
    live(drafter_for(config, lambda: Owner("m")), [("default", prompt, answer)])
    request = drafter_for(config, lambda: Owner("m")).start([7, 7, *prompt[-4:]])
    assert list(request.propose(8).token_ids) == answer[:8]
    with AnswerLog(config.memory) as log:
        assert list(log.answers()) == [prompt[-16:] + answer]


def bytes_in(folder):
    """All that stands on the disk, journals included."""
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


@pytest.mark.parametrize("num_kept", [0, 4])
@pytest.mark.parametrize("is_open", [True, False])
def test_no_more_of_a_prompt_stands_in_the_file_than_was_allowed(tmp_path, num_kept, is_open):
    config = Lookahead(memory=str(tmp_path / "answers.db"), memory_prompt_tokens=num_kept)
    drafter = drafter_for(config, lambda: Owner("m"))
    prompts = [[0x5EC0_0000 + 0x101 * n + turn for n in range(40)] for turn in (1, 2)]
    answer = [0x0A50_0000 + 0x101 * n for n in range(20)]
    request = drafter.start(prompts[0])
    request.extend(answer)
    request.extend(prompts[1], Source.PROMPT)  # the next turn of a conversation
    request.extend(answer)
    request.stop(remember=True)
    if not is_open:
        drafter.log.close()
    held = bytes_in(tmp_path)
    assert struct.pack("<20I", *answer) in held
    for turn, prompt in enumerate(prompts):
        found = [token for token in prompt if struct.pack("<I", token) in held]
        assert found == (prompt[40 - num_kept :] if turn == 1 else [])
    request = drafter_for(config, lambda: Owner("m")).start([*prompts[1], answer[0]])
    assert list(request.propose(8).token_ids)[:7] == answer[1:8]


def test_remembered_answers_save_steps_and_change_no_text(model, tmp_path):
    config = Lookahead(memory=str(tmp_path / "answers.db"), namespace="team")
    plain = llm_for(model, None).generate(PROMPT, sampling=SAMPLING)
    first, second = (llm_for(model, config).generate(PROMPT, sampling=SAMPLING) for _ in range(2))
    stranger = llm_for(model, replace(config, namespace="other")).generate(
        PROMPT, sampling=SAMPLING
    )
    assert plain.token_ids == first.token_ids == second.token_ids == stranger.token_ids
    assert second.stats.num_steps < first.stats.num_steps
    assert stranger.stats.num_steps == first.stats.num_steps


def test_without_memory_an_answer_takes_as_many_steps_every_time(model, tmp_path):
    llm = llm_for(model, Lookahead())
    steps = {llm.generate(PROMPT, sampling=SAMPLING).stats.num_steps for _ in range(3)}
    assert len(steps) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_was_cancelled_is_not_remembered(model, tmp_path):
    config = Lookahead(memory=str(tmp_path / "answers.db"))
    stream = llm_for(model, config).stream(PROMPT, sampling=SAMPLING)
    next(stream)
    stream.close()
    with AnswerLog(config.memory) as log:
        assert log.usage() == {}


def test_generate_inside_accelerate_remembers_in_the_same_file(model, tmp_path):
    config = Lookahead(memory=str(tmp_path / "answers.db"))
    completion = llm_for(model, config).generate(
        PROMPT, sampling=replace(SAMPLING, temperature=0.0)
    )
    ids = torch.tensor([llm_for(model, None).encode(PROMPT).token_ids])
    with accelerate(model, prefill=None, decode=config) as accelerated:
        output = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert output[0, ids.shape[1] :].tolist() == list(completion.token_ids)
    assert accelerated.stats[0].num_steps <= completion.stats.num_steps
    with AnswerLog(config.memory) as log:
        assert log.usage()["default"].num_answers == 2


def test_the_memory_of_another_model_or_tokenizer_is_refused_in_one_line(model, tmp_path):
    config = Lookahead(memory=str(tmp_path / "answers.db"))
    llm_for(model, config)
    other = AutoModelForCausalLM.from_config(model.config)
    for stranger, tokenizer in ((other, byte_level()), (model, byte_fallback())):
        with pytest.raises(MemoryFileError, match="belongs to") as error:
            LLM(stranger, tokenizer=tokenizer, prefill=None, decode=config)
        assert "\n" not in str(error.value)


def test_a_full_disk_costs_the_memory_and_not_the_answer(model, tmp_path, monkeypatch):
    llm = llm_for(model, Lookahead(memory=str(tmp_path / "answers.db")))

    def fail(*_):
        raise MemoryFileError("database or disk is full")

    monkeypatch.setattr(AnswerLog, "append", fail)
    with pytest.warns(RuntimeWarning, match="disk is full"):
        assert len(llm.generate(PROMPT, sampling=SAMPLING).token_ids) == 24
    assert len(llm.generate(PROMPT, sampling=SAMPLING).token_ids) == 24


def test_the_oldest_leave_above_the_capacity(tmp_path):
    config = Lookahead(memory=str(tmp_path / "answers.db"), capacity_bytes=73_728)  # 2048 tokens
    drafter = drafter_for(config, lambda: Owner("m"))
    answers = [list(range(100 * index, 100 * index + 100)) for index in range(40)]
    live(drafter, [("default", [], answer) for answer in answers])
    assert drafter.nbytes() <= 73_728
    with AnswerLog(config.memory) as log:
        held = list(log.answers())
    assert sum(map(len, held)) <= 2048
    assert held[-1] == answers[-1]
    reopened = drafter_for(config, lambda: Owner("m"))
    for answer in answers[-15:]:  # what is held is also found, in this life and in the next
        for life in (drafter, reopened):
            assert list(life.start(answer[:2]).propose(4).token_ids) == answer[2:6]


def test_a_model_is_known_in_every_dtype_and_apart_from_others(folder, model):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(model.config)
    assert owner_of(model, byte_level()) == owner_of(half, byte_level())
    assert owner_of(model).model != owner_of(other).model
    assert tokenizer_fingerprint(byte_level()) != tokenizer_fingerprint(byte_fallback())
    assert tokenizer_fingerprint(None) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("branch_length", 257),
        ("capacity_bytes", 73_727),
        ("capacity_bytes", -1),
        ("memory", ""),
        ("memory", 3),
        ("namespace", ""),
        ("memory_prompt_tokens", -1),
        ("memory_prompt_tokens", True),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_the_config(field, value):
    with pytest.raises(ConfigError, match=field):
        Lookahead(**{field: value})


def test_a_memory_without_room_is_refused(tmp_path):
    assert Lookahead(capacity_bytes=0).memory is None
    with pytest.raises(ConfigError, match="capacity_bytes"):
        Lookahead(memory="answers.db", capacity_bytes=0)


def test_a_damaged_memory_is_refused_in_one_line(model, tmp_path):
    path = tmp_path / "answers.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(MemoryFileError, match=r"answers\.db"):
        llm_for(model, Lookahead(memory=str(path)))
    sqlite3.connect(tmp_path / "other.db").executescript("CREATE TABLE t (x)").connection.close()
    with pytest.raises(MemoryFileError, match="no answers log"):
        llm_for(model, Lookahead(memory=str(tmp_path / "other.db")))
