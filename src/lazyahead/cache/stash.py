"""The paper's Aux Cache: hidden states of tokens that have no keys and values at a layer and below
it have."""

from __future__ import annotations

import torch
from torch import Tensor

from lazyahead.cache.kv import GrowableTensor


class Stash:
    """Deferred tokens of one request at one boundary.

    `hidden` (N, d) is what would enter the layer, `positions` (N,) the places in the text, `slots`
    (N,) where their keys stand at the layer below. A revived entry is only marked; `compact` frees
    its memory.
    """

    def __init__(self) -> None:
        self._hidden = GrowableTensor()
        self._positions = GrowableTensor()
        self._slots = GrowableTensor()
        self._live = GrowableTensor()
        self._num_live = 0
        # What the latest `mark` found, and what was revived since.
        self._mark = 0
        self._taken: list[Tensor] = []

    def __len__(self) -> int:
        """Stashed tokens that were not revived."""
        return self._num_live

    @property
    def nbytes(self) -> int:
        return self._hidden.nbytes + self._positions.nbytes + self._slots.nbytes

    @property
    def live(self) -> Tensor:
        """Indices (rising) of the entries that were not revived."""
        if not self._num_live:
            return torch.empty(0, dtype=torch.long)
        return self._live.rows.nonzero()[:, 0]

    @property
    def is_live(self) -> Tensor:
        """(E,) which of all entries were not revived."""
        return self._live.rows

    @property
    def hidden(self) -> Tensor:
        return self._hidden.rows

    @property
    def positions(self) -> Tensor:
        return self._positions.rows

    @property
    def slots(self) -> Tensor:
        return self._slots.rows

    def add(self, hidden: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Defers tokens: hidden (T, d), positions (T,), slots (T,)."""
        self._hidden.append(hidden)
        self._positions.append(positions)
        self._slots.append(slots)
        self._live.append(torch.ones_like(positions, dtype=torch.bool))
        self._num_live += positions.numel()

    def take(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Revives live `entries`: their hidden states (T, d) and positions (T,); they are no
        longer live."""
        self._taken.append(entries)
        self._live.rows[entries] = False
        self._num_live -= entries.numel()
        return self.hidden[entries], self.positions[entries]

    def mark(self) -> None:
        """A pass begins, which `rollback` can undo."""
        self._mark = len(self._live)
        self._taken = []

    def rollback(self) -> None:
        """As at the latest `mark`: later entries are dropped, revived ones are live again."""
        for part in (self._hidden, self._positions, self._slots, self._live):
            part.cut(self._mark)
        for entries in self._taken:
            self._live.rows[entries] = True
        self._num_live = int(self._live.rows.sum()) if self._mark else 0
        self._taken = []

    def compact(self) -> None:
        """Frees the room of revived entries once they are the larger part."""
        if 2 * self._num_live < len(self._live):
            self._keep(self.live)

    def crop(self, num_tokens: int, stayed: Tensor, num_slots: int) -> None:
        """Forgets tokens at position `num_tokens` and later; `stayed` are the slots below that
        remain, renumbered."""
        if not len(self._live):
            return
        renumbered = torch.full((num_slots,), -1, device=stayed.device)
        renumbered[stayed] = torch.arange(stayed.numel(), device=stayed.device)
        self.slots.copy_(renumbered[self.slots])
        self._keep((self._live.rows & (self.positions < num_tokens)).nonzero()[:, 0])

    def _keep(self, entries: Tensor) -> None:
        kept = [part.rows[entries] for part in (self._hidden, self._positions, self._slots)]
        self.__init__()  # type: ignore[misc]
        if entries.numel():
            self.add(*kept)
