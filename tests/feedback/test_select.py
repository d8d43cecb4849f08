"""Which of several answers are judged, what is said of them, and what of all this reaches the file."""

import itertools
import json
from collections import Counter

import by_hand
import numpy as np
import pytest
import torch
from helpers import beginning
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopref import models
from nanopref.data.groups import Group, write_groups
from nanopref.feedback import collect as collecting
from nanopref.feedback.collect import SELECTIONS, collect, rejection_sampled
from nanopref.feedback.rewards import Rewards, alone
from nanopref.models.sampling import Answer
from nanopref.running.flags import UserError

PEOPLE = {"noise": 0.0, "annotators": 1, "max_new_tokens": 8, "sample_batch": 8, "seed": 0}
PROMPTS = [f"p{i}" for i in range(24)]
LENGTH = alone(lambda answers: torch.tensor([float(answer.text) for answer in answers]), "number")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return models.load(by_hand.tiny_model(tmp_path_factory.mktemp("policy")))


@pytest.fixture
def given_answers(policy, monkeypatch):
    """`collect` of these answers, texts [G][K], None for one that did not end; each is worth the number it is."""

    def run(texts, judge=LENGTH, chooser=None, **more):
        def respond(policy, tokenizer, prompts, **setting):
            flat = [texts[g][k] for k in range(len(texts[0])) for g in range(len(texts))]
            assert len(prompts) == len(flat)
            return [Answer([1], [2], [], "999" if text is None else text, text is not None) for text in flat]

        monkeypatch.setattr(collecting, "respond", respond)
        prompts = [f"p{g}" for g in range(len(texts))]
        return collect(*policy, prompts, judge, chooser, answers=len(texts[0]), **PEOPLE | more)

    return run


# ---- which ones ------------------------------------------------------------------------------------------------------

numbers = st.floats(-9, 9, width=16)


@st.composite
def candidates(draw):
    """Scores [K], of heads [K, H], and those that can be used, at least two."""
    K, H = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    scores = np.array(draw(st.lists(numbers, min_size=K, max_size=K)))
    heads = np.array(draw(st.lists(numbers, min_size=K * H, max_size=K * H))).reshape(K, H)
    usable = draw(st.lists(st.integers(0, K - 1), min_size=2, max_size=K, unique=True))
    return scores, heads, sorted(usable)


@given(candidates(), st.integers(0, 99))
@settings(max_examples=60)
def test_selections_are_what_they_are_called_by_brute_force(found, seed):
    """Of those that can be used alone; two are two."""
    scores, heads, usable = found
    chosen = {
        how: select(scores, heads, usable, 0.5, np.random.default_rng(seed)) for how, select in SELECTIONS.items()
    }
    for how, numbers in chosen.items():
        assert set(numbers) <= set(usable) and len(set(numbers)) == len(numbers) == (1 if how == "best" else 2)
    best, worst = chosen["best-worst"]
    assert scores[best] == max(scores[usable]) and scores[worst] == min(scores[usable])
    assert scores[chosen["best"][0]] == max(scores[usable])

    def disagreement(a: int, b: int) -> float:
        differences = [heads[a, h] - heads[b, h] for h in range(heads.shape[1])]
        mean = sum(differences) / len(differences)
        return sum((x - mean) ** 2 for x in differences) / len(differences)

    most = max(disagreement(a, b) for a, b in itertools.combinations(usable, 2))
    assert disagreement(*chosen["doubt"]) == pytest.approx(most, rel=1e-9, abs=1e-12)


P_REF = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
R, BETA = np.array([0.0, 0.5, -1.0, 1.0, 0.8]), 0.6


def drawn(select, n: int = 3000, K: int = 40) -> np.ndarray:
    """How often each of five answers is the first and the second that `select` takes, of K drawn from π_ref [2, 5]."""
    rng, counts = np.random.default_rng(0), np.zeros((2, 5))
    for _ in range(n):
        answers = rng.choice(5, size=K, p=P_REF)
        for place, k in enumerate(select(R[answers], R[answers, None], list(range(K)), BETA, rng)):
            counts[place, answers[k]] += 1
    return counts


