"""What rows cost is believed until passes prove it wrong."""

from lazyahead.draft.budget import RowCost
from lazyahead.draft.watch import WatchedCost

QUICK = RowCost([(1, 0.01), (8, 0.012)])
SLOW = RowCost([(1, 0.1), (8, 0.12)])


class Clock:
    """Measures these curves one after the other."""

    def __init__(self, *curves):
        self.curves, self.num = list(curves), 0

    def __call__(self):
        self.num += 1
        return self.curves[min(self.num, len(self.curves)) - 1]


def run(watched, num_passes, true=QUICK, noise=1.0):
    for _ in range(num_passes):
        watched.get()
        watched.note(4, 0, true.seconds(4) * noise)


def test_nothing_is_measured_before_it_is_needed():
    clock = Clock(QUICK)
    watched = WatchedCost(clock)
    watched.note(1, 0, 1.0)
    assert clock.num == 0
    assert watched.get() is QUICK


def test_a_curve_that_passes_keep_beating_is_measured_again():
    clock = Clock(SLOW, QUICK)
    watched = WatchedCost(clock)
    run(watched, 100)
    assert clock.num == 2
    assert watched.cost is QUICK


def test_noise_and_an_honest_curve_are_no_reason_to_measure_again():
    for noise in (0.9, 1.0, 5.0):
        clock = Clock(QUICK)
        run(WatchedCost(clock), 1000, noise=noise)
        assert clock.num == 1


def test_a_curve_that_is_not_sure_is_measured_again_but_not_for_ever():
    clock = Clock(RowCost([(1, 0.01), (8, 0.012)], is_sure=False))
    run(WatchedCost(clock), 100_000)
    assert 1 < clock.num <= 4


def test_rows_never_cost_more_than_the_steps_they_could_go_in():
    assert RowCost([(1, 1.0), (2, 50.0), (7, 90.0)]).points == ((1, 1.0), (2, 2.0), (7, 8.0))
