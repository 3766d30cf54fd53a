"""How tokens are chosen: reproducible by seed, true to the model's distribution, refused where it
means nothing."""

from collections import Counter
from math import inf, nan

import pytest
import torch
from support import FakeDrafter, answer, engine_for, finish, prompts, request_for, tiny

from lazyahead import Sampling
from lazyahead.errors import ConfigError
from lazyahead.hf.processors import picker_for
from lazyahead.sampling import Picker

TEXTS = prompts(20, 31)
WARM = Sampling(temperature=1.0, seed=5)


def sample(seed, drafter=None, num_tokens=10, sampling=WARM):
    picker = Picker(picker_for(sampling, 20, ()).processors, True, seed)
    return answer("llama", TEXTS[0], None, drafter, num_tokens, picker=picker).answer


def test_a_seed_gives_one_text_whatever_is_drafted_and_whoever_is_beside():
    bare = sample(5)
    assert sample(5) == bare
    for behaviour in ("always", "never", "sometimes", "adversarial"):
        assert sample(5, FakeDrafter(behaviour, {tuple(TEXTS[0]): bare})) == bare
    engine = engine_for("llama")
    both = [request_for(engine, text, 10, picker=picker_for(WARM, len(text), ())) for text in TEXTS]
    finish(engine, both)
    assert both[0].answer == bare


def test_seeds_that_differ_in_any_bit_give_different_noise():
    like = torch.zeros(64)
    noise = [
        Picker(do_sample=True, seed=seed)._noise(offset, like)
        for seed in (0, 1, 1 << 32, 1 << 62)
        for offset in (0, 1)
    ]
    for i, left in enumerate(noise):
        assert all(not torch.equal(left, right) for right in noise[i + 1 :])
    assert Picker(do_sample=True).seed != Picker(do_sample=True).seed


@pytest.mark.parametrize("offset", [0, 3])
def test_draws_follow_the_distribution(offset):
    """Chi-square, 7 degrees of freedom: 24.3 is exceeded once in a thousand; seeds are fixed."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -2.0])
    drawn = torch.zeros(8)
    for seed in range(2000):
        drawn[Picker(do_sample=True, seed=seed).choose(logits, offset)] += 1
    expected = 2000 * logits.softmax(-1)
    assert ((drawn - expected) ** 2 / expected).sum() < 24.3


def test_a_drafted_answer_keeps_the_distribution_of_the_model():
    """The first two tokens over 400 seeds, the likeliest pairs drafted. Chi-square against the
    model's own chances."""
    (text,) = prompts(20)
    model, picker = tiny("llama")[0], picker_for(Sampling(temperature=3.0, top_k=3), 20, ())

    def chances(ids):
        logits = picker.process(
            model(torch.tensor([ids]), use_cache=False).logits[0, -1].detach(), torch.tensor([ids])
        )
        return {token: float(p) for token, p in enumerate(logits.softmax(-1)) if p > 0}

    expected = {
        (a, b): p * q for a, p in chances(text).items() for b, q in chances([*text, a]).items()
    }
    drafter = FakeDrafter(
        "sometimes",
        {tuple(text): [*max(expected, key=expected.get), 3]},
        extra=[b for _, b in expected],
    )
    drawn = Counter()
    for seed in range(400):
        drafter.behaviour, drafter.seed = ("sometimes", "adversarial")[seed % 2], seed
        own = Picker(picker.processors, True, seed)
        drawn[tuple(answer("llama", text, None, drafter, 3, picker=own).answer[:2])] += 1
    assert set(drawn) <= set(expected)
    distance = sum((drawn[pair] - 400 * p) ** 2 / (400 * p) for pair, p in expected.items())
    assert distance < 26.1  # 8 degrees of freedom, one in a thousand


def test_the_likeliest_token_is_taken_at_temperature_zero_and_processors_are_kept_to_the_prefix():
    picker = picker_for(Sampling(frequency_penalty=2.0), 3, ())
    assert not picker.do_sample
    logits = picker.process(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2, 2, 2, 2, 1]]))
    assert logits.tolist() == [1.0, 0.0, 1.0]  # the prompt's own tokens are not counted
    assert picker_for(Sampling(), 3, ()).is_plain


def test_an_answer_longer_than_any_room_made_for_it_is_seen_whole():
    seen = []
    request = answer(
        "llama",
        [3],
        None,
        num_tokens=400,
        accept=lambda _, r: seen.append(r) if len(r.answer) == 400 else None,
    )
    assert seen[0].prefix(())[0].tolist() == [3, *request.answer]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", nan),
        ("temperature", "warm"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", "much"),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", inf),
        ("presence_penalty", 11.0),
        ("frequency_penalty", nan),
        ("no_repeat_ngram_size", -2),
        ("min_new_tokens", 300),
        ("bad_words", ((),)),
        ("bad_words", ((-1,),)),
        ("bad_words", (3,)),
        ("logit_bias", {3: nan}),
        ("logit_bias", {-3: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("stop", "end"),
        ("stop", ("",)),
        ("seed", -1),
        ("seed", 1 << 63),
        ("seed", 0.5),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name) as error:
        Sampling(**{name: value})
    for part in value.keys() if isinstance(value, dict) else (value,):
        assert str(part).strip("(),") in str(error.value)
