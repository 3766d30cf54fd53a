"""Drafts for engines of others: texts are recognised without ids, whatever the batch does."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyahead.draft.answers import AnswerLog
from lazyahead.draft.proposer import ChainProposer
from lazyahead.draft.trie_drafter import TrieDrafter
from lazyahead.errors import ConfigError, MemoryFileError
from lazyahead.integrations.vllm import TrieProposer

PHRASE = [11, 12, 13, 14, 15, 16, 17, 18]


def expected_of(prompt: list[int], steps: list[list[int]], n: int) -> list[list[int]]:
    """What the trie drafter proposes for one text after each step, with nothing in between."""
    request = TrieDrafter(16, "single", capacity_bytes=0).start([*prompt, *steps[0]])
    found = []
    for new in [[], *steps[1:]]:
        if new:
            request.extend(new)
            request.feedback(draft, new)  # noqa: F821
        draft = request.propose(n)
        found.append(list(draft.token_ids))
    return found


def test_a_repeated_phrase_is_proposed() -> None:
    proposer = ChainProposer()
    assert proposer.propose([1, *PHRASE, 2, 3, *PHRASE[:3]], 4) == PHRASE[3:7]
    assert proposer.propose([1, *PHRASE, 2, 3, *PHRASE[:5]], 4) == [*PHRASE[5:], 2]
    assert proposer.num_running == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_a_text_is_drafted_as_if_it_were_alone(seed: int) -> None:
    rng = random.Random(seed)
    proposer = ChainProposer(min_prob=0.0)
    prompts = [[rng.randrange(6) for _ in range(rng.randrange(20, 40))] for _ in range(3)]
    plans = [
        [[rng.randrange(6) for _ in range(rng.randrange(1, 4))] for _ in range(6)] for _ in prompts
    ]
    found: list[list[list[int]]] = [[] for _ in prompts]
    texts = [list(prompt) for prompt in prompts]
    for step in range(6):
        for place in rng.sample(range(3), 3):
            texts[place] += plans[place][step]
            found[place].append(proposer.propose(texts[place], 5, namespace=str(place)))
    assert found == [expected_of(*both, 5) for both in zip(prompts, plans, strict=True)]


def test_equal_texts_share_and_part() -> None:
    proposer = ChainProposer()
    text = [1, *PHRASE, 2, *PHRASE[:2]]
    assert proposer.propose(text, 2) == proposer.propose(text, 2) == PHRASE[2:4]
    assert proposer.num_running == 1
    proposer.propose([*text, 13], 2)
    proposer.propose([*text, 99], 2)
    assert proposer.num_running == 2


def test_texts_that_are_no_longer_seen_end() -> None:
    proposer = ChainProposer(idle_rounds=4)
    for start in range(20):
        proposer.propose([start, 1, 2, 3], 2)
    assert proposer.num_running == 20
    text = [7, 7, 7]
    for _ in range(400):
        text.append(8)
        proposer.propose(text, 2)
    assert proposer.num_running == 1


def test_nothing_passes_between_texts_unless_asked_for() -> None:
    proposer = ChainProposer()
    proposer.propose([1, *PHRASE], 4)
    proposer.finish([1, *PHRASE])
    assert proposer.propose([5, *PHRASE[:4]], 4) == []


def test_answers_are_remembered_by_namespace(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.sqlite")
    first = ChainProposer(memory=path, min_prob=0.0)
    first.propose([1, 2, 3], 4, namespace="a")
    text = [1, 2, 3]
    for token in PHRASE:
        text.append(token)
        first.propose(text, 4, namespace="a")
    first.finish(text, namespace="a")
    first.close()
    later = ChainProposer(memory=path, min_prob=0.0)
    assert later.propose([9, *PHRASE[:4]], 4, namespace="a") == PHRASE[4:]
    assert later.propose([9, *PHRASE[:4]], 4, namespace="b") == []
    later.close()


def test_settings_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_prob"):
        ChainProposer(min_prob=2.0)
    with pytest.raises(ConfigError, match="branch_length"):
        ChainProposer(branch_length=0)
    with pytest.raises(ConfigError, match="idle_rounds"):
        ChainProposer(idle_rounds=0)
    (tmp_path / "no.sqlite").write_text("no database at all" * 100)
    with pytest.raises(MemoryFileError):
        ChainProposer(memory=str(tmp_path / "no.sqlite"))


# --- vLLM -----------------------------------------------------------------------------------------


def config(num: int = 4, context: int = 64, rank: int = 0, **settings: Any) -> Any:
    """The parts of a VllmConfig (0.33.0) that a proposer may read."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=num),
        model_config=SimpleNamespace(max_model_len=context, get_vocab_size=lambda: 100),
        parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=2),
        additional_config={"lazyahead": settings},
    )