def test_rejection_sampling_draws_from_the_optimal_policy():
    """π* ∝ π_ref e^{r/β} (Liu et al. 2023, statement 1): χ² of four degrees of freedom below its 0.999 quantile, 18.5.
    Two of the candidates as they come are from π_ref, which is far from that."""
    best = P_REF * np.exp(R / BETA)
    best /= best.sum()

    def distances(select) -> list[float]:
        return [float(((x - x.sum() * best) ** 2 / (x.sum() * best)).sum()) for x in drawn(select)]

    assert max(distances(rejection_sampled)) < 18.5
    assert min(distances(lambda scores, heads, usable, beta, rng: (0, 1))) > 500
    colder = lambda scores, heads, usable, beta, rng: rejection_sampled(scores, heads, usable, 1.3 * beta, rng)  # noqa: E731
    assert min(distances(colder)) > 40


def test_rejection_sampling_never_takes_one_twice_and_comes_to_an_end():
    """However cold: the best is always taken, and then the best of the rest."""
    for seed in range(20):
        scores = np.array([0.0, 5.0, 1.0, 3.0])
        rng = np.random.default_rng(seed)
        assert rejection_sampled(scores, scores[:, None], [0, 2, 3], 1e-3, rng) == (3, 2)
    assert len(set(rejection_sampled(np.zeros(2), np.zeros((2, 1)), [0, 1], 1.0, np.random.default_rng(0)))) == 2


# ---- from answers to groups ------------------------------------------------------------------------------------------


def test_all_gives_every_pair_or_the_answers_at_once(given_answers):
    texts = [[str(10 * g + k) for k in (2, 0, 3, 1)] for g in range(24)]
    pairs, figures = given_answers(texts)
    assert figures["answers"] == 96 and len(pairs) == 24 * 6
    for g, x in enumerate(PROMPTS):
        mine = {pair.responses for pair in pairs if pair.prompt == x}
        expected = {(str(10 * g + b), str(10 * g + a)) for a, b in itertools.combinations(range(4), 2)}
        assert mine == expected
    rankings, _ = given_answers(texts, feedback="rankings")
    assert rankings == [Group(x, tuple(str(10 * g + k) for k in (3, 2, 1, 0))) for g, x in enumerate(PROMPTS)]


UNUSABLE = [
    [" ", "1", "9", "4"],  # an empty one: the others are still there
    ["3", None, "7", "5"],  # one without an end, which would be the best
    [None, "", "6", "2"],
    ["", None, " ", "8"],  # one alone is no pair
    [None, "", "", None],
]


@pytest.mark.parametrize(
    "select, expected",
    [
        ("best-worst", [("9", "1"), ("7", "3"), ("6", "2")]),
        ("best", [("9",), ("7",), ("6",)]),
    ],
)
def test_answers_that_are_empty_or_have_no_end_are_never_selected(select, expected, given_answers):
    feedback = "responses" if select == "best" else "pairs"
    found, figures = given_answers(UNUSABLE + UNUSABLE[:3] * 10, select=select, feedback=feedback)
    assert [group.responses for group in found] == expected * 11
    assert [group.prompt for group in found][:4] == ["p0", "p1", "p2", "p5"]
    assert figures["score"] == pytest.approx((11 * (1 + 9 + 4 + 3 + 7 + 5 + 6 + 2) + 8) / 89)  # of those that are there


def test_with_all_what_can_be_used_of_such_answers_is(given_answers):
    found, _ = given_answers(UNUSABLE + UNUSABLE[:3] * 10)
    first = [("9", "1"), ("4", "1"), ("9", "4")]
    assert [x.responses for x in found if x.prompt == "p0"] == first
    assert [x.responses for x in found if x.prompt == "p2"] == [("6", "2")]
    assert not [x for x in found if x.prompt in ("p3", "p4")]


