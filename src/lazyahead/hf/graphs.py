"""Decode steps as CUDA graphs: hundreds of kernels that are launched by one call.

A decode step of one request launches some dozen kernels a layer, each in less time than Python
takes to launch it. A graph records them once, over keys and values where they lie, and replays them
for every further token until the buffers are full. Attention then goes over all slots of the
buffers, those that are not filled masked. Rows are filled up to a few fixed counts.

A request's first step runs as written, the second one records. What makes a policy revive a token
is watched inside the graph; a step in which that happens is run again as written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lazyahead.errors import ConfigError
from lazyahead.hf.dense_attention import attend_slots, bias_of
from lazyahead.hf.model_spec import ModelSpec
from lazyahead.hf.rows import AttentionParams
from lazyahead.hf.scores import reduce_heads, weights_of
from lazyahead.hf.segment import Segment, Watch

ENVIRONMENT = "LAZYAHEAD_CUDA_GRAPHS"
"""0 records no graphs."""
_NUM_ROWS = (1, 4, 8, 16)
"""Rows of a recorded step; others are filled up to the next."""
MOST_RECORDED = _NUM_ROWS[-1]
"""Rows of the largest recorded step."""
_MULTIPLE = 8
"""Slots come in multiples of this: kernels ask it of masks."""
_MOST_REVIVED = 4
"""A conversation that revives tokens in this many more recorded steps than not records no more."""

Prepare = Callable[["StaticSegment"], Callable[[], Tensor]]
"""Prepares a pass over the rows of a segment: what runs it gives logits (T, V)."""
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Records what a function does; calling the result does it again, and gives the same tensor."""

log = logging.getLogger(__name__)


