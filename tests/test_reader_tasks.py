"""The task generator: what it promises about determinism, splits, answers and lengths."""

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lazyahead.reader import CATEGORIES, WORKLOADS, Sample, format_prompt, reader_path, samples
from lazyahead.reader.world import ATTRIBUTES, HELDOUT_STATEMENTS, STATEMENTS, split_of

EVERYTHING = (*CATEGORIES, *WORKLOADS)


def facts_of(sample: Sample) -> list[str]:
    """What an answer says beyond its question: numbers and words that a reader must find in the
    document."""
    asked = set(re.findall(r"\w+", sample.question))
    return [word for word in re.findall(r"\w+", sample.answer) if word not in asked]


def names_in(text: str) -> set[str]:
    """Invented names: capitalized words that are followed by another capital, or end a sentence of
    ours."""
    return set(re.findall(r"(?:of|to|[Ff]or|In) ([A-Z][a-z]+)\b", text))


@pytest.mark.parametrize("category", EVERYTHING)
def test_a_seed_names_its_samples(category: str) -> None:
    assert samples(category, 600, seed=3, n=3) == samples(category, 600, seed=3, n=3)
    assert samples(category, 600, seed=3, n=2) == samples(category, 600, seed=3, n=3)[:2]
    assert samples(category, 600, seed=3) != samples(category, 600, seed=4)


@pytest.mark.parametrize("category", EVERYTHING)
@pytest.mark.parametrize("heldout", [False, True])
def test_the_document_holds_what_the_answer_says(category: str, heldout: bool) -> None:
    for sample in samples(category, 1000, seed=1, n=5, heldout_templates=heldout):
        words = set(re.findall(r"\w+", sample.document))
        template = {"The", "the", "of", "is", "result"}
        assert [word for word in facts_of(sample) if word not in words | template] == []
        assert sample.answer not in sample.question


@given(st.sampled_from(["single_doc_qa", "multi_doc_qa", "synthetic"]), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_evaluation_names_are_never_training_names(category: str, seed: int) -> None:
    asked = {split: samples(category, 400, seed, 3, split=split) for split in ("train", "eval")}
    for split, found in asked.items():
        names = set().union(*(names_in(sample.question) for sample in found))
        assert names
        assert {split_of(name) for name in names} == {split}


@pytest.mark.parametrize("category", EVERYTHING)
@pytest.mark.parametrize("length", [512, 4096, 16384])
def test_prompts_have_the_asked_length(category: str, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reader_path())
    for sample in samples(category, length, seed=2, n=2):
        assert len(tokenizer(sample.prompt, truncation=False).input_ids) == pytest.approx(
            length, rel=0.15
        )


def test_heldout_statements_appear_only_when_asked_for() -> None:
    def forms(heldout: bool) -> str:
        drawn = samples("single_doc_qa", 2000, seed=0, n=5, heldout_templates=heldout)
        return " ".join(sample.document for sample in drawn)

    assert not set(STATEMENTS) & set(HELDOUT_STATEMENTS)
    assert "As for" in forms(True)
    assert "As for" not in forms(False)
    assert "Note that" not in forms(False)


def test_answers_end_with_their_fact() -> None:
    for sample in samples("single_doc_qa", 600, n=20):
        value = sample.answer.rpartition(" is ")[2].rstrip(".")
        assert value in sample.document
        assert value not in sample.question


def test_other_facts_compete_for_the_answer() -> None:
    for sample in samples("single_doc_qa", 4000, n=5):
        attribute = next(name for name in ATTRIBUTES if name in sample.question)
        assert sample.document.count(attribute) > 1


def test_workloads_have_their_shapes() -> None:
    for sample in samples("rag", 4096, n=5):
        assert sample.answer.count(". ") == 4
        assert all(sentence in sample.document for sentence in sample.answer.split(". "))
    chats = samples("chat", 1000, n=4)
    assert all(len(chat.history) == 1 for chat in chats)
    assert all(chat.question not in chat.document for chat in chats)
    assert {chat.history[0][1] == "I have read the document." for chat in chats} == {True, False}


def test_a_prompt_is_the_chat_template_of_its_messages() -> None:
    tokenizer = AutoTokenizer.from_pretrained(reader_path())
    (sample,) = samples("chat", 600)
    ((asked, answered),) = sample.history
    first = f"{sample.document}\n\n{asked}"
    for opening in (first, f"Document: {sample.document}\n\nQuestion: {asked}"):
        messages = [
            {"role": "user", "content": opening},
            {"role": "assistant", "content": answered},
            {"role": "user", "content": sample.question},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == sample.prompt


def test_a_prompt_is_made_of_document_and_question() -> None:
    (sample,) = samples("qa", 600)
    assert sample.prompt == format_prompt(sample.document, sample.question)
    assert sample.prompt == f"Document: {sample.document}\n\nQuestion: {sample.question}\nAnswer:"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown category 'poems'"):
        samples("poems")
    with pytest.raises(ValueError, match="length is 100"):
        samples("qa", 100)


def test_generating_needs_no_torch() -> None:
    code = "import sys, lazyahead.reader as r; r.samples('code', 512); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
