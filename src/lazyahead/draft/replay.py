"""Replay recorded texts through a drafter: how many tokens a step would bring, without a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import thread_time

from lazyahead.draft.budget import RowCost, Step, choose
from lazyahead.draft.drafter import Drafter, DraftRequest
from lazyahead.draft.tree import Draft, Source
from lazyahead.draft.verify import Walk, walk

FREE_ROWS = RowCost([(1, 1.0)])
"""Any number of rows costs the same: acceptance alone is measured."""


@dataclass(frozen=True)
class Replay:
    """What a drafter did with recorded texts. Seconds are CPU time; modelled ones follow from the
    row costs."""

    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    prompt_tokens: int
    prompt_s: float
    draft_s: float
    modelled_s: float
    modelled_plain_s: float

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / max(self.num_steps, 1)

    @property
    def acceptance(self) -> float:
        """Accepted share of the nodes verified."""
        return self.num_accepted / max(self.num_drafted, 1)

    @property
    def draft_us_per_token(self) -> float:
        """Microseconds of proposing, choosing, verifying, learning and indexing for each token
        generated."""
        return 1e6 * self.draft_s / max(self.num_tokens, 1)

    @property
    def prompt_us_per_token(self) -> float:
        """Microseconds of indexing for each prompt token."""
        return 1e6 * self.prompt_s / max(self.prompt_tokens, 1)

    @property
    def speedup(self) -> float:
        """Over decoding without drafts, were drafting to cost what it did and steps what `cost`
        says."""
        return self.modelled_plain_s / max(self.modelled_s + self.draft_s, 1e-12)


def replay(
    drafter: Drafter,
    texts: Iterable[tuple[Sequence[int], Sequence[int]]],
    cost: RowCost = FREE_ROWS,
    *,
    max_nodes: int = 64,
    remember: bool = False,
) -> Replay:
    """Have `drafter` guess each recorded answer, given as (prompt, answer), one after the other.

    With `remember`, answers stay for the texts after them. The first token of an answer comes from
    the prefill.
    """
    max_nodes = cost.max_nodes(max_nodes)
    num_tokens = num_steps = num_drafted = num_accepted = prompt_tokens = 0
    prompt_s = draft_s = modelled_s = 0.0
    for prompt, answer in texts:
        begin = thread_time()
        request = drafter.start(prompt)
        prompt_s += thread_time() - begin
        prompt_tokens += len(prompt)
        request.extend(answer[:1], Source.OUTPUT)
        done = 1
        while done < len(answer):
            begin = thread_time()
            verified, step = _step(request, answer, done, cost, max_nodes)
            draft_s += thread_time() - begin
            done += len(step.tokens)
            num_tokens += len(step.tokens)
            num_steps += 1
            num_drafted += len(verified)
            num_accepted += len(step.nodes)
            modelled_s += cost.seconds(1 + len(verified))
        request.stop(remember=remember)
    return Replay(
        num_tokens=num_tokens,
        num_steps=num_steps,
        num_drafted=num_drafted,
        num_accepted=num_accepted,
        prompt_tokens=prompt_tokens,
        prompt_s=prompt_s,
        draft_s=draft_s,
        modelled_s=modelled_s,
        modelled_plain_s=num_tokens * cost.seconds(1),
    )


def _step(
    request: DraftRequest, answer: Sequence[int], done: int, cost: RowCost, max_nodes: int
) -> tuple[Draft, Walk]:
    draft = request.propose(min(max_nodes, len(answer) - done), Step(cost))
    verified = draft.best(choose([draft.probs or [1.0] * len(draft)], cost)[0])
    last = len(answer) - 1
    step = walk(verified, lambda _, tokens: answer[min(done + len(tokens), last)])
    tokens = step.tokens[: len(answer) - done]
    request.extend(tokens)
    request.feedback(draft, tokens)
    return verified, Walk(tokens, step.nodes[: len(tokens)])
