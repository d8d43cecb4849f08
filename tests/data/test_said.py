"""What was said of answers: labels of pairs, ratings on one scale, answers to other prompts, numbers beside rows."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_models import message_of

from nanopref.data.formats import read
from nanopref.data.groups import Encoded, Group, as_labels, encode, grouped, standardised, unrelated, write_groups
from nanopref.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the film was good. the film was bad."], 270)
numbers = st.floats(-1e6, 1e6)


# ---- groups into groups ----------------------------------------------------------------------------------------------


def test_a_pair_is_two_labels_and_labels_stay_as_they_are():
    pair = Group("p", ("good", "bad"), margin=3.0, source="s", whole=True)
    label = Group("q", ("answer",), scores=(0.0,))
    met = Group("x", ("a", "b"), prompts=("x", "y"))
    assert as_labels([pair, label, met]) == [
        Group("p", ("good",), margin=3.0, scores=(1.0,), source="s"),
        Group("p", ("bad",), margin=3.0, scores=(0.0,), source="s"),
        label,
        Group("x", ("a",), scores=(1.0,)),
        Group("y", ("b",), scores=(0.0,)),
    ]
    assert as_labels(as_labels([pair, met])) == as_labels([pair, met])


def rated(*ratings) -> list[Group]:
    return [Group("p", tuple(map(str, range(len(scores)))), margin=2.0, scores=scores) for scores in ratings]


@given(st.lists(st.lists(numbers, min_size=2, max_size=5).map(tuple), min_size=1, max_size=6), numbers, numbers)
def test_ratings_have_mean_0_and_deviation_1_over_the_training_groups_alone(ratings, a, b):
    every = np.array([score for scores in ratings for score in scores])
    assume(every.std() > 1e-3 * max(1, abs(every).max()))
    training, held_out = standardised("f", rated(*ratings), rated((a, b)))
    found = np.array([score for group in training for score in group.scores])
    assert found.mean() == pytest.approx(0, abs=1e-6) and found.std() == pytest.approx(1)
    expected = tuple((x - every.mean()) / every.std() for x in (a, b))  # by the numbers of training
    assert held_out == [rated((a, b))[0]._replace(scores=pytest.approx(expected, rel=1e-6, abs=1e-6))]
    assert [group._replace(scores=()) for group in training] == [g._replace(scores=()) for g in rated(*ratings)]
    assert [len(group.scores) for group in training] == list(map(len, ratings))


@pytest.mark.parametrize("ratings", [(4.0, 4.0), (0.0, 0.0), (0.1, 0.1, 0.1), (-1e9 / 3,) * 7], ids=str)
def test_ratings_that_are_all_equal_are_refused(ratings):
    """Whatever rounding makes of their deviation; those held out help nobody."""
    message = message_of(standardised, "f.jsonl", rated(ratings), rated((5.0, 4.0)))
    assert message.startswith("f.jsonl: all ratings are equal")


def test_ratings_that_lie_close_far_from_0_are_told_apart():
    training, held_out = standardised("f", rated((1e6 + 1, 1e6 - 1)), rated((1e6 + 2, 1e6)))
    assert training[0].scores == (1.0, -1.0) and held_out[0].scores == (2.0, 0.0)
    assert all(type(score) is float for group in training + held_out for score in group.scores)


labels = st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=24).map(
    lambda rows: [Group(x, (f"{x}{i}",), scores=(float(good),)) for i, (x, good) in enumerate(rows)]
)


@settings(max_examples=200)
@given(labels)
def test_an_unrelated_answer_is_one_to_another_prompt(groups):
    found = unrelated(groups)
    several = len({group.prompt for group in groups}) > 1
    assert [group._replace(responses=()) for group in found] == [group._replace(responses=()) for group in groups]
    for group, other in zip(groups, found, strict=True):
        assert not several or other.responses[0][0] != group.prompt
        assert other.responses in {other.responses for other in groups}
    assert unrelated(groups) == found


def test_unrelated_answers_are_drawn_from_all_over_the_file():
    """Each answer of distinct prompts goes to one other prompt, and not to the next one in the file."""
    groups = [Group(f"p{i}", (f"{i}",), scores=(1.0,)) for i in range(200)]
    state = random.getstate()
    found = [int(group.responses[0]) for group in unrelated(groups)]
    assert random.getstate() == state
    assert sorted(found) == list(range(200))
    assert sum(abs(i - j) < 5 for i, j in enumerate(found)) < 30


@pytest.mark.parametrize("rare", ["a", "q", "z"])
def test_where_nearly_all_share_a_prompt_they_share_the_few_other_answers(rare):
    groups = [Group("p", (f"p{i}",), scores=(1.0,)) for i in range(50)]
    groups[20:20] = [Group(rare, (f"{rare}{i}",), scores=(0.0,)) for i in range(2)]
    found = unrelated(groups)
    assert {g.responses[0][0] for g in found if g.prompt == rare} == {"p"}
    taken = Counter(group.responses[0] for group in found if group.prompt == "p")
    assert taken == {f"{rare}0": 25, f"{rare}1": 25}  # neither more than the other


class Prompt(str):
    """A prompt that counts how often it is compared with others."""

    __slots__, compared = (), 0

    def __eq__(self, other):
        Prompt.compared += 1
        assert Prompt.compared < 1_000_000, "time grows with the square of the rows"
        return str.__eq__(self, other)

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__


@pytest.mark.parametrize("others", [0, 1])
def test_a_large_file_of_one_prompt_takes_no_longer_than_another(others):
    Prompt.compared, prompt = 0, Prompt("p")
    groups = [Group(prompt, (f"{i}",), scores=(1.0,)) for i in range(100_000)]
    groups += [Group(Prompt("q"), ("other",), scores=(0.0,)) for _ in range(others)]
    found = unrelated(groups)
    assert sum(group.responses == ("other",) for group in found) == others * 100_000


def test_one_prompt_has_no_unrelated_answer():
    """Then another's to the same prompt must do; a single group keeps its own."""
    groups = [Group("p", (f"{i}",), scores=(1.0,)) for i in range(5)]
    found = unrelated(groups)
    assert Counter(group.responses for group in found) == Counter(group.responses for group in groups)
    assert all(a.responses != b.responses for a, b in zip(groups, found, strict=True))
    assert unrelated(groups[:1]) == groups[:1] and unrelated([]) == []


