import math
import random
import re
import statistics
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanopref.data import reviews
from nanopref.data.reviews import (
    ASPECTS,
    VERDICTS,
    Film,
    clause,
    sample_prompt,
    sample_response,
    specificity,
    true_reward,
)

FILM = Film("western", "Ana Reyes", "Nora Vale", "captain")
SEEDS = st.integers(0, 10**9)
# Scrambled words of the lexicon reach far more of the reward than random characters do.
WORDS = sorted(
    {*reviews.OPINIONS, *reviews.ASPECT_OF, *VERDICTS, *reviews.DEGREES, *reviews.NEGATORS, *reviews.TURNS}
    | {*reviews.CONCESSIONS, *reviews.PAUSES, "and", "the", "isn't", "is", "."}
)
SCRAMBLE = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)


@st.composite
def grammar_reviews(draw):
    rng = random.Random(draw(SEEDS))
    return sample_response(rng, sample_prompt(rng))


TEXT = st.one_of(st.text(), st.text(st.characters(codec="ascii")), SCRAMBLE, grammar_reviews())


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(0)
    prompts = [sample_prompt(rng) for _ in range(5000)]
    return [(prompt, sample_response(rng, prompt)) for prompt in prompts]


def total(text):
    """S of the formula, for texts short enough that the squash can be undone exactly."""
    return pytest.approx(8 * math.atanh(true_reward(text) / 5), abs=1e-9)


def test_the_published_formula_on_examples_worked_by_hand():
    for text, s in {
        "The acting is superb, but the plot is not very clever.": 1.5 / 2 - 1.25 / 2,  # the docstring's example
        "The acting is superb.": 1.5,
        "The pacing is slow.": -0.5,
        "The score is rather lovely.": 0.75,
        "Truly superb acting.": 1.5 * 1.25,
        "Skip it.": -1.0,
        "Do not miss it.": 1.5,  # a phrase: its "not" negates nothing
        "I would not see it twice.": -0.75,
        "I didn’t say the plot isn't dull.": -0.25,
        "Although the cast is warm, the plot is dull.": 0.5 - 1,
        "The plot is dull, though the cast is warm.": -1 + 0.5,
        "The plot is clever, witty and dull.": 1 - 1,  # one praise and one blame of the plot
        "The plot is not thin, clever cast.": 0.25 + 1,  # the comma ends the negation
        "The plot is not thin and the cast is warm.": 0.25 + 1,
        "The very plot is dull. The cast is warm.": -1.25 + 1,  # nothing carries over a full stop
        "The cast is superb. The story is superb.": 1.5,  # the same word of praise pays once
        "I loved the film.": 1.5,
        "The very clever plot has warm acting.": 1.25 + 1,  # a degree word serves one opinion
        "Truly see it twice for the warm cast.": 1.5 * 1.25 + 1,
    }.items():
        assert s == total(text), text


def test_where_opinions_stand_and_what_each_is_paid_by_hand():
    for text, expected in {
        "The acting is superb, but the plot is not very clever.": [("superb", 0.75, 0.75), ("clever", -0.625, -0.625)],
        " Stiff cast! See it twice! İ\nSKIP IT": [("Stiff", -1, -1), ("See it twice", 1.5, 1.5), ("SKIP IT", -1, -1)],
        "The cast is warm. The cast is warm.": [("warm", 1, 1), ("warm", 1, 0)],  # the same again
        "The plot is clever. The score is clever.": [("clever", 1, 1), ("clever", 1, 0)],  # the word is used up
        "The plot is clever. The story is never dull. The plot is dull.": [  # the aspect is; blame is paid for itself
            ("clever", 1, 1), ("dull", 0.5, 0), ("dull", -1, -1)
        ],
        "İİ the film is good, İ": [("good", 1, 1)],  # of which each is two characters in lower case
        "It is. Superb.": [], "It is\rsuperb": [], "It is\nsuperb": [],
    }.items():  # fmt: skip
        assert [(text[o.start : o.end], o.value, o.paid) for o in reviews.opinions(text)] == expected, text


@given(st.one_of(TEXT, st.lists(st.sampled_from([*WORDS, "İ", "it’s", "\n", "ſ"]), max_size=40).map(" ".join)))
@example("İ" * 9 + "The film is good. İ It is bad")
def test_opinions_stand_at_their_words_in_order_and_pay_all_that_is_paid(text):
    found, end = reviews.opinions(text), 0
    for opinion in found:
        word = text[opinion.start : opinion.end].lower().replace("i\u0307", "i")
        assert word in reviews.OPINIONS or word in VERDICTS
        assert end <= opinion.start and opinion.paid in (0, opinion.value)
        end = opinion.end
    assert true_reward(text) == 5 * math.tanh(math.fsum(o.paid for o in found) / 8)
    said = [value for sentence in reviews.sentences(text) for _, _, value in reviews.judgements(sentence)]
    assert said == [opinion.value for opinion in found]
    if found:
        assert found[0].paid == found[0].value


