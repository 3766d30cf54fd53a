"""The reader's little world: invented names, facts about them, and sentences that say nothing.

Everything is drawn from a `World`, which owns one random generator and one split. A name belongs to
a split by its hash, so a name used for evaluation was never seen in training. No model and no torch
here.
"""

# ruff: noqa: SIM905 (lists of words read best as words)

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "eval"]

ONSETS = "b c d f g h j k l m n p r s t v w z br dr gr kr tr st sk pl sl fl th sh".split()
VOWELS = "a e i o u ai ea io ou".split()
CODAS = "n r l s th m nd rk x v".split()
KINDS = (
    "Station Museum Harbor Library Observatory Bridge Archive Tower "
    "Mill Academy Market Garden Clinic Theater Foundry Lighthouse"
).split()
COLORS = "red blue green amber violet silver black white crimson teal".split()
MATERIALS = "granite oak copper marble brick glass steel clay bamboo slate".split()
EMBLEMS = "eagle lion anchor crown wheel star rose whale falcon oak".split()
HOBBIES = "chess sailing botany painting fencing pottery astronomy archery".split()
ADJECTIVES = (
    "quiet busy narrow ancient modern distant famous humble crowded gentle bright hidden windy "
    "solemn cheerful rustic"
).split()
NOUNS = (
    "street river valley crowd traveler merchant window garden lantern road hillside bakery "
    "orchestra storm market festival engine painting letter carpenter"
).split()
TOPICS = (
    "violin pepper magnet glacier parrot cinema harvest compass blanket dolphin ladder volcano "
    "ribbon pyramid candle tractor spider jacket planet mirror"
).split()  # what few-shot texts are about; they occur nowhere else
VERBS = (
    "crosses follows remembers watches admires avoids repairs visits describes surrounds carries "
    "protects"
).split()
ADVERBS = (
    "slowly",
    "often",
    "rarely",
    "quietly",
    "every morning",
    "in winter",
    "after the rain",
    "before dawn",
    "at noon",
    "without a word",
    "near the coast",
)

STATEMENT = "The {a} of {e} is {v}."  # the form that answers quote
STATEMENTS = (
    STATEMENT,
    "In {e}, the {a} is {v}.",
    "For {e} the {a} is {v}.",
    "{e} has one {a}, which is {v}.",
    "Visitors of {e} learn that the {a} is {v}.",
    "According to the register, the {a} of {e} is {v}.",
    "{e} gives its {a} as {v}.",
    "Of {e} people know the {a}: {v}.",
)
HELDOUT_STATEMENTS = (
    "As for {e}, the {a} is {v}.",
    "Note that the {a} of {e} is {v}.",
    "The {a} that {e} has is {v}.",
)
QUESTIONS = (
    "What is the {a} of {e}?",
    "Tell me the {a} of {e}.",
    "Which {a} belongs to {e}?",
    "Say what the {a} of {e} is.",
    "For {e}, what is the {a}?",
)
HELDOUT_QUESTIONS = ("What {a} does {e} have?", "Please find the {a} of {e}.")


def split_of(name: str) -> Split:
    """The split a name belongs to: one name in four is kept for evaluation."""
    return "eval" if zlib.crc32(name.lower().encode()) % 4 == 0 else "train"


@dataclass(frozen=True)
class Fact:
    """One fact: the attribute, whom it is about, its value, and the sentence that states it in the
    document."""

    attribute: str
    subject: str
    value: str
    sentence: str

    @property
    def answer(self) -> str:
        """The sentence that answers; it has one form, whatever form the document uses."""
        return STATEMENT.format(a=self.attribute, e=self.subject, v=self.value)


class World:
    """Draws names, facts and filler of one split; the same generator state draws the same world."""

    def __init__(self, rng: random.Random, split: Split, heldout_templates: bool = False) -> None:
        self.rng = rng
        self.split = split
        self.statements = HELDOUT_STATEMENTS if heldout_templates else STATEMENTS
        self.questions = HELDOUT_QUESTIONS if heldout_templates else QUESTIONS
        self._heldout = heldout_templates

    def name(self) -> str:
        """An invented name of two or three syllables that belongs to this split."""
        while True:
            parts = [self._syllable() for _ in range(self.rng.choice((2, 2, 3)))]
            name = "".join(parts).capitalize()
            if split_of(name) == self.split:
                return name

    def _syllable(self) -> str:
        rng = self.rng
        return (
            rng.choice(ONSETS)
            + rng.choice(VOWELS)
            + (rng.choice(CODAS) if rng.random() < 0.4 else "")
        )

    def place(self) -> str:
        """A place such as "Velmora Station"."""
        return f"{self.name()} {self.rng.choice(KINDS)}"

    def places(self, count: int) -> list[str]:
        """Distinct places; some share their first name with another one, so that both words are
        needed."""
        found: list[str] = []
        while len(found) < count:
            near = found and self.rng.random() < 0.25
            first = self.rng.choice(found).split()[0] if near else self.name()
            place = f"{first} {self.rng.choice(KINDS)}"
            if place not in found:
                found.append(place)
        return found

    def person(self) -> str:
        return f"{self.name()} {self.name()}"

    def number(self, low: int, high: int) -> str:
        return str(self.rng.randint(low, high))

    def fact(self, attribute: str, subject: str) -> Fact:
        """A fact with a fresh value, stated in one of the sentence forms (training: mostly the
        answer's own)."""
        value = ATTRIBUTES[attribute](self)
        plain = not self._heldout and self.rng.random() < 0.3
        form = STATEMENT if plain else self.rng.choice(self.statements)
        return Fact(attribute, subject, value, form.format(a=attribute, e=subject, v=value))

    def ask(self, fact: Fact) -> str:
        return self.rng.choice(self.questions).format(a=fact.attribute, e=fact.subject)

    def filler(self) -> str:
        """A sentence that answers nothing; now and then it mentions a name."""
        rng = self.rng
        kind = self.rng.random()
        if kind < 0.45:
            subject = self._thing()
            verb = rng.choice(VERBS)
            return f"The {subject} {verb} the {self._thing()} {rng.choice(ADVERBS)}."
        if kind < 0.7:
            noun = rng.choice(NOUNS)
            verb = rng.choice(VERBS)
            return f"A {noun} {verb} every {rng.choice(NOUNS)} {rng.choice(ADVERBS)}."
        if kind < 0.95:
            words = (
                f"the {rng.choice(NOUNS)} and the {rng.choice(NOUNS)} are {rng.choice(ADJECTIVES)}"
            )
            return f"{rng.choice(ADVERBS).capitalize()}, {words}."
        return f"{self.place()} {rng.choice(VERBS)} the {self._thing()}."

    def _thing(self) -> str:
        return f"{self.rng.choice(ADJECTIVES)} {self.rng.choice(NOUNS)}"


PLACE_ATTRIBUTES: dict[str, Callable[[World], str]] = {
    "access code": lambda world: world.number(1000, 99999),
    "telephone number": lambda world: world.number(100000, 999999),
    "founding year": lambda world: world.number(1400, 2020),
    "wall color": lambda world: world.rng.choice(COLORS),
    "building material": lambda world: world.rng.choice(MATERIALS),
    "emblem": lambda world: world.rng.choice(EMBLEMS),
    "director": World.person,
    "home city": World.name,
}
PERSON_ATTRIBUTES: dict[str, Callable[[World], str]] = {
    "birthplace": World.name,
    "hobby": lambda world: world.rng.choice(HOBBIES),
    "favorite color": lambda world: world.rng.choice(COLORS),
}
ATTRIBUTES = PLACE_ATTRIBUTES | PERSON_ATTRIBUTES