class Batch:
    """Rows as vLLM's InputBatch keeps them: those of requests that left are filled by the last."""

    def __init__(self, rows: int = 8, context: int = 64) -> None:
        self.token_ids_cpu: npt.NDArray[np.int32] = np.zeros((rows, context), np.int32)
        self.num_tokens_no_spec: npt.NDArray[np.int32] = np.zeros(rows, np.int32)
        self.names: list[str] = []

    def join(self, name: str, prompt: list[int]) -> None:
        row = len(self.names)
        self.names.append(name)
        self.token_ids_cpu[row, : len(prompt)] = prompt
        self.num_tokens_no_spec[row] = len(prompt)

    def leave(self, name: str) -> None:
        row, last = self.names.index(name), len(self.names) - 1
        self.token_ids_cpu[row] = self.token_ids_cpu[last]
        self.num_tokens_no_spec[row] = self.num_tokens_no_spec[last]
        self.names[row] = self.names[last]
        self.names.pop()

    def sample(self, new: dict[str, list[int]]) -> list[list[int]]:
        """Writes sampled tokens; rows without any still read their prompt."""
        sampled = [new.get(name, []) for name in self.names]
        for row, tokens in enumerate(sampled):
            start = self.num_tokens_no_spec[row]
            self.token_ids_cpu[row, start : start + len(tokens)] = tokens
            self.num_tokens_no_spec[row] += len(tokens)
        return sampled


def test_vllm_batches_may_join_leave_and_move_rows() -> None:
    proposer, batch = TrieProposer(config(context=128, min_prob=0.0)), Batch(context=128)
    rng = random.Random(5)
    plans = {
        name: ([rng.randrange(5) for _ in range(30)], [[rng.randrange(5)] for _ in range(8)])
        for name in "abcd"
    }
    found: dict[str, list[list[int]]] = {name: [] for name in plans}
    drafter, requests, last = TrieDrafter(16, "single", capacity_bytes=0), {}, {}
    joins = {0: "ab", 2: "c", 3: "d"}
    for step in range(12):
        for name in joins.get(step, ""):
            batch.join(name, plans[name][0])
        new = {}
        for name in batch.names:
            done = len(found[name])
            if name != "c" or step != 4:  # a row without tokens in one step
                new[name] = plans[name][1][done]
        sampled = batch.sample(new)
        drafts = proposer.propose(
            sampled, batch.num_tokens_no_spec, batch.token_ids_cpu, slot_mappings=None
        )
        assert len(drafts) == len(batch.names)
        for name, draft, tokens in zip(list(batch.names), drafts, sampled, strict=True):
            assert tokens or draft == []
            if tokens:
                found[name].append(draft)
                if name not in requests:
                    requests[name] = drafter.start(plans[name][0])
                    requests[name].extend(tokens)
                else:
                    requests[name].extend(tokens)
                    requests[name].feedback(last[name], tokens)
                last[name] = requests[name].propose(4)
                assert draft == list(last[name].token_ids)
            if len(found[name]) == 8:
                batch.leave(name)
    assert any(any(drafts) for drafts in found.values())


def test_vllm_drafts_stay_inside_context_and_vocabulary() -> None:
    proposer, batch = TrieProposer(config(context=20)), Batch(context=20)
    batch.join("a", [1, *PHRASE, 2, *PHRASE[:6]])
    assert len(batch.names) == 1
    drafts = proposer.propose(
        batch.sample({"a": [17]}), batch.num_tokens_no_spec, batch.token_ids_cpu
    )
    assert drafts == [[18, 2]]  # 17 tokens of 20, and the model adds one itself
    full = batch.sample({"a": [18, 2, 11]})
    assert proposer.propose(full, batch.num_tokens_no_spec, batch.token_ids_cpu) == [[]]
    proposer.proposer.remember([50, 51, 52])
    other = TrieProposer(config(capacity_bytes=1 << 20, min_prob=0.0))
    other.proposer.remember([50, 51, 52, 53, 150, 54])
    batch = Batch()
    batch.join("b", [50, 51])
    drafts = other.propose(batch.sample({"b": [52]}), batch.num_tokens_no_spec, batch.token_ids_cpu)
    assert drafts == [[53]]


def test_one_rank_of_vllm_writes_the_memory(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.sqlite")
    for rank in (0, 1):
        proposer = TrieProposer(config(rank=rank, memory=path, namespace="team"))
        batch = Batch()
        batch.join("a", [1, 2, 3])
        for token in PHRASE[:3]:
            sampled = batch.sample({"a": [token]})
            proposer.propose(sampled, batch.num_tokens_no_spec, batch.token_ids_cpu)
        proposer.proposer.close()
    with AnswerLog(path) as log:
        assert list(log.answers("team")) == [PHRASE[:3]]


def test_vllm_settings_that_do_not_exist_are_named() -> None:
    with pytest.raises(ConfigError, match="no setting 'memroy'; it takes memory"):
        TrieProposer(config(memroy="x"))
    with pytest.raises(ConfigError, match="namespace"):
        TrieProposer(config(namespace=""))


def test_the_proposer_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, lazyahead.integrations.vllm; "
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_llama_cpp_example_has_the_call_of_a_draft_model() -> None:
    namespace: dict[str, Any] = {"__name__": "example"}
    source = Path(__file__).parent.parent / "examples" / "llama_cpp_draft.py"
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), namespace)
    draft: Callable[..., Any] = namespace["TrieDraftModel"](num_pred_tokens=3)
    found = draft(np.array([1, *PHRASE, 2, *PHRASE[:3]], np.intc))
    assert found.dtype == np.intc
    assert found.tolist() == PHRASE[3:6]
    assert draft(np.array([3], np.intc)).tolist() == []