def test_negation_flips_the_sign_and_dampens():
    for word, strength in reviews.OPINIONS.items():
        plain = true_reward(f"The plot is {word}.")
        for negator in (*reviews.NEGATORS, "isn't", "isn’t"):
            negated = true_reward(f"The plot {negator} {word}.")
            assert plain * negated < 0 and abs(negated) < abs(plain), (negator, word)
        assert plain * strength > 0


def test_the_order_of_a_contrast_matters():
    praise, blame = "the acting is warm", "the plot is dull"
    assert true_reward(f"{praise}, but {blame}.") < 0 < true_reward(f"{blame}, but {praise}.")
    assert true_reward(f"Although {praise}, {blame}.") < 0 < true_reward(f"Although {blame}, {praise}.")
    assert true_reward(f"{praise}, though {blame}.") > 0 > true_reward(f"{blame}, though {praise}.")
    assert true_reward(f"{praise} and {blame}.") == 0


@given(st.one_of(SCRAMBLE, grammar_reviews()), st.data())
@example("The plot is superb.", None)
def test_a_repeated_sentence_changes_nothing(text, data):
    sentences = [sentence for sentence in re.split(r"(?<=[.!?\n])", text + ".") if sentence]
    i = data.draw(st.integers(0, len(sentences) - 1)) if data else 0
    j = data.draw(st.integers(i + 1, len(sentences))) if data else 1
    repeated = "".join([*sentences[:j], sentences[i], *sentences[j:]])
    assert true_reward(repeated) == pytest.approx(true_reward(text), abs=1e-12)


def test_praise_pays_once_per_aspect_and_once_per_word():
    one = true_reward("The plot is clever.")
    assert one > 0
    assert true_reward("The plot is clever. The story is gripping, moving and good.") == one
    assert true_reward("The plot is clever. The cast is clever. The score is clever.") == one
    assert true_reward("The plot is clever. The cast is warm.") > one
    assert true_reward("The plot is dull. The story is silly.") == true_reward("The plot is dull.") < 0


@given(TEXT)
@example("\ud800 \x00 İ film K’t n't . , '")
@example("not " * 5000 + "good film")
def test_any_text_has_a_bounded_reward_and_specificity(text):
    assert -5 <= true_reward(text) <= 5
    assert true_reward(text) == true_reward(text)
    assert 0 <= specificity(text) <= 1


def test_praise_of_everything_stays_within_the_bound():
    everything = " ".join(
        f"The {names.split()[0]} is truly {good.split()[3]}." for names, good, _, _ in ASPECTS.values()
    )
    assert 4.5 < true_reward(everything + " See it twice.") < 5
    assert true_reward(everything) < true_reward(everything + " See it twice.")


@given(st.one_of(st.text(st.characters(codec="ascii")), SCRAMBLE, grammar_reviews()))
def test_case_does_not_matter(text):
    assert true_reward(text) == true_reward(text.upper()) == true_reward(text.lower())
    assert specificity(text) == specificity(text.upper())


@given(st.lists(st.sampled_from(sorted({*reviews.OPINIONS, *reviews.DEGREES, ",", "and", "but", ".", "not"}))))
def test_bare_lists_of_opinions_pay_nothing(words):
    assert true_reward(" ".join(words)) == 0


@given(SEEDS)
def test_text_without_an_opinion_is_zero(seed):
    aside = reviews._aside(random.Random(seed), FILM)
    assert reviews.judgements(aside.lower()) == []
    for text in ("", " ", "...", aside, "The film, the acting and the plot.", "I saw it on a train; it was not late."):
        assert true_reward(text) == 0


@given(SEEDS, st.sampled_from(sorted(ASPECTS)), st.sampled_from([1, -1]))
def test_the_reward_reads_each_clause_as_the_grammar_meant_it(seed, aspect, sign):
    for write in (clause, reviews._judge_one):
        text = write(random.Random(seed), FILM, aspect, sign)
        [(about, _, value)] = reviews.judgements(text.lower())
        assert about == aspect and value * sign > 0, text


@given(SEEDS, st.permutations(sorted(ASPECTS)), st.lists(st.sampled_from([1, -1]), min_size=2, max_size=2))
def test_the_reward_reads_both_halves_of_a_sentence_as_the_grammar_meant_them(seed, aspects, signs):
    text = reviews._judge_two(random.Random(seed), FILM, aspects[:2], signs)
    read = [(about, value > 0) for about, _, value in reviews.judgements(text.lower())]
    assert read == [(aspect, sign > 0) for aspect, sign in zip(aspects[:2], signs, strict=True)], text


