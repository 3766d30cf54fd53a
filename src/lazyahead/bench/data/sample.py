"""One question of a benchmark, whatever file it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A prompt, the answers that count as right, and how both are to be treated."""

    dataset: str
    category: str
    """What results are grouped by: one of LongBench's six, or the name of the file."""
    prompt: str
    """The whole text, template included, chat template not."""
    answers: tuple[str, ...] = ()
    """Each of them right by itself; empty where the benchmark only measures speed."""
    all_classes: tuple[str, ...] = ()
    """What can be answered, where answers are classes."""
    max_new_tokens: int = 64
    use_chat_template: bool = True
    metric: str = "qa_f1"
    """A name in `metrics.METRICS`."""
    first_line_only: bool = False
    """Whether only the first line of an answer counts."""
    question: str = ""
    """The end of the prompt that says what is asked; empty where nothing tells it apart."""