def record_cuda(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of what `run` launches. Raises RuntimeError for what no graph can hold."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def graphs_of(spec: ModelSpec, has_tuned: bool) -> DecodeGraphs | None:
    """None where the device records none, or where a step depends on more than its rows. Raises
    ConfigError for a wrong `LAZYAHEAD_CUDA_GRAPHS`."""
    wanted = os.environ.get(ENVIRONMENT, "1")
    if wanted not in ("0", "1"):
        raise ConfigError(f"{ENVIRONMENT} is 0 or 1, got {wanted!r}")
    is_plain = spec.ranks == 1 and spec.rope is None and not has_tuned
    if wanted == "0" or spec.device.type != "cuda" or not is_plain:
        return None
    return DecodeGraphs(record_cuda)


class DecodeGraphs:
    """The recorded steps of all conversations on one model."""

    def __init__(self, record: Record) -> None:
        self._record: Record | None = record
        self._known: WeakKeyDictionary[Any, _Steps] = WeakKeyDictionary()

    def run(self, segments: Sequence[Segment], prepare: Prepare) -> Tensor | None:
        """Logits (R, V) of a lone segment whose step is recorded. None: run it as written."""
        if self._record is None:
            return None
        logits = self._run_alone(segments[0], prepare) if len(segments) == 1 else None
        if logits is None:
            for segment in segments:
                if segment.owner in self._known:
                    self._known[segment.owner].has_changed = True
        return logits

    def _run_alone(self, segment: Segment, prepare: Prepare) -> Tensor | None:
        watches = segment.policy.watches()
        is_short = segment.num_rows <= MOST_RECORDED
        if watches is None or segment.owner is None or not is_short or not _has_keys(segment):
            return None
        steps = self._known.get(segment.owner)
        if steps is None:  # the first step runs as written
            self._known[segment.owner] = _Steps()
            return None
        if steps.num_revived > _MOST_REVIVED:
            return None
        step = steps.step_of(segment, watches)
        logits = step.run(segment, prepare, self._try_to_record)
        if step.rows.watched and bool(step.rows.is_attended):
            steps.num_revived += 1
            return None
        steps.num_revived = max(0, steps.num_revived - 1)
        for kv in segment.kv:
            kv.extend(segment.num_rows)
        wanted = list(segment.logits_indices)
        return logits[: len(wanted)] if wanted == [*range(len(wanted))] else logits[wanted]

    def _try_to_record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        assert self._record is not None
        try:
            return self._record(run)
        except RuntimeError as error:
            log.warning("decode steps run as written, since none can be recorded: %s", error)
            self._record = None
            self._known.clear()
            return run


def _has_keys(segment: Segment) -> bool:
    return all(len(kv) and not kv.is_blocked for kv in segment.kv)


class _Steps:
    """The recorded steps of one conversation."""

    def __init__(self) -> None:
        self.has_changed = True
        """Whether a pass ran as written since the last recorded step: other tokens may be stashed.
        """
        self.num_revived = 0
        """Recorded steps that had to be run again, less those that had not."""
        self._by_rows: dict[int, _Step] = {}

    def step_of(self, segment: Segment, watches: Mapping[int, Watch]) -> _Step:
        """The step with room for the rows of `segment`, a new one where there is none, or where
        keys and values lie elsewhere by now."""
        for kv in segment.kv:
            kv.reserve(len(kv) + MOST_RECORDED + _MULTIPLE - 1)
        num_rows = next(num for num in _NUM_ROWS if num >= segment.num_rows)
        step = self._by_rows.get(num_rows)
        if step is None or not step.fits(segment, watches):
            step = self._by_rows[num_rows] = _Step(StaticSegment(num_rows, segment, watches))
            step.rows.watch(watches)
        if self.has_changed:
            for other in self._by_rows.values():
                other.rows.watch(watches)
            self.has_changed = False
        return step


class _Step:
    """One recorded step: its input, and what replays it."""

    def __init__(self, rows: StaticSegment) -> None:
        self.rows = rows
        self._run: Callable[[], Tensor] | None = None
        """Holds the tensors that a recorded step reads: a graph does not."""
        self._replay: Callable[[], Tensor] | None = None

    def fits(self, segment: Segment, watches: Mapping[int, Watch]) -> bool:
        """Whether keys and values still lie where they lay, and the same layers are watched."""
        keys = self.rows.keys
        same = all(kv.buffers[0] is was for kv, was in zip(segment.kv, keys, strict=True))
        return same and self.rows.watched.keys() == watches.keys()

    def run(self, segment: Segment, prepare: Prepare, record: Record) -> Tensor:
        """Logits (T, V). The first time the step runs as written, and then it is recorded."""
        self.rows.fill(segment)
        if self._replay is not None:
            return self._replay().clone()
        self._run = prepare(self.rows)
        logits = self._run()
        self._replay = record(self._run)
        return logits


class StaticSegment(Segment):
    """Rows whose tensors stay where they are from step to step: the input of a recorded step."""

    def __init__(self, num_rows: int, segment: Segment, watches: Mapping[int, Watch]) -> None:
        device = segment.kv[0].positions.device
        super().__init__(segment.kv, [0] * num_rows, [0] * num_rows, range(num_rows), device)
        starts = sorted(layer for layer in segment.boundaries if layer)
        self._group = [sum(layer >= start for start in starts) for layer in range(len(self.kv))]
        """By layer: layers of one group hold the same tokens."""
        num_groups = 1 + len(starts)
        self._input = torch.zeros(
            2 * num_rows + num_groups + num_rows**2, dtype=torch.long, device=device
        )
        sizes = [num_rows, num_rows, num_groups, num_rows**2]
        parts = torch.split(self._input, sizes)
        self.ids, self.entering_positions, self._bases, sees = parts
        self.positions = self.entering_positions
        self._sees = sees.view(num_rows, num_rows)
        """Which rows see which of the same step."""
        self.keys = [kv.buffers[0] for kv in segment.kv]
        for kv in segment.kv:
            for buffer in kv.buffers[:2]:  # nothing times what was never written may be no number
                buffer[:, :, len(kv) :].zero_()
        self._capacity = [buffer.shape[2] // _MULTIPLE * _MULTIPLE for buffer in self.keys]
        self.watched = {
            layer: torch.zeros(self._capacity[layer], dtype=torch.bool, device=device)
            for layer in watches
        }
        self._thresholds = {layer: watch.threshold for layer, watch in watches.items()}
        self.is_attended = torch.zeros((), dtype=torch.bool, device=device)
        """Whether a row attends to a watched slot above the threshold."""
        self._slots: dict[int, Tensor] = {}
        self._shown: dict[Any, tuple[Tensor, Tensor]] = {}

    def watch(self, watches: Mapping[int, Watch]) -> None:
        """Watches the slots that are stashed now."""
        for layer in self.watched.keys() & watches.keys():
            self.watched[layer].zero_()[watches[layer].slots] = True

    def fill(self, segment: Segment) -> None:
        """Takes the rows of a step; places behind them get copies of the last, which none sees."""
        num, most = segment.num_rows, len(self.token_ids)
        sees = torch.zeros(most, most, dtype=torch.long)
        sees[:num, :num] = torch.ones(num, num).tril()
        if segment.ancestors is not None:
            first = num - segment.num_drafts
            sees[first:num, first:num] = segment.ancestors.cpu()
        sees[num:] = sees[num - 1]
        last_id, places = segment.token_ids[-1], list(segment.entering_places)
        values = [*segment.token_ids, *[last_id] * (most - num)]
        values += [*places, *[places[-1]] * (most - num)]
        bases = [0] * self._bases.numel()
        for layer, group in enumerate(self._group):
            bases[group] = len(segment.kv[layer])
        packed = torch.tensor([*values, *bases])
        self._input.copy_(torch.cat([packed, sees.flatten()]), non_blocking=True)
        self.last = segment.last

    def begin(self) -> None:
        """A pass begins: what layers share is made anew."""
        self._slots, self._shown = {}, {}
        self.is_attended.zero_()

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams
    ) -> Tensor:
        """Writes keys and values behind those of the layer, attends over all its slots."""
        own_keys, own_values, positions = self.kv[layer].buffers
        group, capacity = self._group[layer], self._capacity[layer]
        if group not in self._slots:
            self._slots[group] = self._bases[group] + self.entered
        at = self._slots[group]
        own_keys.index_copy_(2, at, keys)
        own_values.index_copy_(2, at, values)
        positions.index_copy_(0, at, self.positions)
        kind = (group, capacity, params.window, params.chunk, query.shape[1] // keys.shape[1])
        if kind not in self._shown:
            mask = self._mask(at, positions[:capacity], params)
            self._shown[kind] = mask, bias_of(mask, kind[-1], query.dtype)
        mask, bias = self._shown[kind]
        own_keys, own_values = own_keys[:, :, :capacity], own_values[:, :, :capacity]
        if layer in self.watched:
            weights = weights_of(query, own_keys, mask, params)
            weights = weights.view(query.shape[1], query.shape[2], capacity)
            exceeds = reduce_heads(weights, "max") > self._thresholds[layer]
            self.is_attended |= (exceeds & self.watched[layer]).any()
        return attend_slots(query, own_keys, own_values, mask, bias, params).transpose(1, 2)

    def _mask(self, at: Tensor, positions: Tensor, params: AttentionParams) -> Tensor:
        """(T, C) which slots rows see: those that were filled, and their own path of drafts."""
        slots = torch.arange(positions.numel(), device=positions.device)
        mask = (slots < at[:1]).repeat(at.numel(), 1)
        mask.index_copy_(1, at, self._sees.bool())
        places = self.positions[:, None]
        if params.window is not None:
            mask &= positions > places - params.window
        if params.chunk is not None:
            mask &= positions // params.chunk == places // params.chunk
        return mask