# ---- numbers beside rows ---------------------------------------------------------------------------------------------


def some(kind: str, i: int) -> Group:
    answers = tuple(f" the film {j}{i}" for j in range(4))
    return {
        "pair": Group(f"p{i}", answers[:2], margin=-0.5 * i),
        "ranking": Group(f"p{i}", answers),
        "ratings": Group(f"p{i}", answers[:3], scores=(1.5 + i, i - 2.0, -3.0)),
        "label": Group(f"p{i}", answers[:1], scores=(float(i % 2),)),
        "met": Group(f"p{i}", answers[:2], margin=2.0, prompts=(f"p{i}", f"q{i}")),
        "whole": Group(f"p{i}", answers[:1], whole=True),
        "whole pair": Group(f"p{i}", answers[:2], margin=7.0, whole=True),
    }[kind]


KINDS = ["pair", "ranking", "ratings", "label", "met", "whole", "whole pair"]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=9), st.randoms())
def test_what_was_said_stands_beside_its_rows(kinds, rng):
    """Streams of what is to be learnt whole come behind, and nothing is said of them."""
    groups = [some(kind, i) for i, kind in enumerate(kinds)]
    data, _ = encode(groups, TOKENIZER, 24)
    spoken = [group for group, kind in zip(groups, kinds, strict=True) if kind != "whole"]
    blocks = len(data) - len(spoken)
    assert (blocks > 0) == ("whole" in kinds)
    said, margins = [], []
    for group in spoken:
        said.append(list(group.scores) or [k * -1e30 for k in range(len(group.responses))])
        margins.append([group.margin] + [0.0] * (len(group.responses) - 1))
    said, margins = said + [[0.0]] * blocks, margins + [[0.0]] * blocks
    assert data.said.dtype == data.margins.dtype == torch.float32
    torch.testing.assert_close(data.said, torch.tensor([x for group in said for x in group]), rtol=0, atol=0)
    torch.testing.assert_close(data.margins, torch.tensor([x for group in margins for x in group]), rtol=0, atol=0)
    chosen = rng.sample(range(len(data)), len(data))
    batch = data.collate(chosen)
    assert batch.sizes == [len(said[g]) for g in chosen]
    for found, wanted in ((batch.said, said), (batch.margins, margins)):
        values, there = grouped(found, batch.sizes)
        for row, mask, g in zip(values, there, chosen, strict=True):
            torch.testing.assert_close(row[mask], torch.tensor(wanted[g]), rtol=0, atol=0)
    alone = data.single_rows()
    assert torch.equal(alone.said, data.said) and torch.equal(alone.margins, data.margins)
    moved = batch.to(torch.device("meta"))
    assert moved.said.is_meta and moved.margins.is_meta and moved.tokens.is_meta and moved.last.is_meta


