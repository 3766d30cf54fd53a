"""One pass through the model: packed rows in, logits of the rows that speak out.

The model runs its own forward. We stand at three public seams: the attention function (keys and values are ours),
a pre-hook on each decoder layer (rows leave and join at boundaries), and a pre-hook on the head (only some rows
speak). Nothing stays attached outside `with runner.attached()`, and outside `runner.run` attention is the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lazyahead.errors import LazyAheadError, OutOfMemoryError
from lazyahead.hf.attention import Heads
from lazyahead.hf.cache import Growing
from lazyahead.hf.anatomy import Anatomy

ATTENTION = "lazyahead"
"""The name under which the attention function is registered."""


class Flight(Protocol):
    """The rows of one request during one pass. They change at boundaries."""

    token_ids: Sequence[int]
    """Tokens that enter at layer 0 in this pass."""
    last: int
    """Highest position of a row in this pass."""
    speaks: Sequence[int]
    """Which of them give logits, as offsets into `token_ids`."""
    tables: list[Growing] | None
    """Position tables (rotary and the like) by position, kept for rows that may come back; None: never needed."""

    @property
    def num_rows(self) -> int:
        """Rows in flight now."""

    @property
    def positions(self) -> Tensor:
        """(T,) of the rows in flight now."""

    @property
    def entered(self) -> Tensor:
        """(T,) each row's offset into `token_ids`; -1 for a revived row."""

    @property
    def entering_positions(self) -> Tensor:
        """(T0,) of `token_ids`."""

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, heads: Heads) -> Tensor:
        """Caches the rows' keys and values, answers (1, H, T, D_v)."""

    def cross(self, layer: int, hidden: Tensor) -> Tensor | None:
        """At the entry to `layer`: the rows (T, d) that go on, or None when nothing changes."""


class _Pass:
    """What the hooks share during one forward."""

    def __init__(self, flights: Sequence[Flight], anatomy: Anatomy) -> None:
        self.flights, self.chunks = flights, anatomy.chunks
        self.layer_types = anatomy.layer_types
        self.num_entered = sum(len(flight.token_ids) for flight in flights)
        self.changed = 0  # counts the boundaries that changed rows
        self.seen: list[Any] = []  # the model's own position tables, in order of first appearance
        self.gathered: dict[int, tuple[int, Tensor]] = {}  # table -> (changed, rows of it)
        self.layer = -1

    @property
    def is_empty(self) -> bool:
        """Every row was deferred. One row then flies on unheeded until each kind of layer has shown its tables."""
        return self.changed > 0 and not any(flight.num_rows for flight in self.flights)

    @property
    def has_seen_all_kinds(self) -> bool:
        return set(self.layer_types[: self.layer + 1]) == set(self.layer_types)


class _AllDeferred(Exception):
    """No rows are left in flight: the rest of the model has nothing to do."""


_current: ContextVar[_Pass | None] = ContextVar("lazyahead_pass", default=None)


