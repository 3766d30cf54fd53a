"""Scores in LongBench's measures: token F1, ROUGE-L, accuracy, edit similarity; all between 0 and
1.

Needs the extra `eval` (rouge-score, rapidfuzz), imported when a score that uses it is asked for.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lazyahead.reader.tasks import Sample


def _extra(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is missing; install it with: pip install 'lazyahead[eval]'"
        ) from error


def normalize(text: str) -> list[str]:
    """LongBench's words of a text: lower case, no punctuation, no articles."""
    bare = "".join(
        " " if mark in "–—" else mark for mark in text.lower() if mark not in string.punctuation
    )
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the words two texts share."""
    found = normalize(prediction)
    wanted = normalize(answer)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else float(found == wanted)


def fact_f1(prediction: str, answer: str, question: str) -> float:
    """F1 of the words that are not in the question: answers quote their question, which proves
    nothing."""
    known = set(normalize(question))

    def news(text: str) -> str:
        return " ".join(word for word in normalize(text) if word not in known)

    return token_f1(news(prediction), news(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F-measure."""
    scorer = _extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return float(scorer.score(answer, prediction)["rougeL"].fmeasure)


def exact_line(prediction: str, answer: str) -> float:
    """1 where the first line of the prediction is the answer."""
    return float(prediction.strip().partition("\n")[0].strip() == answer.strip())


def numbers_right(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are in the answer (LongBench's retrieval score)."""
    wanted = re.findall(r"\d+", answer)
    found = re.findall(r"\d+", prediction)
    return sum(number in wanted for number in found) / len(found) if found else 0.0


def edit_similarity(prediction: str, answer: str) -> float:
    """Levenshtein similarity of the first lines."""
    first = prediction.strip().partition("\n")[0]
    return float(_extra("rapidfuzz.fuzz").ratio(first, answer.strip())) / 100


MEASURES: dict[str, Callable[[str, str], float]] = {
    "summarization": rouge_l,
    "few_shot": exact_line,
    "synthetic": numbers_right,
    "code": edit_similarity,
}


def score(sample: Sample, prediction: str) -> float:
    """The score of a predicted answer in its category's measure; question answering and workloads
    use `fact_f1`."""
    measure = MEASURES.get(sample.category)
    if measure is None:
        return fact_f1(prediction, sample.answer, sample.question)
    return measure(prediction, sample.answer)
