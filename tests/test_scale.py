"""The simulation of a fleet: it obeys queueing's plainest laws, and a seed gives one result."""

from dataclasses import replace

import pytest
import scale_simulation as simulation
from scale_simulation import Costs, Fleet, Setting

COSTS = {
    way: [
        {"length": length, "cold_s": cold * length / 1000, "question_s": 0.1, "step_s": 0.01}
        for length in simulation.LENGTHS
    ]
    for way, cold in (("full", 1.0), ("lazy", 0.4))
}
BASE = Setting(replicas=10, requests_per_replica=40, fewest_requests=400)


def outcome(setting: Setting) -> simulation.Outcome:
    return Fleet(setting, Costs(COSTS, setting.reading), {}).run()


def test_a_seed_gives_one_result() -> None:
    assert outcome(BASE) == outcome(BASE) != outcome(replace(BASE, seed=1))


def test_an_idle_replica_answers_after_one_reading() -> None:
    calm = outcome(Setting(replicas=1, rate=0.001, cached_documents=1000, zipf=0.0))
    assert calm.ttft_p50_s == pytest.approx(0.1)
    assert calm.ttft_p99_s <= 0.4 * 4 + 0.01
    assert calm.utilisation < 0.01


def test_documents_stay_where_they_were_read() -> None:
    affine, scattered = outcome(BASE), outcome(replace(BASE, routing="least loaded"))
    assert affine.hit_rate > scattered.hit_rate + 0.2
    assert affine.busy_s_per_answer < scattered.busy_s_per_answer


def test_one_replica_is_the_same_by_any_route() -> None:
    one = replace(BASE, replicas=1)
    routes = [outcome(replace(one, routing=way)) for way in ("affinity", "least loaded")]
    assert routes[0].hit_rate == pytest.approx(routes[1].hit_rate, abs=0.2)


def test_all_requests_are_answered_whatever_the_load() -> None:
    for rate in (0.01, 1.0, 20.0):
        fleet = Fleet(replace(BASE, rate=rate), Costs(COSTS, "lazy"), {})
        fleet.run()
        assert len(fleet.ttfts) == 400
        assert all(replica.load == 0 for replica in fleet.replicas)
        assert fleet._num_open == 0


def test_larger_caches_hit_more() -> None:
    rates = [outcome(replace(BASE, cached_documents=kept)).hit_rate for kept in (1, 4, 16)]
    assert rates == sorted(rates)