def test_ties_are_no_pair_to_people_who_never_err(given_answers):
    """Of equal worth, not of equal text; those who err may prefer either."""
    half = alone(lambda answers: torch.tensor([float(int(answer.text) // 2) for answer in answers]))
    texts = [["4", "5"]] * 10 + [["2", "7"]] * 30
    found, _ = given_answers(texts, judge=half)
    assert [group.responses for group in found] == [("7", "2")] * 30
    found, _ = given_answers(texts, judge=half, noise=0.1)
    assert len(found) == 40 and len({group.responses for group in found[:10]}) == 2


def test_where_all_answers_are_alike_few_pairs_are_said(given_answers):
    same = alone(lambda answers: torch.ones(len(answers)))
    with pytest.raises(UserError, match="only 0 of 24 pairs can be used"):
        given_answers([["1", "2"]] * 24, judge=same)


def test_the_chooser_selects_and_the_judge_judges(given_answers):
    """Best and worst by one, ordered by the other."""
    ones = alone(lambda answers: torch.tensor([float(answer.text) % 10 for answer in answers]))
    found, figures = given_answers([["51", "12", "33", "24"]] * 24, chooser=ones, select="best-worst")
    assert [group.responses for group in found] == [("51", "24")] * 24
    assert figures["score"] == 30
    found, _ = given_answers([["51", "12", "33", "24"]] * 24, select="best-worst")
    assert [group.responses for group in found] == [("51", "12")] * 24


def test_doubt_asks_the_heads_of_the_choosers_models(given_answers, policy, monkeypatch):
    """Not its score: here the heads agree on all but the order of the middle two."""
    heads = {"1": (9.0, 9.0), "2": (3.0, 0.0), "3": (0.0, 3.0), "4": (-9.0, -9.0)}
    monkeypatch.setattr(Rewards, "heads", lambda self, answers: torch.tensor([heads[a.text] for a in answers]))
    found, _ = given_answers([["1", "2", "3", "4"]] * 24, select="doubt")
    assert [group.responses for group in found] == [("3", "2")] * 24


def test_a_round_has_random_numbers_of_its_own(given_answers):
    texts = [[str(k) for k in range(8)]] * 24
    rounds = [[g.responses for g in given_answers(texts, select="rso", beta=5.0, round=i)[0]] for i in (0, 0, 1)]
    assert rounds[0] == rounds[1] != rounds[2]


# ---- several judges --------------------------------------------------------------------------------------------------


def test_the_file_says_which_judge_spoke_most_for_the_better_answer(given_answers):
    """By weight: what leads the first answer over the last. Where all was said against it there is no reason."""
    tens = lambda answers: torch.tensor([float(answer.text) // 10 for answer in answers])  # noqa: E731
    ones = lambda answers: torch.tensor([float(answer.text) % 10 for answer in answers])  # noqa: E731
    both = Rewards({"tens": tens, "ones": ones}, torch.tensor([1.0, 2.0]), [])
    found, figures = given_answers([["31", "12"], ["19", "53"], ["42", "10"], ["51", "12"]] * 8, judge=both)
    assert [(group.responses, dict(group.about)) for group in found[:4]] == [
        (("19", "53"), {"why": "ones"}),
        (("42", "10"), {"why": "ones"}),
        (("51", "12"), {"why": "tens"}),
        (("19", "53"), {"why": "ones"}),
    ]  # 31 and 12 are worth 5 each: no pair
    assert len(found) == 24
    assert figures["score tens"] == pytest.approx((3 + 1 + 1 + 5 + 4 + 1 + 5 + 1) / 8)
    assert figures["score"] == pytest.approx(figures["score tens"] + 2 * figures["score ones"])
    (first, *_), alone_found = write_groups(found).splitlines(), given_answers([["1", "2"]] * 24)[0]
    assert json.loads(first) == {"prompt": "p1", "chosen": "19", "rejected": "53", "why": "ones"}
    assert all(group.about == () for group in alone_found)  # of one judge there is nothing to tell


def test_against_all_judges_there_is_no_reason(given_answers):
    both = Rewards(dict.fromkeys("ab", LENGTH.parts["number"]), torch.tensor([1.0, 1.0]), [])
    found, _ = given_answers([["3", "1"]] * 200, judge=both, noise=3.0)
    right, wrong = ([g for g in found if g.responses[0] == first] for first in "31")
    assert len(right) > 120 and len(wrong) > 20
    assert {dict(g.about).get("why") for g in right} == {"a"} and {g.about for g in wrong} == {()}


# ---- several voters --------------------------------------------------------------------------------------------------

VOTERS = (0.0, 0.0, 0.0, 50.0, 50.0)
TEXTS = [[str(g % 7), str((3 * g + 1) % 7)] for g in range(140) if g % 7 != (3 * g + 1) % 7]


@pytest.mark.parametrize("votes", ["majority", "count", "dawid-skene"])
def test_votes_reach_the_file(votes, given_answers):
    """Who was for the answer that the file has first; each vote a pair, or one on which those who never err agree."""
    found, figures = given_answers(TEXTS, voters=VOTERS, votes=votes)
    rows = [json.loads(line) for line in write_groups(found).splitlines()]
    by_prompt = {f"p{g}": texts for g, texts in enumerate(TEXTS)}
    assert len(rows) == len(TEXTS) * (5 if votes == "count" else 1)
    for row in rows:
        said = row["votes"]
        assert len(said) == 5 and said[:3] == [int(int(row["chosen"]) > int(row["rejected"]))] * 3
        if votes != "count":
            assert int(row["chosen"]) > int(row["rejected"])
    if votes == "count":
        for prompt, (first, second) in by_prompt.items():
            mine = [row for row in rows if row["prompt"] == prompt]
            chosen = Counter(row["chosen"] for row in mine)
            assert chosen[mine[0]["chosen"]] == sum(mine[0]["votes"]) and chosen[first] + chosen[second] == 5
    unreliable = [int(row["votes"][3]) for row in rows]
    assert 0.3 < np.mean(unreliable) < 0.7
    assert [voter["noise"] for voter in figures["voters"]] == list(VOTERS)
    accuracy = [voter["accuracy"] for voter in figures["voters"]]
    assert min(accuracy[:3]) > 0.9 > 0.7 > max(accuracy[3:])
    assert {"noise", "accuracy", "estimated_noise"} == figures["voters"][0].keys()


@pytest.mark.parametrize("votes", ["majority", "dawid-skene"])
def test_a_reliable_voter_counts_for_more_with_dawid_and_skene_alone(votes, given_answers):
    """Two good ones against three who guess: the majority is often wrong."""
    texts = [[str(k) for k in np.random.default_rng(g).permutation(9)[:2]] for g in range(400)]
    found, _ = given_answers(texts, voters=(0.5, 0.5, 30.0, 30.0, 30.0), votes=votes)
    right = np.mean([int(g.responses[0]) > int(g.responses[1]) for g in found])
    assert (right > 0.93) if votes == "dawid-skene" else (0.7 < right < 0.92)


@pytest.mark.parametrize("feedback", ["labels", "rankings", "ratings"])
def test_voters_of_their_own_noise_say_the_other_kinds_too(feedback, given_answers):
    """Those who never err as the rewards have it; among them three who guess are heard."""
    texts = [[str(k) for k in np.random.default_rng(g).permutation(9)[:3]] for g in range(100)]
    exact, figures = given_answers(texts, voters=(0.0, 0.0, 0.0), feedback=feedback)
    assert "voters" not in figures
    plain, _ = given_answers(texts, feedback=feedback)
    if feedback == "labels":  # those of the middle are labelled by chance
        exact, plain = ([g for g in found if g.responses != ("4",)] for found in (exact, plain))
    assert [g.responses for g in exact] == [g.responses for g in plain]
    assert [g.scores for g in exact] == [g.scores for g in plain]
    noisy, _ = given_answers(texts, voters=(30.0, 30.0, 30.0), feedback=feedback)
    if feedback == "labels":
        noisy = [g for g in noisy if g.responses != ("4",)]
    assert (
        np.mean([(a.responses, a.scores) == (b.responses, b.scores) for a, b in zip(noisy, plain, strict=True)]) < 0.7
    )


# ---- the figures of a run --------------------------------------------------------------------------------------------


def test_what_is_thought_of_all_answers_is_noted_by_round(policy, tmp_path, monkeypatch, capsys):
    """Each round in a file of its own, the voters' own lines on the terminal, and a share of the prompts."""
    asked = []
    found = [Group(x, ("a", "b")) for x in PROMPTS]
    voter = {"noise": 2.0, "accuracy": 0.75, "estimated_noise": 1.5}

    def collected(policy, tokenizer, prompts, *who, **more):
        asked.append((prompts, more["round"]))
        return found, {"score": 0.5 + more["round"], "voters": [voter]}

    monkeypatch.setattr(collecting, "collect", collected)
    plain = {"data": "", "prompts": 65, "noise": 0.0, "loss": "dpo", "select": "all", "voters": (2.0,), "answers": 2}
    run = beginning(tmp_path / "run", **PEOPLE | plain | {"votes": "majority", "feedback": "pairs", "rounds": 3})
    for i in range(3):
        run._round = i
        collecting.ensure_feedback(run, *policy, LENGTH, None, {"dpo": ("pairs",)}, i, 3)
    rows = [{"round": i + 1, "score": 0.5 + i, "voters": [voter]} for i in range(3)]
    assert collecting.asked_in_rounds(run) == rows and [i for _, i in asked] == [0, 1, 2]
    assert [len(prompts) for prompts, _ in asked] == [21, 21, 21]
    whole = collecting.training_prompts("", 63, "pairs 0")
    assert [x for prompts, _ in asked for x in prompts] == whole
    assert capsys.readouterr().out.count("voter of noise 2: by all votes right in 75%") == 3
