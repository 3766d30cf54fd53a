"""Scores as LongBench counts them. Expected ROUGE-L values come from the package `rouge` 1.0.1."""

from typing import Any

import pytest

from lazyahead.bench.data.metrics import score
from lazyahead.bench.data.rouge import rouge_l
from lazyahead.bench.data.sample import Sample

CLASSES = ("Date", "Other date", "Animal", "Price")


def sample_of(metric: str, *answers: str, **fields: Any) -> Sample:
    return Sample(dataset="d", category="c", prompt="p", answers=answers, metric=metric, **fields)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The University of Toronto.", 1.0),
        ("University", 0.5),
        ("university, in Toronto", 2 / 3),
        ("", 0.0),
        ("Oxford", 0.0),
    ],
)
def test_question_answering_counts_words(prediction: str, expected: float) -> None:
    sample = sample_of("qa_f1", "University of Toronto")
    assert score(sample, prediction) == pytest.approx(expected)


def test_the_best_answer_counts() -> None:
    sample = sample_of("qa_f1", "University of Toronto", "UT")
    assert score(sample, "UT") == 1.0


def test_only_the_first_line_counts_where_the_task_says_so() -> None:
    text = "\n\n55\nQuestion: more"
    assert score(sample_of("qa_f1", "55", first_line_only=True), text) == 1.0
    assert score(sample_of("qa_f1", "55"), text) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Type: Animal", "Animal", 1.0),
        ("Animal or Price", "Animal", 0.5),
        ("an Other date", "Other date", 1.0),
        ("other date", "Other date", 0.0),  # case counts
        ("Date", "Animal", 0.0),
        ("", "Animal", 0.0),
    ],
)
def test_classes_are_named(prediction: str, answer: str, expected: float) -> None:
    sample = sample_of("classification", answer, all_classes=CLASSES)
    assert score(sample, prediction) == expected


def test_a_class_inside_the_right_one_is_forgiven() -> None:
    sample = sample_of("classification", "Other Date", all_classes=("Date", "Other Date"))
    assert score(sample, "Other Date") == 1.0
    crowded = sample_of("classification", "ab c", all_classes=("ab", "c", "b", "ab c"))
    assert score(crowded, "ab c") == 0.5  # its loop passes over `c`


def test_numbers_are_shared_out() -> None:
    assert score(sample_of("retrieval", "Paragraph 19"), "Paragraph 19, not 2") == 0.5
    assert score(sample_of("retrieval", "段落3"), "段落3") == 1.0
    assert score(sample_of("retrieval", "Paragraph 19"), "none") == 0.0
    assert score(sample_of("count", "7"), " 7") == 1.0
    assert score(sample_of("count", "7"), "7 of 70") == 0.5


def test_code_is_the_first_line_that_is_no_comment() -> None:
    sample = sample_of("code_similarity", "return x + 1")
    assert score(sample, "\n```python\n# a comment\nreturn x + 1\nelse") == 1.0
    assert score(sample, "return x + 2") == pytest.approx(0.92)
    assert score(sample, "# nothing else") == 0.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("kitchen", 1.0),
        ("Mary is in the Kitchen. Not the garden", 1.0),
        ("kitchen or garden", 0.0),
        ("garden", 0.0),
        ("the office kitchen", 1.0),
        ("", 0.0),
    ],
)
def test_one_label_alone(prediction: str, expected: float) -> None:
    sample = sample_of(
        "only_label",
        "kitchen",
        all_classes=("kitchen", "garden", "office"),
        question="Where was Mary before the office?",
    )
    assert score(sample, prediction) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat on the mat", "the cat was on the mat", 0.7999999950000002),
        ("A b c. D e. a", "a B c. e D. A b", 0.7692307642603551),
        ("one two three four. five", "four three two one", 0.22222221728395072),
        ("", "something", 0.0),
        ("...", "something", 0.0),
        (" . x", "x y", 0.4999999950000001),
    ],
)
def test_rouge_is_the_package_longbench_uses(prediction: str, answer: str, expected: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-9)
