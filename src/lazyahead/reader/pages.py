"""Pages: a document with all of its questions and answers, one builder for each task.

Training packs all questions of a page after its document, evaluation uses one of them. Lengths are
in characters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lazyahead.reader.world import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, TOPICS, Fact, World

ORDINALS = ("First", "Second", "Third", "Last")
ARGUMENTS = "x y z rate count value index total width height depth offset".split()  # noqa: SIM905


@dataclass(frozen=True)
class Page:
    """A document and the (question, answer) pairs it supports."""

    document: str
    exchanges: tuple[tuple[str, str], ...]


def _spread(world: World, sentences: list[str], chars: int) -> list[str]:
    """The sentences in random order among filler, together about `chars` characters."""
    mixed = list(sentences)
    room = chars - sum(len(sentence) + 1 for sentence in sentences)
    while room > 0:
        mixed.append(world.filler())
        room -= len(mixed[-1]) + 1
    world.rng.shuffle(mixed)
    return mixed


def _passages(world: World, sentences: list[str], chars: int) -> str:
    """The sentences spread over numbered passages of some 150 tokens or more."""
    mixed = _spread(world, sentences, chars)
    count = max(2, min(len(mixed), chars // 900, 40))
    cuts = [
        0,
        *sorted(world.rng.sample(range(1, len(mixed)), min(count - 1, len(mixed) - 1))),
        len(mixed),
    ]
    parts = [" ".join(mixed[a:b]) for a, b in pairwise(cuts)]
    return "\n".join(f"Passage {i}: {part}" for i, part in enumerate(parts, 1))


def _place_facts(world: World, chars: int) -> list[Fact]:
    """One to three facts about each of several places; more places in longer documents."""
    facts: list[Fact] = []
    for place in world.places(max(2, min(chars // 500, 40))):
        names = world.rng.sample(sorted(PLACE_ATTRIBUTES), world.rng.randint(1, 3))
        facts += [world.fact(name, place) for name in names]
    return facts


def _shuffled(world: World, exchanges: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    world.rng.shuffle(exchanges)
    return tuple(exchanges)


def single_doc_qa(world: World, chars: int) -> Page:
    """One document, one fact: "The access code of Velmora Station is 48312."."""
    facts = _place_facts(world, chars)
    document = " ".join(_spread(world, [fact.sentence for fact in facts], chars))
    return Page(document, _shuffled(world, [(world.ask(fact), fact.answer) for fact in facts]))


def multi_doc_qa(world: World, chars: int) -> Page:
    """Two facts of different passages, the second about the person the first one names."""
    sentences: list[str] = []
    exchanges: list[tuple[str, str]] = []
    for place in world.places(max(2, min(chars // 600, 30))):
        director = world.fact("director", place)
        detail = world.fact(world.rng.choice(sorted(PERSON_ATTRIBUTES)), director.value)
        sentences += [director.sentence, detail.sentence]
        form = world.rng.choice(world.questions)
        question = form.format(a=detail.attribute, e=f"the director of {place}")
        exchanges.append((question, f"{director.answer} {detail.answer}"))
    return Page(_passages(world, sentences, chars), _shuffled(world, exchanges))


def summarization(world: World, chars: int) -> Page:
    """Four points among other sentences; the summary quotes them in their order."""
    facts = [
        world.fact(world.rng.choice(sorted(PLACE_ATTRIBUTES)), place) for place in world.places(4)
    ]
    points = [
        f"{ordinal} point: {fact.sentence}" for ordinal, fact in zip(ORDINALS, facts, strict=True)
    ]
    others = [fact.sentence for fact in _place_facts(world, chars // 2)] if chars > 1000 else []
    mixed = _spread(world, others, chars - sum(len(point) + 1 for point in points))
    places = sorted(world.rng.randint(0, len(mixed)) for _ in points)
    for place, point in zip(reversed(places), reversed(points), strict=True):
        mixed.insert(place, point)
    return Page(" ".join(mixed), (("What are the main points?", " ".join(points)),))


def few_shot(world: World, chars: int) -> Page:
    """Labelled examples; the label follows from the last word of the text."""
    keys = world.rng.sample(TOPICS, world.rng.randint(4, 10))
    labels = {key: world.name().lower() for key in keys}

    def text(key: str) -> str:
        return f"{world.filler()[:-1]} and the {key}."

    lines = [f"Text: {text(key)}\nLabel: {labels[key]}" for key in keys]
    room = chars - sum(len(line) + 1 for line in lines)
    while room > 0:
        key = world.rng.choice(keys)
        lines.append(f"Text: {text(key)}\nLabel: {labels[key]}")
        room -= len(lines[-1]) + 1
    world.rng.shuffle(lines)
    exchanges = [(f"Text: {text(key)}", labels[key]) for key in keys]
    return Page("\n".join(lines), _shuffled(world, exchanges))


def synthetic(world: World, chars: int) -> Page:
    """Pass keys hidden in filler."""
    sentences = []
    exchanges = []
    for _ in range(max(3, min(chars // 700, 40))):
        name = world.name()
        key = world.number(10000, 99999)
        sentence = f"The pass key of {name} is {key}."
        sentences.append(sentence)
        exchanges.append((f"What is the pass key of {name}?", sentence))
    return Page(_passages(world, sentences, chars), _shuffled(world, exchanges))


def code(world: World, chars: int) -> Page:
    """A file of functions, each called once; the line to complete is that call."""
    parts: list[str] = []
    exchanges: list[tuple[str, str]] = []
    room = chars
    while room > 0 or len(exchanges) < 2:
        name = f"{world.name()}_{world.name()}".lower()
        parameters = ", ".join(world.rng.sample(ARGUMENTS, world.rng.randint(1, 3)))
        call = f"result = {name}({parameters}) * {world.number(2, 99)}"
        body = f"    # {world.filler()}\n    return {parameters.replace(', ', ' + ')}\n"
        signature = f"def {name}({parameters}):\n{body}"
        use = f"    {call}\n    # {world.filler()}\n"
        parts += [signature, use]
        room -= len(signature) + len(use) + 2
        exchanges.append((f"Complete the line: result = {name}(", call))
    world.rng.shuffle(parts)
    return Page("\n".join(parts).rstrip(), _shuffled(world, exchanges))


BUILDERS: dict[str, Callable[[World, int], Page]] = {
    "single_doc_qa": single_doc_qa,
    "multi_doc_qa": multi_doc_qa,
    "summarization": summarization,
    "few_shot": few_shot,
    "synthetic": synthetic,
    "code": code,
}


def several(world: World, chars: int) -> Page:
    """Questions for five facts at once, answered by their five sentences (the `rag` workload)."""
    facts = _place_facts(world, chars)
    document = _passages(world, [fact.answer for fact in facts], chars)
    exchanges = []
    for _ in range(max(1, len(facts) // 5)):
        chosen = world.rng.sample(facts, min(5, len(facts)))
        wanted = [f"the {fact.attribute} of {fact.subject}" for fact in chosen]
        question = "What are " + ", ".join(wanted[:-1]) + f" and {wanted[-1]}?"
        exchanges.append((question, " ".join(fact.answer for fact in chosen)))
    return Page(document, tuple(exchanges))
