"""Answers that name things in the order in which they were asked for: what is guessed, and that
guesses join up."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lazyahead.draft.question_order import Pointer, spelling
from lazyahead.draft.replay import replay
from lazyahead.draft.tree import Source
from lazyahead.draft.trie_drafter import TrieDrafter

THE, CAPITAL, COMMA, STOP, IS, WHAT = range(6)
THINGS = [[n + i for i in range(6)] for n in (10, 20, 30, 40)]
VALUES = [[50, 51], [60], [70, 71, 72], [80, 81]]
SENTENCES = [
    [CAPITAL, *thing, IS, *value, STOP] for thing, value in zip(THINGS, VALUES, strict=True)
]
QUESTION = [WHAT, *(token for thing in THINGS for token in (THE, *thing, COMMA))]
FILLER = [[90 + n, 120 + n, 150 + n, STOP] for n in range(20)]
DOCUMENT = [
    token
    for n, filler in enumerate(FILLER)
    for token in [*filler, *(SENTENCES[n // 5] if n % 5 == 0 else [])]
]
ANSWER = [token for sentence in SENTENCES for token in sentence]


def spell(token):
    return "the" if token in (THE, CAPITAL) else str(token)


def test_nothing_is_announced_before_the_first_quote_and_the_next_thing_after_it():
    pointer = Pointer(QUESTION)
    pointer.extend([CAPITAL])
    assert pointer.next((), 8) is None
    pointer.extend(ANSWER[1 : len(SENTENCES[0])])
    pointer.extend([CAPITAL])
    found = pointer.next((), 3)
    assert found is not None
    assert found.tokens == THINGS[1][:3]
    assert QUESTION[found.place :][:3] == THINGS[1][:3]


def test_the_first_quote_is_found_behind_a_word_in_another_case():
    pointer = Pointer(QUESTION, spell)
    pointer.extend([CAPITAL])
    found = pointer.next((), 2)
    assert found is not None
    assert found.is_first
    assert found.tokens == THINGS[-1][:2]  # the last place, as good as any


def test_guesses_move_a_copy_of_the_pointer():
    pointer = Pointer(QUESTION)
    pointer.extend([*SENTENCES[0], CAPITAL])
    ahead = pointer.next([*SENTENCES[1][1:], CAPITAL], 5)
    assert ahead is not None
    assert ahead.tokens == THINGS[2][:5]
    now = pointer.next((), 3)
    assert now is not None
    assert now.tokens == THINGS[1][:3]


@given(st.lists(st.integers(0, 5), max_size=20), st.lists(st.integers(0, 5), max_size=40))
def test_what_is_announced_stands_in_the_prompt(prompt, answer):
    pointer = Pointer(prompt, lambda token: str(token // 2))
    for token in answer:
        pointer.extend([token])
        found = pointer.next((), 4)
        if found is not None:
            at, end = len(prompt) + found.place, len(found.tokens)
            assert any(found.tokens[n:] == prompt[max(0, at + n) : at + end] for n in range(3))


def test_a_draft_quotes_the_question_then_the_document():
    request = TrieDrafter(capacity_bytes=0).start([*DOCUMENT, *QUESTION])
    request.extend([*SENTENCES[0], CAPITAL])
    draft = request.propose(32)
    sure = [
        draft.token_ids[node]
        for node in draft.path(max(range(len(draft)), key=lambda n: draft.depths[n]))
    ]
    assert sure[: len(SENTENCES[1]) - 1] == SENTENCES[1][1:]
    assert Source.ASKED in draft.sources
    for node, parent in enumerate(draft.parents):
        assert draft.depths[node] == (1 if parent < 0 else draft.depths[parent] + 1)


def test_lists_take_fewer_steps_than_sentences_have_quotes():
    prompt = [*DOCUMENT, *QUESTION]
    result = replay(TrieDrafter(capacity_bytes=0, spell=spell), [(prompt, ANSWER)] * 4)
    assert result.num_steps / 4 <= 2 * len(SENTENCES)


def test_acceptance_is_learned_between_requests_that_share_no_text():
    drafter = TrieDrafter(capacity_bytes=0)
    for _ in range(2):
        replay(drafter, [([*DOCUMENT, *QUESTION], ANSWER)])
    learned = drafter.namespace().acceptance
    assert drafter.namespace().shared is None
    assert learned.rates(Source.ASKED, 16) != TrieDrafter().namespace().acceptance.rates(
        Source.ASKED, 16
    )
    assert drafter.start([1, 2, 3]).propose(8) == TrieDrafter().start([1, 2, 3]).propose(8)


def test_longer_matches_of_one_source_are_never_trusted_less():
    acceptance = TrieDrafter().namespace().acceptance
    for length in (1, 2, 4, 8, 16):
        acceptance.rates(Source.PROMPT, length)[0] = 1.0 / length
    trusts = [acceptance.trust(Source.PROMPT, length) for length in (1, 2, 4, 8, 16)]
    assert all(a < b for a, b in pairwise(trusts))


def test_spelling_leaves_case_and_the_space_before_a_word_out():
    class Tokenizer:
        def convert_ids_to_tokens(self, token):
            return ["Ġthe", "The", "▁THE"][token]

    spell_it = spelling(Tokenizer())
    assert spell_it is not None
    assert {spell_it(token) for token in range(3)} == {"the"}
    assert spelling(object()) is None