def test_every_phrase_of_the_world_is_read_with_its_sign():
    for aspect, (names, praise, blame, _) in ASPECTS.items():
        for words, sign in ((praise, 1), (blame, -1)):
            for name in names.split():
                for word in words.split():
                    assert [(aspect, word, reviews.OPINIONS[word])] == reviews.judgements(f"the {name} is {word}")
                    assert reviews.OPINIONS[word] * sign > 0
    for phrase, value in VERDICTS.items():
        assert [("verdict", phrase, value)] == reviews.judgements(phrase)


def test_specificity_on_examples():
    for text, share in {
        "": 0,
        "...": 0,
        "The plot is dull.": 0,
        "Nora Vale plays the captain. The plot is dull.": 1 / 2,
        "The plot is dull. THE FINALE AT THE HARBOUR FIZZLES": 1 / 2,
        "After ten minutes I left! It was late.": 1 / 2,
        "In minute 40 the lights went out.": 1,
        "It lasts 90 minutes. Ten chapels: no chapel, no captaincy.": 1,
        "The captain. The captain. The captain.": 1 / 3,  # the same detail again tells nothing
        "The captain. The captain at the bridge.": 1,
        "Only minutes.": 0,
    }.items():
        assert specificity(text) == pytest.approx(share), text


def test_the_rewards_of_grammar_reviews_leave_room_to_climb(corpus):
    rewards = [true_reward(response) for _, response in corpus]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert abs(mean) < 0.15
    assert 1.2 < std < 2
    assert 0.45 < sum(reward > 0 for reward in rewards) / len(rewards) < 0.55
    assert sum(reward == 0 for reward in rewards) / len(rewards) < 0.05
    best = (
        " The acting is truly superb and the plot is truly gripping. The dialogue is sharp and the score is haunting."
        " The pacing is perfect. The ending is powerful. The direction is masterful. I loved the film. See it twice."
    )
    assert len(best.split()) < 45
    assert true_reward(best) > mean + 2.5 * std


def test_specificity_of_grammar_reviews_varies_and_is_independent_of_the_reward(corpus):
    shares = [specificity(response) for _, response in corpus]
    assert 0.15 < statistics.mean(shares) < 0.5 and statistics.stdev(shares) > 0.15
    assert abs(statistics.correlation(shares, [true_reward(response) for _, response in corpus])) < 0.06


def test_the_size_and_shape_of_the_world(corpus):
    assert len({prompt for prompt, _ in corpus}) > 4900
    assert len({response for _, response in corpus}) > 4900
    assert len({word for pair in corpus for text in pair for word in re.findall(r"[A-Za-z]+", text)}) <= 350
    assert 20 < statistics.mean(len(response.split()) for _, response in corpus) < 32
    for prompt, response in corpus:
        assert 10 <= len(prompt.split()) <= 18 and prompt.endswith(".")
        assert 2 <= response.count(".") <= 5 and 8 <= len(response.split()) <= 64
        assert re.fullmatch(r"( [A-Z][A-Za-z',:]*( [A-Za-z',:]+)+\.)+", response), response


def test_the_language_has_no_slips(corpus):
    for prompt, response in corpus:
        text = prompt + response
        assert not re.search(r"\b[Aa] [aeiou]|\ban [^aeiou]|\b(\w+) \1\b|\bcamera (?!work)", text), text
        assert not re.search(r"\b(performances|characters) (is|feels|\w+[^s]s)\b", text), text
        for genre in reviews.GENRES:
            assert f"this {genre}" not in response.lower() or genre in prompt
        for surname in re.findall(r"(\w+)'s", response):
            assert surname in prompt or not re.search(r" by | back ", prompt), text


def test_the_grammar_shows_what_the_task_is_about(corpus):
    for pattern in (
        r"\bnever\b",
        r"not exactly",
        r", but ",
        r"Although",
        r"I say it again",
        r"scene",
        r"See it twice",
        r"plays the",
        r"my friends",
    ):
        assert sum(bool(re.search(pattern, response)) for _, response in corpus) > 50, pattern


def test_the_same_seed_writes_the_same_review():
    def write(seed):
        rng = random.Random(seed)
        return [(prompt, sample_response(rng, prompt)) for prompt in [sample_prompt(rng) for _ in range(20)]]

    assert write(3) == write(3) != write(4)


def test_a_prompt_from_elsewhere_gets_a_review_too():
    assert sample_response(random.Random(0), "").startswith(" ")


def test_the_reward_is_cheap(corpus):
    start = time.process_time()
    for _, response in corpus:
        true_reward(response)
    assert time.process_time() - start < len(corpus) / 10_000
