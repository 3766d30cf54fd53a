"""Samples from files: every known format, and one clear line for what is none of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_level, chatty

from lazyahead.bench.data.encode import (
    FLOOR_TOKENS,
    encode_answer,
    encode_sample,
    truncate_middle,
    without_context,
)
from lazyahead.bench.data.longbench import CATEGORIES, TASKS, find_task
from lazyahead.bench.data.read import Samples, read_samples, take
from lazyahead.bench.data.sample import Sample
from lazyahead.errors import RequestError

OFFICIAL = {
    "input": "Who wrote {it}?",
    "context": "Passage 1: {Ada} wrote it.",
    "answers": ["Ada"],
    "all_classes": None,
    "dataset": "hotpotqa",
    "length": 7,
}
CHINESE = ("multifieldqa_zh", "dureader", "vcsum")


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def read(tmp_path: Path, *lines: dict[str, Any] | str, **options: Any) -> Samples:
    return read_samples(write(tmp_path / "mine.jsonl", *lines), **options)


def test_an_official_line_gets_its_template(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, OFFICIAL).samples
    assert sample.prompt.startswith("Answer the question based on the given passages. Only give me")
    assert "passages.\nPassage 1: {Ada} wrote it.\n\nAnswer the question" in sample.prompt
    assert sample.prompt.endswith("Question: Who wrote {it}?\nAnswer:")
    assert sample.question.startswith("Answer the question")
    assert "Passage 1" not in sample.question
    assert (sample.category, sample.max_new_tokens, sample.answers) == (
        "multi_doc_qa",
        32,
        ("Ada",),
    )
    assert sample.use_chat_template
    assert not sample.first_line_only


def test_a_plain_line_is_treated_as_its_dataset(tmp_path: Path) -> None:
    prompt = "Examples.\n\nQuestion: Old?\nType: A\nQuestion: New?\nType:"
    line = {"dataset": "trec", "prompt": prompt, "answers": ["B"], "all_classes": ["A", "B"]}
    (sample,) = read(tmp_path, line).samples
    assert (sample.prompt, sample.category, sample.metric) == (prompt, "few_shot", "classification")
    assert sample.question == "Question: New?\nType:"
    assert sample.first_line_only
    assert not sample.use_chat_template
    assert sample.all_classes == ("A", "B")


def test_habits_are_longbenchs() -> None:
    assert {task.category for task in TASKS.values()} == set(CATEGORIES)
    bare = {name for name, task in TASKS.items() if not task.use_chat_template}
    assert bare == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    first = {name for name, task in TASKS.items() if task.first_line_only}
    assert first == {"trec", "triviaqa", "samsum", "lsht"}
    assert find_task("qasper_e") is TASKS["qasper"]
    assert all("{context}" in task.template for task in TASKS.values())


def test_babilong_knows_its_labels(tmp_path: Path) -> None:
    lines = [
        {"input": "Mary went to the garden.", "question": "Where is Mary? ", "target": place}
        for place in ("garden", "kitchen", "garden")
    ]
    first, *_ = read(tmp_path, *lines, lines="odd").samples
    assert first.all_classes == ("garden", "kitchen")
    assert first.answers == ("garden",)
    assert first.prompt.endswith("Question: Where is Mary?\nAnswer:")
    assert first.category == "mine"


def test_spec_bench_asks_first_turns(tmp_path: Path) -> None:
    lines = [
        {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 2, "category": "rag", "turns": ["Read."]},
    ]
    first, second = read(tmp_path, *lines).samples
    assert (first.prompt, first.category, first.answers) == ("Write.", "mt_bench", ())
    assert second.category == "rag"


def test_anything_else_needs_only_a_prompt(tmp_path: Path) -> None:
    text = "A page.\n\nWhat is it?"
    (sample,) = read(tmp_path, {"prompt": text, "answers": "a page", "max_new_tokens": 5}).samples
    assert (sample.answers, sample.max_new_tokens, sample.question) == (
        ("a page",),
        5,
        "What is it?",
    )
    assert (sample.dataset, sample.category) == ("mine", "mine")


def test_even_and_odd_lines_are_all_lines(tmp_path: Path) -> None:
    lines = [{"prompt": str(number), "answers": ["x"]} for number in range(1, 6)]
    parts = {
        part: [sample.prompt for sample in read(tmp_path, *lines, lines=part).samples]
        for part in ("all", "odd", "even")
    }
    assert parts == {"all": list("12345"), "odd": list("135"), "even": list("24")}


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "b", "answers": ["x"]})
    write(tmp_path / "a.jsonl", *[{"prompt": "a", "answers": ["x"]}] * 3)
    write(tmp_path / "notes.txt", "not data")
    samples = read_samples(tmp_path).samples
    assert [sample.dataset for sample in samples] == ["a", "a", "a", "b"]
    assert [sample.dataset for sample in take(samples, 1)] == ["a", "b"]


@pytest.mark.parametrize("dataset", CHINESE)
def test_tasks_that_need_chinese_words_are_left_out_by_name(tmp_path: Path, dataset: str) -> None:
    write(tmp_path / f"{dataset}.jsonl", {**OFFICIAL, "dataset": dataset})
    with pytest.raises(RequestError, match=f"{dataset}.*Chinese"):
        read_samples(tmp_path / f"{dataset}.jsonl")
    write(tmp_path / "hotpotqa.jsonl", OFFICIAL)
    found = read_samples(tmp_path)
    assert [sample.dataset for sample in found.samples] == ["hotpotqa"]
    assert len(found.left_out) == 1
    assert dataset in found.left_out[0]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"text": "x"}, "line 2: needs `prompt` and `answers`.*has text"),
        ({"prompt": 7, "answers": ["x"]}, "line 2: `prompt` must be some text, got 7"),
        ({"prompt": " ", "answers": ["x"]}, "line 2: `prompt`"),
        ({"prompt": "x", "answers": [7]}, "line 2: `answers` must be a list of texts"),
        ({"prompt": "x", "answers": []}, "line 2: `answers` must be at least one"),
        ({"prompt": "x", "answers": ["y"], "max_new_tokens": 0}, "`max_new_tokens`.*at least 1"),
        ({**OFFICIAL, "context": None}, "line 2: `context` must be some text, got None"),
        ({**OFFICIAL, "dataset": "squad"}, "line 2: `dataset`.*squad"),
        ({**OFFICIAL, "dataset": "trec"}, "line 2: `all_classes`"),
        ({"input": "x", "question": "?", "target": 3}, "line 2: `target`"),
        ({"turns": [], "category": "x"}, "line 2: `turns`"),
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, line: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        read(tmp_path, {"prompt": "fine", "answers": ["x"]}, line)
    assert "mine.jsonl" in str(caught.value)


def test_a_path_without_samples_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(RequestError, match=str(path)):
            read_samples(path)
    with pytest.raises(RequestError, match="no even lines"):
        read(tmp_path, {"prompt": "x", "answers": ["y"]}, lines="even")
    with pytest.raises(RequestError, match="lines must be one of"):
        read(tmp_path, {"prompt": "x", "answers": ["y"]}, lines="third")


def sample_of(prompt: str, **fields: Any) -> Sample:
    return Sample(dataset="d", category="c", prompt=prompt, answers=("right",), **fields)


def test_the_middle_is_cut() -> None:
    tokenizer = byte_level()
    text = "".join(chr(65 + index % 26) for index in range(100))
    assert truncate_middle(tokenizer, text, 100) == text
    assert truncate_middle(tokenizer, text, 21) == text[:10] + text[-10:]


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_question_is_found_among_the_tokens(is_chat: bool) -> None:
    tokenizer = chatty(byte_level()) if is_chat else byte_level()
    sample = sample_of("What? " * 20 + "\n\nWhat? Say.\nAnswer:", question="What? Say.\nAnswer:")
    prompt = encode_sample(tokenizer, sample)
    assert prompt.question is not None
    start, end = prompt.question
    assert tokenizer.decode(prompt.token_ids[start:end]).strip() == "What? Say.\nAnswer:"
    assert ("<|user|>" in tokenizer.decode(prompt.token_ids)) == is_chat


def test_a_task_can_refuse_the_chat_template() -> None:
    tokenizer = chatty(byte_level())
    prompt = encode_sample(tokenizer, sample_of("abc", use_chat_template=False))
    assert tokenizer.decode(prompt.token_ids) == "abc"
    assert prompt.question is None


def test_an_answer_in_mid_line_begins_with_a_space() -> None:
    tokenizer = byte_level()
    texts = {
        prompt: tokenizer.decode(encode_answer(tokenizer, sample_of(prompt), 100))
        for prompt in ("Answer:", "Next line:\n")
    }
    assert texts == {"Answer:": " right", "Next line:\n": "right"}
    chat = chatty(tokenizer)
    assert chat.decode(encode_answer(chat, sample_of("Answer:"), 3)) == "rig"


def test_the_floor_is_the_end_of_the_prompt() -> None:
    tokenizer = byte_level()  # BOS is token 0
    long = [5, *range(1, 500)]
    assert without_context(tokenizer, long) == long[-FLOOR_TOKENS:]
    assert without_context(tokenizer, [0, *long]) == [0, *long[-FLOOR_TOKENS:]]
    assert without_context(tokenizer, [0, 7, 8]) == [0, 7, 8]
