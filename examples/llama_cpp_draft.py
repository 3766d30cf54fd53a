"""Our trie drafter as llama-cpp-python's draft model (`LlamaDraftModel`):

    pip install llama-cpp-python lazyahead
    python examples/llama_cpp_draft.py model.gguf "Question about a text ..."

llama-cpp-python calls the draft model with the whole text at every step and verifies what it gets
back, so that the answer stays the same.
"""

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from lazyahead.draft.proposer import ChainProposer


class TrieDraftModel:
    """Has the call of `llama_cpp.llama_speculative.LlamaDraftModel` (0.3.36). `memory` names a file
    that keeps answers between runs."""

    def __init__(self, num_pred_tokens: int = 8, memory: str | None = None) -> None:
        self.num_pred_tokens = num_pred_tokens
        self.proposer = ChainProposer(memory=memory)

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        return np.array(self.proposer.propose(input_ids, self.num_pred_tokens), np.intc)


def main(model: str, prompt: str) -> None:
    """Answers one prompt."""
    from llama_cpp import Llama

    llm = Llama(model, n_ctx=4096, draft_model=TrieDraftModel(), verbose=False)
    answer = llm(prompt, max_tokens=128, temperature=0.0)
    print(answer["choices"][0]["text"])


if __name__ == "__main__":
    main(*sys.argv[1:3])