def test_an_order_says_more_than_any_rating_and_is_finite():
    said = torch.tensor(Group("p", ("a",) * 64).said())
    assert said[0] == 0 and said.isfinite().all() and (said.diff() < -1e29).all()
    assert Group("p", ("a", "b"), scores=(0.5, -2.0)).said() == (0.5, -2.0)
    assert Group("p", ("a",), scores=(0.0,)).said() == (0.0,)


def test_the_digest_knows_what_was_said():
    groups = [some(kind, i) for i, kind in enumerate(KINDS)]
    digests = {encode(groups, TOKENIZER, 24)[0].digest() for _ in range(2)}
    assert len(digests) == 1
    label, ratings, pair = 3, 2, 0
    for g, change in [
        (label, {"scores": (0.0,)}),
        (ratings, {"scores": (3.5, 0.0, -3.1)}),
        (ratings, {"scores": (0.0, 3.5, -3.0)}),
        (ratings, {"margin": 2.0}),
        (pair, {"margin": 0.5}),
    ]:
        changed = list(groups)
        changed[g] = groups[g]._replace(**change)
        assert changed[g] != groups[g]
        digests.add(encode(changed, TOKENIZER, 24)[0].digest())
    assert len(digests) == 6
    data, _ = encode(groups, TOKENIZER, 24)
    assert replace(data, said=data.margins, margins=data.said).digest() not in digests


def test_of_rows_of_which_nothing_was_said_it_is_0():
    data = Encoded.pack([[([1], [2]), ([1], [3])], [([4], [5])]], said=[1.0])
    assert data.said.tolist() == [1.0, 0.0, 0.0] and data.margins.tolist() == [0.0] * 3
    empty, _ = encode([], TOKENIZER, 24)
    assert len(empty) == len(empty.said) == len(empty.margins) == 0 and empty.digest()


# ---- files -----------------------------------------------------------------------------------------------------------

texts = st.text(max_size=12)
answers = st.lists(texts, min_size=2, max_size=4, unique=True).filter(lambda found: found[0].strip()).map(tuple)
pairs = st.tuples(texts, answers, st.floats(-9, 9)).map(lambda x: Group(x[0], x[1][:2], x[2]))
rankings = st.tuples(texts, answers.filter(lambda found: len(found) > 2)).map(lambda x: Group(*x))
ratings = st.tuples(texts, answers, st.lists(numbers, min_size=4, max_size=4)).map(
    lambda x: Group(x[0], x[1], scores=tuple(sorted(x[2][: len(x[1])], reverse=True)))
)
judged = st.tuples(texts, texts.filter(str.strip), st.sampled_from([0.0, 1.0])).map(
    lambda x: Group(x[0], (x[1],), scores=(x[2],))
)
KINDS_OF_FILES = {"pairs": pairs, "rankings": rankings, "ratings": ratings, "labels": judged}


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_what_is_written_is_read_again(tmp_path_factory, kind, data):
    groups = data.draw(st.lists(KINDS_OF_FILES[kind], min_size=1, max_size=5))
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    path.write_text(write_groups(groups), encoding="utf-8", newline="")
    assert read(path) == (kind, groups, Counter())
