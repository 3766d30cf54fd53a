"""What a conversation keeps: keys and values of what was computed, hidden states of what was
deferred."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lazyahead.cache.kv import GrowableTensor, LayerKV
from lazyahead.cache.stash import Stash
from lazyahead.prefill.config import LazyPrefill
from lazyahead.prefill.schedule import Boundary
from lazyahead.results import Reach


class Session:
    """One conversation on one model. Every token is, at each layer, cached or stashed at or above
    it: none is lost."""

    def __init__(
        self,
        num_layers: int,
        boundaries: Sequence[Boundary] = (),
        prefill: LazyPrefill | None = None,
    ) -> None:
        self.prefill = prefill
        """How its prompts are read; `boundaries` are this strategy's. None: whole."""
        self.token_ids: list[int] = []
        """Tokens whose rows have entered the model, in order of position."""
        self.pending: list[int] = []
        """Answer tokens that no pass has seen yet: the last one of each turn."""
        self.kv = [LayerKV() for _ in range(num_layers)]
        self.boundaries = {boundary.layer: boundary for boundary in boundaries}
        self.stashes = {layer: Stash() for layer in self.boundaries}
        self.token_args: list[GrowableTensor] = []
        """The model's per-token layer arguments by position, for rows that may be revived."""
        self.prompt_len = 0
        """Tokens that are prompt, the latest turn's included; what follows is the running answer.
        """
        self.num_revived = 0
        self.prefill_lens: list[int] = []
        """Slots of each layer when the latest prompt had been read."""
        self.in_use = False
        """Set by the engine while a request runs on this session."""
        self._mark: tuple[list[int], int] | None = None

    def __len__(self) -> int:
        """Tokens that have entered."""
        return len(self.token_ids)

    @property
    def num_layers(self) -> int:
        return len(self.kv)

    @property
    def num_stashed(self) -> int:
        """Tokens that wait, over all boundaries."""
        return sum(len(stash) for stash in self.stashes.values())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held: list[LayerKV | Stash | GrowableTensor] = [
            *self.kv,
            *self.stashes.values(),
            *self.token_args,
        ]
        return sum(part.nbytes for part in held)

    @property
    def history(self) -> list[int]:
        """The whole text so far, the token that no pass has seen included."""
        return self.token_ids + self.pending

    @property
    def kept_by_layer(self) -> tuple[int, ...]:
        """Prompt tokens computed at each layer."""
        answer = len(self) - self.prompt_len
        return tuple(len(kv) - answer for kv in self.kv)

    @property
    def prompt_tokens_computed(self) -> float:
        """Mean over layers of the fraction of prompt tokens computed there."""
        if not self.num_layers or not self.prompt_len:
            return 1.0  # the model keeps its own cache
        return sum(self.kept_by_layer) / (self.num_layers * self.prompt_len)

    def mark(self) -> None:
        """A pass begins: until it is committed, `rollback` undoes it."""
        self._mark = [len(kv) for kv in self.kv], self.num_revived
        for stash in self.stashes.values():
            stash.mark()

    def rollback(self) -> bool:
        """Undoes a pass that was broken off, if it was: tells so. A model with a cache of its own
        starts anew."""
        if self._mark is None:
            return False
        lengths, self.num_revived = self._mark
        self._mark = None
        for kv, length in zip(self.kv, lengths, strict=True):
            kv.commit(len(kv) - length, None)
        for stash in self.stashes.values():
            stash.rollback()
        if not self.num_layers:
            self.token_ids, self.pending = [], []
        return True

    def crop(self, num_tokens: int) -> None:
        """Forgets tokens from position `num_tokens` on, as if they had never been written."""
        self.pending = []
        if num_tokens >= len(self):
            return
        num_before = len(self)
        del self.token_ids[num_tokens:]
        self.prompt_len = min(self.prompt_len, num_tokens)
        for layer, kv in enumerate(self.kv):
            num_slots = len(kv)
            if not num_slots:
                continue
            stayed = kv.crop(num_tokens)
            if self.prefill_lens:
                self.prefill_lens[layer] = int((stayed < self.prefill_lens[layer]).sum())
            if layer + 1 in self.stashes:
                self.stashes[layer + 1].crop(num_tokens, stayed, num_slots)
        if 0 in self.stashes and self.stashes[0].nbytes:
            below = torch.arange(
                num_tokens, device=self.stashes[0].slots.device
            )  # slots are positions there
            self.stashes[0].crop(num_tokens, below, num_before)

    def commit(self, tokens: Sequence[int], num_drafts: int, accepted: Sequence[int]) -> None:
        """After a pass by which `tokens` have entered: of its `num_drafts` draft rows keeps those
        at `accepted`."""
        if num_drafts:
            is_prefix = list(accepted) == list(range(len(accepted)))
            rows = None if is_prefix else torch.tensor(accepted, device=self.kv[0].positions.device)
            for kv in self.kv:
                kv.commit(num_drafts - len(accepted) if is_prefix else num_drafts, rows)
        self.token_ids.extend(tokens)
        self._mark = None

    def reach(self) -> Reach:
        """How deep each prompt token got."""
        depth = torch.zeros(self.prompt_len, dtype=torch.long)
        prefill = torch.zeros_like(depth)
        for kv, length in zip(self.kv, self.prefill_lens, strict=False):
            positions = kv.positions.cpu()
            for counts, part in ((depth, positions), (prefill, positions[:length])):
                inside = part[part < self.prompt_len]
                counts.index_add_(0, inside, torch.ones_like(inside))
        ids = tuple(self.history)
        return Reach(
            ids[: self.prompt_len],
            tuple(depth.tolist()),
            tuple(prefill.tolist()),
            self.num_layers,
            ids[self.prompt_len :],
        )


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that two texts have in common at their start."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
