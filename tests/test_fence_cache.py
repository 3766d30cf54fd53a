"""Buffers against python lists: whatever is done to them, they hold what a list would hold."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazyahead.cache.kv import GrowableTensor, LayerKV


def values(start: int, num: int) -> torch.Tensor:
    """(1, 2, T, 3) rows that tell each other apart."""
    return torch.arange(start, start + num).view(1, 1, num, 1) + torch.tensor([0.0, 0.5]).view(
        1, 2, 1, 1
    ).expand(1, 2, num, 3)


class KVMachine(RuleBasedStateMachine):
    """A layer's memory beside a list of (value, position)."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.model, self.count = LayerKV(), list[tuple[int, int]](), 0

    @rule(num=st.integers(1, 300), place=st.integers(0, 50))
    def append(self, num: int, place: int) -> None:
        rows = values(self.count, num)
        self.kv.append(rows, -rows, torch.arange(place, place + num))
        self.model += [(self.count + i, place + i) for i in range(num)]
        self.count += num

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        num = data.draw(st.integers(0, min(8, len(self.model))))
        accepted = sorted(data.draw(st.sets(st.integers(0, max(0, num - 1)), max_size=num)))
        is_prefix = data.draw(st.booleans()) and not accepted
        self.kv.commit(num, None if is_prefix else torch.tensor(accepted, dtype=torch.long))
        base = len(self.model) - num
        self.model = self.model[:base] + [self.model[base + offset] for offset in accepted]

    @precondition(lambda self: self.model)
    @rule(num_tokens=st.integers(0, 60))
    def crop(self, num_tokens: int) -> None:
        stayed = self.kv.crop(num_tokens).tolist()
        assert stayed == [
            slot for slot, (_, position) in enumerate(self.model) if position < num_tokens
        ]
        self.model = [self.model[slot] for slot in stayed]

    @invariant()
    def holds_the_same(self) -> None:
        assert len(self.kv) == len(self.model)
        if self.count:
            assert self.kv.keys[0, 0, :, 0].tolist() == [value for value, _ in self.model]
            assert self.kv.values[0, 1, :, 2].tolist() == [-value - 0.5 for value, _ in self.model]
            assert self.kv.positions.tolist() == [position for _, position in self.model]


TestLayerKV = KVMachine.TestCase


@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(1, 20)), min_size=1, max_size=12),
    st.booleans(),
)
def test_rows_written_anywhere_are_found_there(
    writes: list[tuple[int, int]], scattered: bool
) -> None:
    growing, model = GrowableTensor(), dict[int, int]()
    for count, (start, num) in enumerate(writes):
        rows = torch.arange(num) + 1000 * count
        if scattered:
            growing.scatter(torch.arange(start, start + num), rows, start + num)
        else:
            growing.write(start, rows)
        model |= {start + i: int(row) for i, row in enumerate(rows)}
    assert len(growing) == max(model) + 1
    assert [int(growing.rows[place]) for place in model] == list(model.values())


def test_a_view_taken_before_growth_is_not_changed_by_it() -> None:
    growing = GrowableTensor()
    growing.append(torch.zeros(3))
    before = growing.rows
    growing.append(torch.ones(5000))
    assert before.tolist() == [0.0] * 3


def test_an_empty_buffer_says_so() -> None:
    assert len(GrowableTensor()) == 0
    assert GrowableTensor().nbytes == 0
