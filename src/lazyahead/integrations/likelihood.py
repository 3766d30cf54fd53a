"""How likely a model finds a given continuation, having read its context as it reads any prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lazyahead.engine.request import Request
from lazyahead.llm import LLM
from lazyahead.sampling import Picker

Scored = tuple[float, bool]
"""Sum of log-probabilities, and whether each token is the likeliest."""


class _Dictated(Picker):
    """Writes what it is told, whatever the logits, and keeps the score."""

    def __init__(self, continuation: Sequence[int]) -> None:
        super().__init__(seed=0)
        self.continuation = continuation
        self.log_prob, self.is_greedy = 0.0, True

    @property
    def is_plain(self) -> bool:
        return False

    def choose(self, logits: Tensor, offset: int) -> int:
        token = self.continuation[offset]
        self.log_prob += float(logits.log_softmax(-1)[token])
        self.is_greedy &= int(logits.argmax()) == token
        return token


def dictate(
    llm: LLM,
    pairs: Sequence[tuple[list[int], list[int]]],
    questions: Sequence[tuple[int, int] | None] | None = None,
) -> list[Scored]:
    """Each (context, continuation) scored as the engine would write it, token by token: the context
    is read by `llm.prefill`, and each token brings back what it asks for. All at once; none may
    be empty. `questions` are the half-open spans of the contexts' questions, where they are
    known."""
    spans = questions or [None] * len(pairs)
    pickers = [_Dictated(continuation) for _, continuation in pairs]
    llm.engine.answer(
        [
            Request(
                context,
                picker,
                session=llm.session(),
                max_new_tokens=len(continuation),
                question=question,
                min_tokens=llm.prefill.min_tokens if llm.prefill is not None else None,
            )
            for (context, continuation), picker, question in zip(pairs, pickers, spans, strict=True)
        ]
    )
    return [(picker.log_prob, picker.is_greedy) for picker in pickers]


@torch.no_grad()
def score_whole(llm: LLM, context: Sequence[int], continuation: Sequence[int]) -> Scored:
    """The same where everything is read: one pass of the plain model."""
    token_ids = torch.tensor([[*context, *continuation][:-1]], device=llm.model.device)
    logits = llm.model(input_ids=token_ids, use_cache=False).logits[0, len(context) - 1 :].float()
    wanted = torch.tensor(continuation, device=logits.device)
    log_probs = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == wanted).all())
