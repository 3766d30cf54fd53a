"""Scores of a reader by category and length: full prefill, greedy answers, names never seen in
training.

python -m training.evaluate --help
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lazyahead.reader import CATEGORIES, WORKLOADS, Sample, reader_path, samples, score


@dataclass(frozen=True)
class Row:
    """The mean score of `n` samples, the share of answers that are right to the letter, and the
    mean prompt length."""

    category: str
    length: int
    n: int
    score: float
    exact: float
    prompt_tokens: float


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, max_new_tokens: int
) -> tuple[str, int]:
    """The greedy answer to a sample and the length of its prompt."""
    ids = tokenizer(sample.prompt, return_tensors="pt", truncation=False).input_ids.to(
        model.device
    )  # (1, N)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), ids.shape[1]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    category: str,
    length: int,
    n: int,
    heldout: bool,
) -> Row:
    """Scores `n` samples of one category and length."""
    drawn = samples(category, length, seed=0, n=n, heldout_templates=heldout)
    found = []
    for sample in drawn:
        max_new_tokens = len(tokenizer(sample.answer).input_ids) + 16
        found.append((sample, *answer(model, tokenizer, sample, max_new_tokens)))
    return Row(
        category,
        length,
        n,
        score=sum(score(sample, text) for sample, text, _ in found) / n,
        exact=sum(text.strip() == sample.answer for sample, text, _ in found) / n,
        prompt_tokens=sum(tokens for _, _, tokens in found) / n,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=reader_path())
    parser.add_argument(
        "--lengths", default="4096", help="comma-separated prompt lengths in tokens"
    )
    parser.add_argument(
        "--categories", default=",".join(CATEGORIES), help=f"also {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--n", type=int, default=20, help="samples for each category and length")
    parser.add_argument(
        "--heldout", action="store_true", help="facts in sentence forms never trained on"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints a table while it measures and one JSON line at the end."""
    options = _parser().parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    rows = []
    for length in map(int, options.lengths.split(",")):
        for category in options.categories.split(","):
            row = evaluate(model, tokenizer, category, length, options.n, options.heldout)
            print(
                f"{category:14} {length:6} score {row.score:.3f} exact {row.exact:.3f}",
                file=sys.stderr,
                flush=True,
            )
            rows.append(row)
    print(
        json.dumps(
            {
                "model": str(options.model),
                "heldout": options.heldout,
                "rows": [asdict(row) for row in rows],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
