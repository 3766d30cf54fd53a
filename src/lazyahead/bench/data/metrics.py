"""LongBench's scores (its metrics.py and eval.py), and BABILong's; all between 0 and 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from importlib import import_module

from lazyahead.bench.data.rouge import rouge_l
from lazyahead.bench.data.sample import Sample
from lazyahead.errors import ConfigError

Metric = Callable[[str, str, Sample], float]
"""Of a prediction and one right answer."""


def score(sample: Sample, prediction: str) -> float:
    """The best over the sample's answers. Raises ConfigError where a package is missing."""
    if sample.first_line_only:
        prediction = prediction.lstrip("\n").partition("\n")[0]
    metric = METRICS[sample.metric]
    return max((metric(prediction, answer, sample) for answer in sample.answers), default=0.0)


def qa_f1(prediction: str, answer: str, _: Sample) -> float:
    """F1 of the words, lower case, without punctuation and articles."""
    found, wanted = _words(prediction), _words(answer)
    num_same = sum((Counter(found) & Counter(wanted)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(found), num_same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def classification(prediction: str, answer: str, sample: Sample) -> float:
    """One over the number of classes named, where the right one is among them."""
    named = [name for name in sample.all_classes if name in prediction]
    for name in named:  # passes over the one behind each that is removed, as LongBench's loop does
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, _: Sample) -> float:
    """Share of the numbers named that are the right paragraph's."""
    wanted = re.findall(r"(?:Paragraph |段落)(\d+)", answer)
    return _share(prediction, wanted[0]) if wanted else 0.0


def count(prediction: str, answer: str, _: Sample) -> float:
    """Share of the numbers named that are the right one."""
    return _share(prediction, answer)


def code_similarity(prediction: str, answer: str, _: Sample) -> float:
    """Edit similarity of the first line that is neither comment nor fence, in hundredths."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not answer:
        return 0.0
    try:
        ratio = import_module("rapidfuzz.fuzz").ratio
    except ImportError:
        raise ConfigError(
            "code is scored with rapidfuzz; pip install 'lazyahead[metrics]'"
        ) from None
    return float(round(ratio(line, answer))) / 100


def only_label(prediction: str, answer: str, sample: Sample) -> float:
    """BABILong: 1 where the first sentence names the right label alone, the question's aside."""
    sentence = prediction.lower().partition(".")[0].partition("question")[0]
    labels = {name.lower() for name in sample.all_classes}
    asked = {name for name in labels if name in sample.question.lower()}
    named = {name for name in labels if name in sentence} - asked
    return float(named == {part.strip() for part in answer.lower().split(",")})


def rouge(prediction: str, answer: str, _: Sample) -> float:
    """ROUGE-L, see `rouge.py`."""
    return rouge_l(prediction, answer)


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
    "only_label": only_label,
}


def _words(text: str) -> list[str]:
    bare = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _share(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(number == wanted for number in numbers) / len(numbers) if numbers else 0.0
