"""Tensor parallelism: two processes keep the same tokens and write the same text as one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import families
import pytest
import torch
from support import CALM, FAST, LAZY, prompts
from tiny import COMMAND, byte_level

from lazyahead import LLM, LazyPrefill, Lookahead, Sampling
from lazyahead.cache.session import Session
from lazyahead.errors import (
    ConfigError,
    RankError,
    SessionFileError,
    UnsupportedModelError,
)
from lazyahead.hf.scores import reduce_heads
from lazyahead.parallel.group import Group

MODELS = ("llama", "qwen2", "gemma3")
WAYS: dict[str, tuple[LazyPrefill | None, Lookahead | None]] = {
    "plain": (None, None),
    "lazy": (LAZY, None),
    "drafted": (CALM, Lookahead()),
    "fast": (FAST, Lookahead()),
}
GREEDY = Sampling(max_new_tokens=10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models on disk."""
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name)
        build = families.FAMILIES[name]
        assert isinstance(build, partial)
        build(vocab_size=len(byte_level())).save_pretrained(found[name])
        byte_level().save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """One group for all: a process takes seconds to start."""
    started = Group.start(2)
    yield started
    started.close()


def kept(session: Session) -> list[list[int]]:
    """Positions that each layer holds."""
    return [kv.positions.tolist() for kv in session.kv]


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_keep_and_write_what_one_does(
    model: str, folders: dict[str, Path], group: Group
) -> None:
    text = prompts(60)[0]
    for prefill, decode in WAYS.values():
        one = LLM(folders[model], prefill=prefill, decode=decode)
        two = LLM(folders[model], prefill=prefill, decode=decode, tp=group)
        sessions = one.session(), two.session()
        expected = one.generate(text, session=sessions[0], sampling=GREEDY)
        answer = two.generate(text, session=sessions[1], sampling=GREEDY)
        assert answer.token_ids == expected.token_ids
        assert kept(sessions[1]) == kept(sessions[0])
        assert sessions[1].num_revived == sessions[0].num_revived
        heads = one.model.config.num_key_value_heads
        assert sessions[1].kv[0].keys.shape[1] == heads // 2
        two.close()


def test_turns_batches_and_seeds_are_as_with_one_rank(
    folders: dict[str, Path], group: Group
) -> None:
    first, second, third = prompts(50, 30, 70)
    seeded = Sampling(max_new_tokens=8, temperature=0.9, top_p=0.9, seed=3)
    texts = []
    for tp in (1, group):
        llm = LLM(folders["llama"], prefill=CALM, decode=Lookahead(), tp=tp)
        session = llm.session()
        turns = [llm.generate(first, session=session, sampling=GREEDY).token_ids]
        longer = [*session.history, *second]
        turns.append(llm.generate(longer, session=session, sampling=GREEDY).token_ids)
        turns.append(llm.generate(first[:20] + third, session=session, sampling=GREEDY).token_ids)
        together = llm.generate([first, second, third], sampling=seeded)
        texts.append((turns, [answer.token_ids for answer in together], kept(session)))
        llm.close()
    assert texts[0] == texts[1]


def test_ranks_share_prompts_alike(folders: dict[str, Path], group: Group) -> None:
    document = prompts(300)[0]
    asked = [[*document, *more] for more in prompts(20, 30, 25, seed=4)]
    found = []
    for tp in (1, group):
        llm = LLM(folders["llama"], prefill=LAZY, prefix_cache_bytes=1 << 20, tp=tp)
        answers = [llm.generate(text, sampling=GREEDY) for text in asked[:2]]
        ahead = llm.read_ahead(document)
        llm.add_prefix(ahead)
        answers.append(llm.generate(asked[2], sampling=GREEDY))
        found.append([(answer.token_ids, answer.stats.reused_tokens) for answer in answers])
        llm.close()
    assert found[0] == found[1]
    assert found[0][1][1] == 256


def test_a_cancelled_answer_leaves_the_ranks_in_step(
    folders: dict[str, Path], group: Group
) -> None:
    text, other = prompts(60, 40)

    def interrupt(done: float) -> None:
        raise KeyboardInterrupt

    answers = []
    for tp in (1, group):
        llm = LLM(folders["llama"], prefill=LAZY, tp=tp)
        session = llm.session()
        stream = llm.stream(text, session=session, sampling=GREEDY)
        next(stream)
        stream.cancel()
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream(other, sampling=GREEDY, on_progress=interrupt))
        answer = llm.generate(text, session=session, sampling=GREEDY)
        answers.append((answer.token_ids, kept(session)))
        llm.close()
    assert answers[0] == answers[1]


