"""Row costs learned from passes, on simulated machines: what is chosen, and what trying costs."""

import json
import random
import threading

import pytest

from lazyahead.draft.budget import Acceptance, RowCost, choose
from lazyahead.draft.learned_cost import (
    CPU_BFLOAT16,
    CPU_FLOAT32,
    GPU,
    LearnedRowCost,
    prior_for,
)
from lazyahead.draft.loss_limit import LossLimit
from lazyahead.draft.tree import Draft, Source

PRIORS = {"cpu_float32": CPU_FLOAT32, "cpu_bfloat16": CPU_BFLOAT16, "gpu": GPU}
DEPTH = 16


def linear(rows, context):
    return 0.02 * rows


def flat(rows, context):
    return 0.02 + 1e-5 * rows


def cliff(rows, context):
    return 0.02 if rows <= 3 else 0.008 * rows + 0.01


def growing(rows, context):
    return 0.01 + 0.0002 * rows + rows * context * 2e-6


MACHINES = [linear, flat, cliff, growing]


def noise_of(rng, level):
    """Noise only adds: a little on every pass, sometimes a lot."""
    return 1.0 + level * rng.expovariate(1.0) + (2.0 if rng.random() < level / 10 else 0.0)


class Simulation:
    """A drafter of one chain, whose nodes are right with probability `right`, on a machine."""

    def __init__(self, machine, prior, right, level=0.0, seed=0, first_context=100):
        self.machine, self.right, self.level = machine, right, level
        self.learned = LearnedRowCost(prior)
        self.acceptance = Acceptance()
        self.rng = random.Random(seed)
        self.context = first_context
        self.seconds = self.plain_seconds = 0.0
        self.counts = []

    def run(self, num_passes):
        for _ in range(num_passes):
            self.step()
        return self

    def step(self):
        step = self.learned.step(1, 0, self.context)
        draft = self.draft()
        (num_nodes,) = self.learned.choose([draft.probs], step)
        num_right = next((n for n in range(DEPTH) if self.rng.random() >= self.right), DEPTH)
        tokens = [5] * num_right + [6]
        self.acceptance.learn(draft, tokens)
        num_tokens = min(num_right, num_nodes) + 1
        noise = noise_of(self.rng, self.level)
        seconds = self.machine(1 + num_nodes, self.context) * noise
        self.learned.note(step, 1 + num_nodes, num_tokens, seconds)
        self.seconds += seconds
        self.plain_seconds += self.machine(1, self.context) * noise * num_tokens
        self.context += num_tokens
        self.counts.append(num_nodes)

    def draft(self):
        rates = self.acceptance.rates(Source.PROMPT, 4)
        probs, prob = [], 1.0
        for depth in range(1, DEPTH + 1):
            prob *= rates[min(depth.bit_length() - 1, len(rates) - 1)]
            probs.append(prob)
        chain = range(-1, DEPTH - 1)
        return Draft([5] * DEPTH, chain, [Source.PROMPT] * DEPTH, [4] * DEPTH, probs)

    def best_rate(self):
        """Tokens per second of the best fixed number of nodes."""
        rates = [
            sum(self.right**n for n in range(num + 1)) / self.machine(1 + num, self.context)
            for num in range(DEPTH + 1)
        ]
        return max(rates)

    def last_rate(self, num):
        """Expected tokens per second of the latest choices."""
        counts = self.counts[-num:]
        tokens = sum(sum(self.right**n for n in range(count + 1)) for count in counts)
        return tokens / sum(self.machine(1 + count, self.context) for count in counts)


@pytest.mark.parametrize("level", [0.0, 0.3])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("first_context", [100, 6000])
def test_where_no_guess_is_right_at_most_three_percent_are_lost(
    machine, prior, level, first_context
):
    sims = [
        Simulation(machine, PRIORS[prior], 0.0, level, seed, first_context).run(300)
        for seed in range(2)
    ]
    assert sum(sim.seconds for sim in sims) < 1.03 * sum(sim.plain_seconds for sim in sims)