class Runner:
    """Owns the seams of one model."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.on_layer: Any = None
        """Called with the layer about to run, for progress; None: nobody asks."""
        self._depth = 0
        self._hooks = ExitStack()

    @property
    def num_layers(self) -> int:
        return self.anatomy.num_layers

    @property
    def attends_fully(self) -> tuple[bool, ...]:
        return self.anatomy.attends_fully

    @property
    def device(self) -> torch.device:
        return self.anatomy.device

    @property
    def travels_alone(self) -> bool:
        """Rotary tables depend on the longest position in a pass, so requests must not share one, nor be split."""
        return self.anatomy.tables_depend_on_length

    @contextmanager
    def attached(self) -> Iterator[Runner]:
        """Hooks live in here, also when nested, and are gone after, also after an exception."""
        if self._depth == 0:
            self._attach()
        self._depth += 1
        try:
            yield self
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._hooks.close()

    @torch.no_grad()
    def run(self, flights: Sequence[Flight]) -> Tensor:
        """Logits (R, V) of all rows that speak, flights in order. Raises OutOfMemoryError when the device is full."""
        if self._depth == 0:
            raise LazyAheadError("the model is not attached; run inside `with runner.attached()`")
        pass_ = _Pass(flights, self.anatomy)
        device = self.anatomy.device
        ids = [token for flight in flights for token in flight.token_ids]
        positions = torch.cat([flight.entering_positions for flight in flights])
        self._speak = self._speaking_rows(flights)
        switched = [(config, config._attn_implementation) for config in self.anatomy.configs]
        token = _current.set(pass_)
        try:
            for config, _ in switched:
                config._attn_implementation = ATTENTION
            output = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=positions[None],
                use_cache=False,
                return_dict=True,
            )
            logits: Tensor = output.logits[0]
            return logits
        except _AllDeferred:
            return torch.empty(0, 0, device=device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"no memory left on {device} for {len(ids)} rows; shorten the prompt") from error
        finally:
            _current.reset(token)
            for config, before in switched:
                config._attn_implementation = before

    def _speaking_rows(self, flights: Sequence[Flight]) -> Tensor:
        rows, offset = [], 0
        for flight in flights:
            rows += [offset + row for row in flight.speaks]
            offset += len(flight.token_ids)
        return torch.tensor(rows, dtype=torch.long, device=self.anatomy.device)

    def _attach(self) -> None:
        AttentionInterface.register(ATTENTION, _attention)
        with ExitStack() as stack:
            for index, layer in enumerate(self.anatomy.layers):
                hook = layer.register_forward_pre_hook(self._enter_layer(index), with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(self.anatomy.layers[-1].register_forward_hook(self._leave_layers).remove)
            stack.callback(self.anatomy.head.register_forward_pre_hook(self._enter_head).remove)
            self._hooks = stack.pop_all()

    def _enter_layer(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            pass_ = _current.get()
            if pass_ is None:
                return None
            pass_.layer = index
            if self.on_layer is not None:
                self.on_layer(index)
            hidden = args[0] if args else kwargs["hidden_states"]
            crossed = None if pass_.is_empty else _cross(pass_, index, hidden)
            if crossed is None and not pass_.changed and not _keeps_tables(pass_):
                return None
            hidden = hidden if crossed is None else crossed
            args = (hidden, *(_for_rows(pass_, value) for value in args[1:])) if args else args
            kwargs = {name: _for_rows(pass_, value) for name, value in kwargs.items() if name != "hidden_states"}
            if pass_.is_empty and pass_.has_seen_all_kinds:
                raise _AllDeferred
            return args, (kwargs if args else {"hidden_states": hidden, **kwargs})

        return hook

    def _leave_layers(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Back to the rows that entered, so that what follows the layers finds the shape it knows."""
        pass_ = _current.get()
        if pass_ is None or not pass_.changed:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        restored = hidden.new_zeros(1, pass_.num_entered, hidden.shape[-1])
        offset = start = 0
        for flight in pass_.flights:
            entered = flight.entered
            stayed = (entered >= 0).nonzero()[:, 0]
            restored[0, entered[stayed] + offset] = hidden[0, stayed + start]
            offset += len(flight.token_ids)
            start += flight.num_rows
        return (restored, *output[1:]) if isinstance(output, tuple) else restored

    def _enter_head(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if _current.get() is None:
            return None
        return (args[0].index_select(1, self._speak), *args[1:])


def _cross(pass_: _Pass, layer: int, hidden: Tensor) -> Tensor | None:
    """All flights at one boundary: (1, T, d) -> (1, T', d), or None when nothing changes."""
    parts, changed, start = [], False, 0
    for flight in pass_.flights:
        before = hidden[0, start : start + flight.num_rows]
        start += flight.num_rows
        after = flight.cross(layer, before)
        changed |= after is not None
        parts.append(before if after is None else after)
    if not changed:
        return None
    pass_.changed += 1
    if pass_.is_empty:
        return hidden[:, :1]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows[None]


def _keeps_tables(pass_: _Pass) -> bool:
    return any(flight.tables is not None for flight in pass_.flights)


def _for_rows(pass_: _Pass, value: Any) -> Any:
    """A layer's argument, made for the rows in flight: row-aligned tensors (1, T0, ...) are gathered, others pass."""
    if isinstance(value, tuple):
        return tuple(_for_rows(pass_, part) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != (1, pass_.num_entered):
        return value
    index = next((i for i, table in enumerate(pass_.seen) if table is value), None)
    if index is None:
        index = len(pass_.seen)
        pass_.seen.append(value)
        _remember(pass_, index, value[0])
    if not pass_.changed:
        return value
    if pass_.is_empty:
        return value[:, :1]
    version, rows = pass_.gathered.get(index, (0, value))
    if version != pass_.changed:
        rows = _gather(pass_, index, value[0])[None]
        pass_.gathered[index] = (pass_.changed, rows)
    return rows


def _remember(pass_: _Pass, index: int, table: Tensor) -> None:
    offset = 0
    for flight in pass_.flights:
        num = len(flight.token_ids)
        if flight.tables is not None and num:
            while len(flight.tables) <= index:
                flight.tables.append(Growing())
            flight.tables[index].scatter(flight.entering_positions, table[offset : offset + num], flight.last + 1)
        offset += num


def _gather(pass_: _Pass, index: int, table: Tensor) -> Tensor:
    parts, offset = [], 0
    for flight in pass_.flights:
        if flight.tables is not None:
            parts.append(flight.tables[index].rows[flight.positions])
        else:
            parts.append(table[flight.entered + offset])
        offset += len(flight.token_ids)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query (1, H, T, D), new keys and values (1, H_kv, T, D) -> (1, T, H, D_v), each flight over its own keys."""
    pass_ = _current.get()
    if pass_ is None:
        raise LazyAheadError("lazyahead attention was called outside a pass; call the model without it")
    heads = Heads(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        chunk=pass_.chunks[pass_.layer],
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    if pass_.is_empty:
        return query.new_zeros(1, 1, query.shape[1], value.shape[-1]), None
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        query = _retuned(module, query, torch.cat([flight.positions for flight in pass_.flights]))
    outputs, start = [], 0
    for flight in pass_.flights:
        rows = slice(start, start + flight.num_rows)
        start += flight.num_rows
        if flight.num_rows:
            outputs.append(flight.attend(pass_.layer, query[:, :, rows], key[:, :, rows], value[:, :, rows], heads))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2).contiguous(), None


def _retuned(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """llama4 scales queries of its layers without rotary positions by place in the pass; we mean place in the text."""
    in_pass = torch.arange(positions.numel(), device=positions.device)
    applied, meant = (
        torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        for places in (in_pass, positions)
    )
    return (query.float() * (meant / applied)[:, None]).to(query.dtype)  # (1, H, T, D)
