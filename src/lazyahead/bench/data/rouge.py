"""ROUGE-L as LongBench measures it: the summary-level score of the package `rouge` 1.0.1.

It counts each word once: recall and precision are shares of the distinct words of the two texts
that lie on a longest common subsequence of some pair of sentences. Sentences end at full stops,
words at spaces, case counts. (`rouge-score` counts repetitions and lowers case: other values.)
One difference: where that package runs out of recursion, in sentences of about 1,000 words, and
LongBench scores 0, this one gives the score.
"""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(prediction: str, answer: str) -> float:
    """F-measure, 0 to 1; 0 for a text without a sentence."""
    found, wanted = _sentences(prediction), _sentences(answer)
    if not found or not wanted:
        return 0.0
    shared: set[str] = set()
    for reference in wanted:
        for sentence in found:
            shared |= _common(reference, sentence)
    recall = len(shared) / len({word for sentence in wanted for word in sentence})
    precision = len(shared) / len({word for sentence in found for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence. A sentence of spaces alone is one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(left: Sequence[str], right: Sequence[str]) -> set[str]:
    """Distinct words of a longest common subsequence; ties go as in the package."""
    if not set(left) & set(right):
        return set()
    lengths = _lengths(left, right)
    words, i, j = set(), len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.add(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _lengths(left: Sequence[str], right: Sequence[str]) -> list[list[int]]:
    """[i][j]: length of a longest common subsequence of the first i and the first j words."""
    rows = [[0] * (len(right) + 1)]
    for word in left:
        above, row = rows[-1], [0]
        for j, other in enumerate(right):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    return rows
