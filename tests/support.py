"""What tests of the engine share: tiny models, a driver, drafters that guess as they are told, and
a slow reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import families
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazyahead.cache.session import Session
from lazyahead.config import LazyPrefill, Lookahead
from lazyahead.draft.drafter import Drafter
from lazyahead.draft.tree import ROOT, Draft, Source
from lazyahead.engine.engine import Engine, Request
from lazyahead.hf.model_spec import ModelSpec
from lazyahead.hf.probe import examine
from lazyahead.hf.runner import Runner
from lazyahead.prefill.schedule import local_layers
from lazyahead.prefill.score import LastToken, Window
from lazyahead.sampling import Picker

torch.set_num_threads(1)  # for models this small a second thread costs more than it brings

LAZY = LazyPrefill(
    schedule=((0.3, 0.5), (0.6, 0.3)),
    min_tokens=0,
    protect_last=4,
    scorer=Window(4, 3),
    revive_threshold=0.1,
)
"""As the default, small enough for 40 tokens; random weights make nearly every token ask for a
revival."""
CALM = LazyPrefill(
    schedule=((0.3, 0.6), (0.6, 0.4)),
    min_tokens=0,
    protect_last=4,
    scorer=Window(4, 3),
    revive_threshold=0.3,
)
"""The same, but few tokens ask, so that drafts are long."""
KEEP_ALL = LazyPrefill(
    schedule=((0.3, 1.0), (0.6, 1.0)), min_tokens=0, protect_last=4, scorer=Window(4, 3)
)
FAST = LazyPrefill(
    schedule=((0.25, 0.25), (0.5, 0.1)),
    min_tokens=0,
    protect_last=2,
    scorer=LastToken(),
    revive_limit=3,
)
PREFILLS: dict[str, LazyPrefill | None] = {
    "none": None,
    "keep_all": KEEP_ALL,
    "lazy": LAZY,
    "calm": CALM,
    "fast": FAST,
    "local": replace(LAZY, local_window=6, local_from=0.25, local_full_rows=5),
    "paper": LazyPrefill.paper(),
    "static_prune": LazyPrefill(((0.25, 0.5),), LastToken(), revive="never", min_tokens=0),
    "random_drop": replace(LazyPrefill.random_drop(), min_tokens=0),
}


@cache
def tiny(family: str) -> tuple[PreTrainedModel, ModelSpec]:
    """A tiny model of the family and its parts; `family:bfloat16` names its numbers too."""
    name, _, dtype = family.partition(":")
    model = families.FAMILIES[name]()
    if dtype:
        model.to(getattr(torch, dtype))
    spec = examine(model)[1]
    assert spec is not None
    return model, spec


def prompts(*lengths: int, seed: int = 1, low: int = 1) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = random.Random(seed)
    return [
        [rng.randrange(low, families.VOCAB_SIZE - 3) for _ in range(length)] for length in lengths
    ]


@cache
def plain_answer(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What transformers' own greedy `generate` says."""
    ids = torch.tensor([prompt])
    model = tiny(family)[0]
    out = model.generate(
        ids, max_new_tokens=num_tokens, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    return out[0, len(prompt) :].tolist()


def engine_for(
    family: str,
    prefill: LazyPrefill | None = None,
    drafter: Drafter | None = None,
    stall: int = 512,
) -> Engine:
    decode = None if drafter is None else Lookahead()
    return Engine(Runner(*tiny(family)), prefill, decode, drafter=drafter, prefill_chunk_size=stall)


def request_for(
    engine: Engine,
    prompt: Sequence[int],
    num_tokens: int = 8,
    session: Session | None = None,
    **options: Any,
) -> Request:
    """A request that the engine has not heard of yet."""
    prefill = engine.prefill
    return Request(
        prompt,
        options.pop("picker", None) or Picker(),
        session=engine.new_session() if session is None else session,
        max_new_tokens=num_tokens,
        min_tokens=prefill.min_tokens if prefill is not None else 0,
        **options,
    )


def finish(
    engine: Engine, requests: Sequence[Request], after_step: Callable[[], None] = lambda: None
) -> None:
    """Submits requests and steps until all have ended."""
    with engine:
        for request in requests:
            engine.submit(request)
        while not engine.is_idle:
            engine.step()
            after_step()


def answer(
    family: str,
    prompt: Sequence[int],
    prefill: LazyPrefill | None = None,
    drafter: Drafter | None = None,
    num_tokens: int = 8,
    **options: Any,
) -> Request:
    """One request, alone, to its end."""
    engine = engine_for(family, prefill, drafter)
    request = request_for(engine, prompt, num_tokens, **options)
    finish(engine, [request])
    return request


# --- drafters that guess as they are told ---------------------------------------------------------

BEHAVIOURS = ("never", "always", "sometimes", "adversarial")


@dataclass
class FakeDrafter:
    """Knows the answers to prompts (as text after text) and is right as often as its behaviour
    says."""

    behaviour: str
    answers: dict[tuple[int, ...], Sequence[int]] = field(default_factory=dict)
    seed: int = 0
    extra: Sequence[int] = (0,)
    """Tokens that adversarial drafts like to hold."""

    def start(self, prompt: Sequence[int] = (), namespace: str = "default") -> FakeRequest:
        return FakeRequest(self, list(prompt), random.Random(self.seed))


@dataclass
class FakeRequest:
    drafter: FakeDrafter
    prompt: list[int]
    rng: random.Random
    written: list[int] = field(default_factory=list)
    heard: list[tuple[Draft, list[int]]] = field(default_factory=list)

    def extend(self, tokens: Sequence[int], source: Source = Source.OUTPUT) -> None:
        assert source is Source.OUTPUT
        self.written += tokens

    def propose(self, max_nodes: int) -> Draft:
        known = self.drafter.answers.get(tuple(self.prompt), ())
        truth = [*known[len(self.written) :], *[self._any() for _ in range(max_nodes)]][:max_nodes]
        match self.drafter.behaviour:
            case "always":
                return _chain(known[len(self.written) :][:max_nodes])
            case "never":
                return _chain(
                    [(token + 1) % families.VOCAB_SIZE for token in truth][: min(max_nodes, 6)]
                )
            case "sometimes":
                return self._half_right(truth, min(max_nodes, 12))
            case _:
                return self._adversarial(truth, min(max_nodes, 16))

    def feedback(self, draft: Draft, tokens: Sequence[int]) -> None:
        self.heard.append((draft, list(tokens)))

    def stop(self, *, remember: bool = False) -> None:
        pass

    def _any(self) -> int:
        return self.rng.randrange(families.VOCAB_SIZE)

    def _half_right(self, truth: Sequence[int], num_nodes: int) -> Draft:
        """The right branch behind wrong siblings, cut short or spoilt somewhere."""
        token_ids, parents, node = list[int](), list[int](), ROOT
        for token in truth:
            if len(token_ids) + 2 > num_nodes:
                break
            if self.rng.random() < 0.3:
                token_ids.append((token + 1) % families.VOCAB_SIZE)
                parents.append(node)
            token_ids.append(token if self.rng.random() < 0.8 else self._any())
            parents.append(node)
            node = len(token_ids) - 1
        return Draft(token_ids, parents)

    def _adversarial(self, truth: Sequence[int], num_nodes: int) -> Draft:
        """A random forest that holds the truth in places, twice in others, token 0 and what else
        breaks things."""
        token_ids, parents, depths = list[int](), list[int](), list[int]()
        for node in range(self.rng.randrange(num_nodes + 1)):
            parent = self.rng.randrange(max(ROOT, node - 4), node)
            depth = depths[parent] + 1 if parent >= 0 else 0
            choices = [truth[depth] if depth < len(truth) else 0, self._any(), *self.drafter.extra]
            token_ids.append(self.rng.choice([choices[0], *choices]))
            parents.append(parent)
            depths.append(depth)
        return Draft(token_ids, parents)


def _chain(tokens: Sequence[int]) -> Draft:
    return Draft(tokens, range(-1, len(tokens) - 1))


def fake(
    behaviour: str,
    family: str,
    prefill: LazyPrefill | None,
    texts: Sequence[Sequence[int]],
    **options: Any,
) -> Any:
    """A fake that knows how the engine answers these prompts without drafts."""
    answers = {tuple(text): answer(family, text, prefill, **options).answer for text in texts}
    return FakeDrafter(behaviour, answers)


# --- what must hold for every session -------------------------------------------------------------


def check_invariants(session: Session) -> None:
    """Nested by depth, computed at most once per layer, and nothing lost."""
    everything, waiting = set(range(len(session))), set[int]()
    below = everything
    for layer, kv in enumerate(session.kv):
        cached = kv.positions.tolist() if len(session) and len(kv) else []
        assert len(set(cached)) == len(cached), f"computed twice at layer {layer}"
        assert set(cached) <= below, f"layer {layer} holds what layer {layer - 1} does not"
        stash = session.stashes.get(layer)
        if stash is not None and len(stash):
            here = stash.positions[stash.live].tolist()
            assert len(set(here)) == len(here) == len(stash)
            if layer:
                slots = session.kv[layer - 1].positions[stash.slots[stash.live]].tolist()
                assert slots == here, f"slots of the stash at {layer} point elsewhere"
            assert not waiting & set(here), "one token waits at two boundaries"
            waiting |= set(here)
        assert not set(cached) & waiting, f"cached at layer {layer}, yet waiting above it"
        assert set(cached) | waiting == everything, f"lost at layer {layer}"
        below = set(cached)


class Recorder:
    """Takes the place of transformers' cache in one layer's call and keeps what is shown to it."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class ByHand:
    """Recomputes, layer by layer and by transformers' own layers, what a session has computed pass
    by pass.

    It takes from the session only which positions were computed where and when; states, keys and
    values are its own.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.model, spec = tiny(family)
        self.layers = spec.layers
        self.windows = [
            families.WINDOW if kind == "sliding_attention" else 0 for kind in spec.layer_types
        ]
        self.states: list[dict[int, Tensor]] = [{} for _ in range(len(self.layers) + 1)]
        self.keys: list[dict[int, Tensor]] = [{} for _ in self.layers]
        self.values: list[dict[int, Tensor]] = [{} for _ in self.layers]
        self.near: dict[
            int, int
        ] = {}  # of positions that attend only to so many before them, in the first layers
        self.local_layers = range(0)
        self.num_checked = 0

    def uses_local_window(self, session: Session, config: LazyPrefill, end: int) -> None:
        """A turn up to `end` begins, whose rows attend to a window in the local layers."""
        placed = list(session.boundaries.values())
        self.local_layers = local_layers(placed, session.num_layers, config.local_from)
        num_full = max(config.local_full_rows, config.protect_last, config.scorer.window_size)
        until = end - num_full if config.local_window else 0
        self.near |= dict.fromkeys(range(len(session), until), config.local_window)

    @torch.no_grad()
    def follow(self, session: Session) -> None:
        """After each pass: computes what the session computed in it, and compares."""
        fresh = range(len(self.states[0]), len(session))
        if fresh:
            rows = self._enter(session.token_ids[fresh.start :])
            self.states[0].update(zip(fresh, rows, strict=True))
        for layer in range(len(self.layers)):
            self._layer(session, layer)

    def forget(self, num_tokens: int) -> None:
        """The session was cropped."""
        for known in (self.near, *self.states, *self.keys, *self.values):
            for position in [position for position in known if position >= num_tokens]:
                del known[position]

    def _layer(self, session: Session, layer: int) -> None:
        kv = session.kv[layer]
        positions = kv.positions.tolist() if len(kv) else []
        new = [position for position in positions if position not in self.keys[layer]]
        assert set(self.keys[layer]) <= set(positions)
        if not new:
            return
        order = [*self.keys[layer], *new]
        places = torch.tensor(order)
        mask = places[:, None] >= places[None]
        if self.windows[layer]:
            mask &= places[:, None] - places[None] < self.windows[layer]
        if layer in self.local_layers and not self.windows[layer]:
            spans = torch.tensor([self.near.get(position, 10**6) for position in order])
            mask &= (places[:, None] - places[None] < spans[:, None]) | (places < 4)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[
            None, None
        ]
        recorder, hidden = (
            Recorder(),
            torch.stack([self.states[layer][position] for position in order])[None],
        )
        out = self._call(layer, hidden, places, bias, recorder)
        assert recorder.keys is not None
        assert recorder.values is not None
        for row, position in enumerate(order):
            if position in self.keys[layer]:
                continue
            self.keys[layer][position] = recorder.keys[0, :, row]
            self.values[layer][position] = recorder.values[0, :, row]
            self.states[layer + 1][position] = out[row]
            slot = positions.index(position)
            torch.testing.assert_close(
                kv.keys[0, :, slot], recorder.keys[0, :, row], atol=2e-4, rtol=1e-3
            )
            torch.testing.assert_close(
                kv.values[0, :, slot], recorder.values[0, :, row], atol=2e-4, rtol=1e-3
            )
            self.num_checked += 1

    def _call(
        self, layer: int, hidden: Tensor, places: Tensor, bias: Tensor, recorder: Recorder
    ) -> Tensor:
        module, config = self.layers[layer], self.model.config
        tables = self._kwargs[layer].get("position_embeddings")
        before, config._attn_implementation = config._attn_implementation, "eager"
        try:
            out = module(
                hidden,
                attention_mask=bias,
                position_ids=places[None],
                past_key_values=recorder,
                position_embeddings=None
                if tables is None
                else tuple(table[:, places] for table in tables),
            )
        finally:
            config._attn_implementation = before
        return (out[0] if isinstance(out, tuple) else out).view(len(places), -1)

    @property
    def _kwargs(self) -> list[dict[str, Any]]:
        return _tables(self.family)

    def _enter(self, token_ids: Sequence[int]) -> Tensor:
        """States (T, d) at the entry to layer 0; places are no part of them in these families."""
        return _entries(self.family, [list(token_ids)])[0][0][0]


class _SeenError(Exception):
    """Enough was seen of a forward."""


def _entries(
    family: str, ids: list[list[int]], num_layers: int = 1
) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the first layers of the model are called with."""
    model, spec = tiny(family)
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"], kwargs))
        if len(found) == num_layers:
            raise _SeenError

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in spec.layers]
    try:
        with suppress(_SeenError), torch.no_grad():
            model(input_ids=torch.tensor(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@cache
def _tables(family: str) -> list[dict[str, Any]]:
    """Each layer's position tables, for positions 0 to 255."""
    return [kwargs for _, kwargs in _entries(family, [[2] * 256], len(tiny(family)[1].layers))]