def test_a_memory_belongs_to_the_model_however_many_ranks(
    folders: dict[str, Path], group: Group, tmp_path: Path
) -> None:
    decode = Lookahead(memory=str(tmp_path / "answers.sqlite"))
    text = prompts(30)[0]
    first = LLM(folders["qwen2"], prefill=None, decode=decode)
    expected = first.generate(text, sampling=GREEDY)
    del first
    llm = LLM(folders["qwen2"], prefill=None, decode=decode, tp=group)
    answer = llm.generate(text, sampling=GREEDY)
    llm.close()
    assert answer.token_ids == expected.token_ids


def test_what_cannot_be_shared_out_is_refused_by_name(
    folders: dict[str, Path], group: Group, tmp_path: Path
) -> None:
    odd = families.build("llama", num_key_value_heads=1, vocab_size=len(byte_level()))
    odd.save_pretrained(tmp_path / "odd")
    byte_level().save_pretrained(tmp_path / "odd")
    with pytest.raises(UnsupportedModelError, match=r"num_key_value_heads 1.*tp=2"):
        LLM(tmp_path / "odd", tp=group)
    unplanned = families.FAMILIES["gpt2"]()
    unplanned.save_pretrained(tmp_path / "unplanned")
    with pytest.raises(UnsupportedModelError, match="no tensor-parallel plan"):
        LLM(tmp_path / "unplanned", tp=group)
    with pytest.raises(ConfigError, match="give a folder"):
        LLM(odd, tp=group)
    with pytest.raises(ConfigError, match="tp must be"):
        LLM(tmp_path / "odd", tp=0)
    with pytest.raises(ConfigError, match="is open in this process"):
        LLM(folders["llama"], tp=2)
    llm = LLM(folders["llama"], tp=group)
    with pytest.raises(SessionFileError, match="tp=2"):
        llm.save_session(llm.session(), tmp_path / "session")
    llm.close()


def test_a_rank_that_dies_ends_the_group_with_an_error(
    folders: dict[str, Path], group: Group
) -> None:
    """Last of those that share the group."""
    llm = LLM(folders["llama"], prefill=LAZY, tp=group)
    stream = llm.stream(prompts(60)[0], sampling=Sampling(max_new_tokens=200))
    next(stream)
    (process,) = group._processes
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 ended with status -9"):
        list(stream)
    with pytest.raises(RankError, match="load the model again"):
        llm.generate(prompts(20)[0], sampling=GREEDY)
    assert not torch.distributed.is_initialized()
    llm.close()


def test_the_command_shares_a_model_out(folders: dict[str, Path]) -> None:
    text = "The code of the red door is 417."
    arguments = ["generate", text, "--model", str(folders["llama"]), "--tp", "2"]
    arguments += ["--prefill", "off", "--max-new-tokens", "6", "--temperature", "0"]
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=True, timeout=100
    )
    one = LLM(folders["llama"], prefill=None)
    expected = one.generate(text, sampling=Sampling(max_new_tokens=6, temperature=0)).text
    assert done.stdout.strip() == expected.strip() != ""
    assert "Traceback" not in done.stderr


def test_torchrun_starts_the_ranks_as_well(folders: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom lazyahead import LLM, Sampling\n"
        f"llm = LLM({str(folders['llama'])!r}, prefill=None, tp=2)\n"
        "answer = llm.generate([5, 6, 7], sampling=Sampling(max_new_tokens=4))\n"
        "print('rank', os.environ['RANK'], *answer.token_ids)\nllm.close()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank")]
    alone = LLM(folders["llama"], prefill=None)
    expected = alone.generate([5, 6, 7], sampling=Sampling(max_new_tokens=4)).token_ids
    assert lines == [f"rank 0 {' '.join(map(str, expected))}"]


def test_weights_on_several_devices_are_refused_by_name() -> None:
    model = families.FAMILIES["llama"]()
    model.model.layers[3].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"several devices \(cpu, meta\)"):
        LLM(model)


def test_one_rank_reduces_heads_by_itself() -> None:
    weights = torch.rand(4, 3, 7)
    torch.testing.assert_close(reduce_heads(weights, "mean"), weights.mean(0))
    assert torch.equal(reduce_heads(weights, "max"), weights.amax(0))
