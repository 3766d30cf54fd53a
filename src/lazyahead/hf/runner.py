"""One pass through the model: packed rows in, logits of the rows that need them out.

The model runs its own forward. Three public seams: the attention function (keys and values are
ours), a pre-hook on each decoder layer (rows leave and join at boundaries), and a pre-hook on the
output head (only some rows need logits). Nothing stays attached outside `with runner.attached()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lazyahead.errors import LazyAheadError, OutOfMemoryError
from lazyahead.hf.attach import attachment_of, current
from lazyahead.hf.batch import Batch
from lazyahead.hf.graphs import MOST_RECORDED, StaticSegment, graphs_of
from lazyahead.hf.model_spec import ModelSpec
from lazyahead.hf.rows import AttentionParams
from lazyahead.hf.segment import Segment
from lazyahead.hf.temperature import tuned, tuned_modules, untuned
from lazyahead.hf.trace import switched

ATTENTION = "lazyahead"
"""The name under which the attention function is registered."""


class _AllDeferred(Exception):  # noqa: N818 (a way out, no error)
    """No rows are left in flight: the rest of the model has nothing to do."""


class Runner:
    """Runs passes on one model. Any number of runners may share a model, in any threads."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        self.model = model
        self._spec = spec
        self._tuned = tuned_modules(spec.layers)
        self._attachment = attachment_of(model)
        self._graphs = graphs_of(spec, bool(self._tuned))
        if spec.device.type == "cpu" or spec.ranks == 1:
            self._attachment.fuse(model)

    def pack(self, wanted: bool | None) -> None:
        """Packs the weights of linear layers for all runners of this model (None: where memory
        allows)."""
        self._attachment.pack(self.model, wanted)

    @property
    def spec(self) -> ModelSpec:
        """The model's parts. Raises LazyAheadError after layers or head were replaced."""
        if not self._spec.is_current(self.model):
            raise LazyAheadError(
                "the model's layers or head were replaced since it was loaded here; "
                "make a new LLM or accelerate() block for it"
            )
        return self._spec

    @property
    def num_layers(self) -> int:
        return self._spec.num_layers

    @property
    def attends_fully(self) -> tuple[bool, ...]:
        return self._spec.attends_fully

    @property
    def device(self) -> torch.device:
        return self._spec.device

    @property
    def single_request_only(self) -> bool:
        """Rotary tables depend on the longest position in a pass, so requests must not share a
        pass and prompts must not be split."""
        return self._spec.rope is not None

    def may_draft(self, start: int, end: int) -> bool:
        """Whether drafts up to position `end` leave the rotary tables of the root at `start` as
        they are without drafts."""
        return self._spec.rope is None or self._spec.rope.is_steady(start, end)

    def max_drafts(self, num_requests: int) -> int | None:
        """Most drafts of a request in a pass of `num_requests`; None: any number. A lone one has no
        more than a recorded step holds."""
        is_recorded = self._graphs is not None and num_requests == 1
        return MOST_RECORDED - 1 if is_recorded else None

    @contextmanager
    def attached(self) -> Iterator[Runner]:
        """Hooks are in place inside, also when blocks nest, and gone after the last one."""
        spec = self.spec
        with self._attachment.attached(self.model, spec, lambda stack: _hook_up(stack, spec)):
            yield self

    @torch.no_grad()
    def run(
        self, segments: Sequence[Segment], on_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """Logits (R, V) of all rows that need them, segments in order.

        `on_layer` receives the index of each layer that begins. Raises OutOfMemoryError when the
        device is full.
        """
        if self._attachment.owner is not self._spec:
            raise LazyAheadError("the model is not attached; run inside `with runner.attached()`")
        device = self._spec.device
        with self._attachment.lock:
            if self._graphs is not None:
                if on_layer is not None:
                    on_layer(0)
                logits = self._graphs.run(segments, self._prepared)
                if logits is not None:
                    return logits
            batch = Batch(segments, self._spec, on_layer, self._attachment.fewest_rows)
            return self._forward(batch, torch.tensor([batch.token_ids], device=device))

    def _prepared(self, segment: StaticSegment) -> Callable[[], Tensor]:
        """Runs the rows of a segment whose tensors stay where they are: logits (T, V)."""
        batch = Batch([segment], self._spec)

        def run() -> Tensor:
            segment.begin()
            return self._forward(batch, segment.ids[None])

        return run

    def _forward(self, batch: Batch, ids: Tensor) -> Tensor:
        device = self._spec.device
        token = current.set(batch)
        try:
            with self._switched(batch), self._as_new(), uncompiled():
                output = self.model(
                    input_ids=ids, position_ids=batch.positions, use_cache=False, return_dict=True
                )
        except _AllDeferred:
            return torch.empty(0, 0, device=device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no memory left on {device} for {ids.numel()} rows; shorten the prompt"
            ) from error
        finally:
            current.reset(token)
        logits: Tensor = output.logits[0]
        if logits.shape[0] != batch.logits_indices.numel():
            raise LazyAheadError(
                f"the model returned logits of {logits.shape[0]} rows where "
                f"{batch.logits_indices.numel()} were asked for; its output head was replaced"
            )
        return logits[: batch.num_logits]

    @contextmanager
    def _switched(self, batch: Batch) -> Iterator[None]:
        """Inside, attention and what it scales queries by are ours."""
        batch.tuned = self._tuned
        with switched(self._spec.configs, ATTENTION), untuned(self._tuned):
            yield

    def _as_new(self) -> AbstractContextManager[None]:
        return nullcontext() if self._spec.rope is None else self._spec.rope.as_new()


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, what torch.compile has compiled runs as written, so that hooks are seen."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _hook_up(stack: ExitStack, spec: ModelSpec) -> None:
    """Registers the hooks of one model; the stack removes them."""
    AttentionInterface.register(ATTENTION, _attention)
    for index, layer in enumerate(spec.layers):
        hook = layer.register_forward_pre_hook(_enter_layer(index, spec), with_kwargs=True)
        stack.callback(hook.remove)
    stack.callback(spec.layers[-1].register_forward_hook(_leave_layers).remove)
    stack.callback(spec.head.register_forward_pre_hook(_enter_head).remove)


def _enter_layer(index: int, spec: ModelSpec) -> Any:
    specs = spec.arg_specs[index]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = current.get()
        if batch is None:
            return None
        batch.layer = index
        if batch.on_layer is not None:
            batch.on_layer(index)
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = batch.at_boundary(index, hidden)
        if not batch.has_changed and not batch.keeps_token_args:
            return None
        hidden = hidden if changed is None else changed
        placed = tuple(
            batch.args_for_rows(specs.get(place), args[place]) for place in range(1, len(args))
        )
        named = {
            name: batch.args_for_rows(specs.get(name), value) for name, value in kwargs.items()
        }
        if batch.is_over:
            raise _AllDeferred
        return ((hidden, *placed), named) if args else ((), {**named, "hidden_states": hidden})

    return hook


def _leave_layers(module: nn.Module, args: Any, output: Any) -> Any:
    """Restores the rows that entered, so that what follows the layers finds its shape."""
    batch = current.get()
    if batch is None or not batch.has_changed:
        return None
    if isinstance(output, tuple):
        return batch.restore(output[0]), *output[1:]
    return batch.restore(output)


def _enter_head(module: nn.Module, args: tuple[Any, ...]) -> Any:
    batch = current.get()
    if batch is None:
        return None
    return (args[0].index_select(1, batch.logits_indices), *args[1:])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query (1, H, T, D), new keys and values (1, H_kv, T, D) -> (1, T, H, D_v), each segment over
    its own keys."""
    batch = current.get()
    if batch is None:
        raise LazyAheadError(
            "lazyahead attention was called outside a pass; call the model without it"
        )
    params = AttentionParams(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=batch.spec.windows[batch.layer],
        chunk=batch.spec.chunks[batch.layer],
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        ranks=batch.spec.ranks,
    )
    if batch.is_empty:
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    if module in batch.tuned:
        positions = batch.filled(torch.cat([segment.positions for segment in batch.segments]))
        query = tuned(module, query, positions)
    outputs = []
    start = 0
    for segment in batch.segments:
        if not segment.num_rows:
            continue
        rows = slice(start, start + segment.num_rows)
        start += segment.num_rows
        parts = (query[:, :, rows], key[:, :, rows], value[:, :, rows])
        outputs.append(segment.attend(batch.layer, *parts, params))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return batch.filled(output, dim=1).contiguous(), None
