"""What `LLM(..., tp=2)` does before and after it loads its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from lazyahead.checks import check_count
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.engine.engine import Engine
from lazyahead.errors import ConfigError
from lazyahead.hf.load import check_parallel
from lazyahead.parallel.follow import follow
from lazyahead.parallel.group import Group
from lazyahead.parallel.lead import LeadingEngine
from lazyahead.parallel.messages import Load, Unload


class Lead:
    """One model on a group, from the leader's side.

    A process that torchrun started with another rank than 0 follows here until the group ends, and
    then exits: only rank 0 comes back. Raises ConfigError.
    """

    def __init__(self, tp: int | Group, model: str | Path | nn.Module) -> None:
        if isinstance(model, nn.Module):
            raise ConfigError("tp loads a model by itself; give a folder or a hub name")
        self._owns = not isinstance(tp, Group)
        if isinstance(tp, Group):
            self.group = tp
        else:
            self.group = Group.start(tp)
        if not self.group.is_leader:
            follow(self.group)
            self.group.close()
            raise SystemExit(0)
        if self.group.is_used:
            raise ConfigError(f"this group of tp={self.group.size} runs a model; close its LLM")

    @contextmanager
    def loading(
        self,
        name: str,
        dtype: str,
        device: str,
        prefill: LazyPrefill | None,
        decode: Lookahead | Drafter | None,
        prefill_chunk_size: int,
        packed: bool | None,
        prefix_cache_bytes: int,
    ) -> Iterator[Callable[..., Engine]]:
        """Inside, the other ranks load the model, as the caller must; yields what makes its engine.

        Raises ModelError for a model that cannot be shared out. Where loading fails the group
        ends, for the other ranks may wait for this one."""
        try:
            check_parallel(name, device, self.group.size)
        except BaseException:
            self.close()
            raise
        needs_owner = isinstance(decode, Lookahead) and decode.memory is not None
        told: Lookahead | None = None
        if decode is not None:
            told = replace(decode, memory=None) if isinstance(decode, Lookahead) else Lookahead()
        self.group.is_used = True
        self.group.tell(
            Load(
                name,
                dtype,
                device,
                prefill,
                told,
                needs_owner,
                prefill_chunk_size,
                packed,
                prefix_cache_bytes,
            )
        )
        try:
            yield partial(LeadingEngine, self.group)
        except BaseException as error:
            if self.group.is_open:
                self.group.failed(error)
            raise

    def close(self) -> None:
        """The model is no longer used; a group that began with it ends."""
        if self.group.is_used and self.group.is_open:
            self.group.tell(Unload())
        self.group.is_used = False
        if self._owns:
            self.group.close()


def lead(tp: int | Group, model: str | Path | nn.Module) -> Lead | None:
    """None for one process."""
    if not isinstance(tp, Group):
        check_count("tp", tp, 1)
        if tp == 1:
            return None
    return Lead(tp, model)