@pytest.mark.parametrize("level", [0.0, 0.3])
@pytest.mark.parametrize("right", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("machine", MACHINES)
def test_drafting_that_does_not_pay_is_switched_off(machine, right, level):
    sims = [Simulation(machine, GPU, right, level, seed).run(600) for seed in range(3)]
    assert sum(sim.seconds for sim in sims) < 1.03 * sum(sim.plain_seconds for sim in sims)


@pytest.mark.parametrize("level", [0.0, 0.2])
@pytest.mark.parametrize("right", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_number_of_nodes_comes_near_the_best(machine, prior, right, level):
    sim = Simulation(machine, PRIORS[prior], right, level).run(600)
    assert sim.last_rate(200) > (0.85 if level else 0.9) * sim.best_rate()


def test_a_machine_that_changes_is_learned_anew():
    sim = Simulation(flat, CPU_BFLOAT16, 0.8).run(300)
    assert sim.last_rate(100) > 0.9 * sim.best_rate()
    for machine in (linear, flat):
        sim.machine = machine
        sim.run(1200)
        assert sim.last_rate(200) > 0.85 * sim.best_rate()


def test_no_step_has_more_than_twice_the_rows_that_were_tried():
    learned = LearnedRowCost(CPU_BFLOAT16)
    seen = []
    for _ in range(12):
        step = learned.step()
        (num_nodes,) = learned.choose([[0.99] * 64], step)
        seen.append(1 + num_nodes)
        assert seen[-1] <= 2 * max([1, *seen[:-1]])
        learned.note(step, 1 + num_nodes, 1 + num_nodes, 0.02)
    assert seen[-1] > 32


def test_many_requests_start_from_the_rows_that_they_need():
    learned = LearnedRowCost(GPU)
    for _ in range(40):
        step = learned.step(num_requests=8)
        counts = learned.choose([[0.9, 0.8]] * 8, step)
        rows = 8 + sum(counts)
        learned.note(step, rows, rows, 0.02 + 0.0001 * rows)
    assert sum(counts) == 16
    assert learned.curve().seconds(8) < learned.curve().seconds(24)


def test_the_loss_limit_holds_whatever_is_chosen():
    limit = LossLimit(rate=0.01, start=2.0, cap=5.0)
    lost = 0.0
    for _ in range(1000):
        cost = min(1.0, max(0.0, limit.balance))
        lost += cost
        limit.note(cost, 0.0)
    assert lost <= 2.0 + 0.01 * 1000
    limit.note(0.0, 100.0)
    assert limit.balance == 5.0


def test_a_step_without_drafts_is_made_now_and_then_to_know_its_cost():
    sim = Simulation(flat, CPU_BFLOAT16, 0.95).run(2000)
    assert 0 < sim.counts[100:].count(0) < 20


def test_what_was_learned_survives_in_a_file(tmp_path):
    path = tmp_path / "deep" / "cost.json"
    sim = Simulation(cliff, CPU_FLOAT32, 0.7)
    sim.learned.path = path
    sim.run(200)
    sim.learned.save()
    again = LearnedRowCost.load(path, CPU_FLOAT32)
    for context in (100, 1000, 5000):
        before, after = (learned.curve(context) for learned in (sim.learned, again))
        expected = [before(n) for n in (2, 3, 8)]
        assert [after(n) for n in (2, 3, 8)] == pytest.approx(expected, rel=0.35)
    written = path.stat().st_mtime_ns
    sim.learned.save()
    assert path.stat().st_mtime_ns == written
    assert [file.name for file in path.parent.iterdir()] == ["cost.json"]


def test_a_few_passes_are_not_worth_a_file(tmp_path):
    sim = Simulation(flat, GPU, 0.5)
    sim.learned.path = tmp_path / "cost.json"
    sim.run(10)
    sim.learned.save()
    assert not list(tmp_path.iterdir())


STORED = {"num_passes": 5, "points": [[0.01, 1, 3], [0.02, 4, 1]]}
DAMAGED = [
    "",
    "[]",
    "null",
    '{"tables": 3}',
    '{"tables": {"a": {}}}',
    json.dumps({"tables": {"0": STORED, "1": {**STORED, "points": [[-1.0, 1, 3]]}}}),
    json.dumps({"tables": {"0": {**STORED, "points": [[float("nan"), 1, 3]]}}}),
    json.dumps({"tables": {"0": {**STORED, "points": [[0.1, 10**9, 3]]}}}),
    json.dumps({"tables": {"0": {**STORED, "num_passes": "many"}}}),
    json.dumps({"row_cost": [[1, 0.01]]}),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_as_good_as_none(tmp_path, text):
    path = tmp_path / "cost.json"
    path.write_text(text)
    assert LearnedRowCost.load(path, GPU).curve(1000).points == GPU.points
    path.write_bytes(b"\xff\xfe\x00")
    assert LearnedRowCost.load(path, GPU).curve().points == GPU.points


def test_a_file_that_cannot_be_written_is_given_up_in_silence(tmp_path):
    (tmp_path / "file").write_text("")
    sim = Simulation(flat, GPU, 0.5)
    sim.learned.path = tmp_path / "file" / "cost.json"
    sim.run(100)
    sim.learned.save()
    assert sim.learned.path is None


def test_times_that_mean_nothing_are_left_out():
    learned = LearnedRowCost(GPU)
    for rows, seconds in [(1, 0.0), (1, float("nan")), (0, 1.0), (10_000, 1.0), (1, -1.0)]:
        learned.note(learned.step(), rows, 1, seconds)
    assert learned.curve().points == GPU.points


def test_threads_share_what_is_learned():
    learned = LearnedRowCost(CPU_FLOAT32)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(500):
                step = learned.step(1, 0, rng.choice([10, 1000, 3000]))
                (num_nodes,) = learned.choose([[0.9] * 16], step)
                learned.note(step, 1 + num_nodes, 1 + num_nodes, flat(1 + num_nodes, 0))
                learned.save()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert learned.curve(10)(16) < 1.1


def test_priors_say_what_is_known_of_devices():
    assert prior_for("cpu", "float32")(8) > 3.0
    assert prior_for("cpu", "bfloat16")(16) < 2.0
    assert prior_for("cuda", "float32")(16) < 1.5


def test_choose_keeps_within_rows_and_seconds():
    free = RowCost([(1, 1.0), (64, 1.001)])
    assert choose([[0.9] * 20], free, max_rows=4) == [3]
    steep = RowCost([(1, 1.0), (2, 1.1), (3, 1.2), (4, 1.3)])
    assert choose([[0.9] * 20], steep, max_seconds=1.25) == [2]
