"""Answers name things in the order in which they were asked for: a pointer into the end of the
prompt."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

NUM_TAIL = 128
"""Prompt tokens looked at, the last ones."""
_SURE = 3  # tokens in a row that show where the answer stands
_SURER = 6  # the same, where it would have gone back
_LEAD = 2  # tokens before a quote that announce it
_MAX_GAP = 8  # tokens between two things asked for
_NUM_EARLY = 4  # tokens of an answer among which the first quote begins

Spell = Callable[[int], str]
"""What a token spells, whatever its case and the space before it."""


class Next(NamedTuple):
    """What may be quoted next."""

    tokens: list[int]
    place: int
    """Of the first token, counted from the prompt's end."""
    is_first: bool
    """Nothing was quoted before."""


def spelling(tokenizer: Any) -> Spell | None:
    """How a tokenizer's tokens are spelled; None where it does not tell."""
    text_of = getattr(tokenizer, "convert_ids_to_tokens", None)
    if text_of is None:
        return None

    @cache
    def spell(token: int) -> str:
        return str(text_of(token)).lstrip("Ġ▁ ").lower()

    return spell


class Pointer:
    """Follows an answer through the end of its prompt.

    The answer quotes a thing asked for, says something about it, and goes on with the next one. So
    where the few tokens stand that led to the last quote, another is likely to begin, as far behind
    the last in the prompt as that was behind the one before. The first is looked for where the
    prompt has the answer's first words, in another case.
    """

    def __init__(self, prompt: Sequence[int], spell: Spell | None = None) -> None:
        self._tail, self._spell = list(prompt[-NUM_TAIL:]), spell
        self._places: dict[int, list[int]] = {}  # token -> where it stands
        for place, token in enumerate(self._tail):
            self._places.setdefault(token, []).append(place)
        self._spelled: dict[str, list[int]] = {}  # spelling -> the places behind what is spelled so
        if spell is not None:
            for place, token in enumerate(self._tail, 1):
                self._spelled.setdefault(spell(token), []).append(place)
        self._runs: dict[int, int] = {}  # place behind a match that is going on -> its length
        self._written: list[int] = []
        self._end = -1  # behind the last quote; -1: there was none
        self._end_before = -1  # behind the one before
        self._is_quoting = False
        self._gap = 2  # ", the"
        self._place: int | None = None  # what a quote would go on with now
        self.lead: list[int] = []
        """What the answer wrote before the quote."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The answer goes on."""
        written, tail, places = self._written, self._tail, self._places
        for token in tokens:
            written.append(token)
            place = self._place
            if place is not None and place < len(tail) and tail[place] == token:
                self._place = place + 1
            elif self._end < 0:
                self._place = self._behind(token) if len(written) <= _NUM_EARLY else None
            else:
                self._place = self._end + self._gap if token == self.lead[-1] else None
            if token in places:
                self._measure(places[token])
            else:
                self._runs, self._is_quoting = {}, False

    def _measure(self, places: Sequence[int]) -> None:
        """Where the last quote ends, and what led to it; the last token stands at these places."""
        runs, now, length = self._runs, dict[int, int](), 0
        for place in places:
            now[place + 1] = run = runs.get(place, 0) + 1
            length = max(length, run)
        self._runs = now
        if length < _SURE:
            self._is_quoting = False
            return
        if (
            self._is_quoting
            and now.get(self._end + 1) == length
            and runs.get(self._end) == length - 1
        ):
            self._end += 1  # the quote goes on
            return
        before = self._end_before if self._is_quoting else self._end
        ends = [
            end
            for end, run in now.items()
            if run == length and (end - length >= before or run >= _SURER)
        ]
        begin = len(self._written) - length
        lead = self._written[max(0, begin - _LEAD) : begin]
        if not ends or not lead:
            return
        if not self._is_quoting:
            self._is_quoting, self._end_before = True, self._end
        self._end = next((end for end in ends if end - length >= before), ends[0])
        gap = self._end - length - before
        if before >= 0 and 0 <= gap <= _MAX_GAP:
            self._gap = gap
        self.lead = lead

    def next(self, path: Sequence[int], num_tokens: int) -> Next | None:
        """What the answer may go on with behind the guesses `path`, where the last token announces
        a quote."""
        if path:
            ahead = self._copy()
            ahead.extend(path)
            return ahead.next((), num_tokens)
        token, num_tail, rest = self._written[-1], len(self._tail), list[int]()
        place = self._place
        if place is None and token in self.lead:
            place, rest = self._end + self._gap, self.lead[self.lead.index(token) + 1 :]
        if place is None or place >= num_tail:
            return None
        return Next(
            [*rest, *self._tail[place : place + num_tokens]],
            place - len(rest) - num_tail,
            self._end < 0,
        )

    def _behind(self, token: int) -> int | None:
        """The last place behind another token that is spelled the same."""
        places = self._spelled.get(self._spell(token), ()) if self._spell is not None else ()
        return next((place for place in reversed(places) if self._tail[place - 1] != token), None)

    def _copy(self) -> "Pointer":
        """One that can go ahead: what is written into is its own."""
        ahead = Pointer.__new__(Pointer)
        ahead.__dict__.update(self.__dict__)
        ahead._written = self._written[-len(self._tail) :]
        return ahead
