"""How many requests are inside at once."""

from __future__ import annotations

from lazyahead.server.errors import busy


class Admission:
    """Counts places, one an answer. Used in the event loop only, so that it needs no lock."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self.num_taken = 0

    def enter(self, num: int = 1) -> None:
        """Takes places. Raises ApiError (429, Retry-After) where so many are not left."""
        if self.num_taken + num > self.num_places:
            raise busy()
        self.num_taken += num

    def leave(self, num: int = 1) -> None:
        self.num_taken -= num
