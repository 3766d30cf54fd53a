"""A bound on what drafting may lose where it does not pay."""


class LossLimit:
    """Bounds what drafting may lose, counted in steps without drafts.

    `balance` is what the next step may lose. It grows by `rate` with every step and by the steps
    that accepted tokens save, shrinks by what drafted rows cost, and is at most `cap`. So over any
    number of steps, drafting loses at most `rate` of the time and `start` steps.
    """

    def __init__(self, rate: float = 0.01, start: float = 1.5, cap: float = 32.0) -> None:
        self.rate = rate
        self.cap = cap
        self.balance = start

    def note(self, cost: float, gain: float) -> None:
        """A step that cost so many steps more than one without drafts, and saved so many."""
        self.balance = min(self.balance + self.rate + gain - cost, self.cap)
