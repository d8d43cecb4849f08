"""A file of votes: what is read of it, what of it still stands, and the pairs that are made of it."""

import json
from collections import Counter

import pytest
from files import feedback, jsonl, judged, refusal
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data.formats import read, read_feedback, read_prompts, read_to_imitate
from nanopref.data.groups import Group
from nanopref.data.votes import (
    AGGREGATES,
    WINNERS,
    Vote,
    as_pairs,
    first_and_again,
    from_row,
    pair_id,
    standing,
)
from nanopref.learning.objectives import OBJECTIVES, kinds
from nanopref.running.flags import UserError


def vote(pair: int, winner: str, annotator: str = "ada", left: str = "a") -> Vote:
    texts = f"p{pair}", f"a{pair}", f"b{pair}"
    return Vote(pair_id(*texts), *texts, winner, left, annotator, 2.5, "2026-01-01T00:00:00+00:00", "because")


def group(pair: int, better: str) -> Group:
    return Group(f"p{pair}", tuple(f"{side}{pair}" for side in (better, "ba"["ab".index(better)])))


def pairs(votes, name="majority"):
    notes = Counter()
    return as_pairs(votes, AGGREGATES[name], notes), {
        note.removeprefix("votes dropped: "): n for note, n in notes.items() if n
    }


# ---- what stands -----------------------------------------------------------------------------------------------------


def test_an_undo_takes_back_what_the_person_said_last_of_the_pair():
    one, two, again = vote(1, "a"), vote(2, "b"), vote(1, "b", left="b")
    undo = vote(1, "undo")
    assert standing([one, two, undo]) == [two]
    assert standing([one, two, again, undo]) == [one, two]
    assert standing([one, two, again, undo, undo]) == [two]
    assert standing([undo, one]) == [one]  # of nothing there is nothing to take back
    assert standing([one, vote(1, "undo", "bob")]) == [one]  # nor of another person
    assert standing([one, undo, vote(1, "tie")]) == [vote(1, "tie")]


def test_the_same_showing_counts_once():
    assert standing([vote(1, "a"), vote(1, "b"), vote(1, "a")]) == [vote(1, "a")]
    assert standing([vote(1, "a"), vote(1, "b", left="b")]) == [vote(1, "a"), vote(1, "b", left="b")]
    assert first_and_again([vote(1, "a"), vote(1, "b", left="b"), vote(1, "a", "bob")]) == (
        [vote(1, "a"), vote(1, "a", "bob")],
        [(vote(1, "a"), vote(1, "b", left="b"))],
    )


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_the_majority_decides_and_what_decides_nothing_is_counted():
    said = [vote(1, winner, name) for winner, name in zip("aab", "xyz", strict=True)]
    said += [vote(2, "a", "x"), vote(2, "b", "y"), vote(2, "tie", "z"), vote(3, "bad", "x"), vote(4, "skip", "x")]
    said += [vote(5, "b", "x"), vote(5, "tie", "y"), vote(5, "a", "x", left="b")]
    found, notes = pairs(said)
    assert found == [group(1, "a"), group(5, "b")]
    assert notes == {
        "ties": 2, "both answers are bad": 1, "skipped": 1, "a pair that one person saw again": 1,
        "pairs dropped: as many people for one answer as for the other": 1,
    }  # fmt: skip


def test_every_vote_may_count():
    said = [vote(1, winner, name) for winner, name in zip("aab", "xyz", strict=True)] + [vote(2, "b", "x")]
    assert pairs(said, "count")[0] == [group(1, "a"), group(1, "a"), group(1, "b"), group(2, "b")]


def test_a_pair_may_stand_in_the_file_either_way_round():
    """As where files of two servers were joined."""
    one = vote(1, "a", "x")
    turned = one._replace(a=one.b, b=one.a, winner="b", shown_left="b", annotator="y")
    read_back = from_row("here", turned._asdict())
    assert read_back == one._replace(annotator="y") and from_row("here", one._asdict()) == one
    assert pairs([one, read_back])[0] == [group(1, "a")]
    other = from_row("here", turned._replace(winner="a")._asdict())
    assert other.winner == "b" and pairs([one, other])[0] == []
    assert from_row("here", turned._replace(winner="tie")._asdict()).winner == "tie"


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(WINNERS), st.sampled_from("xyz"), st.sampled_from("ab"))))
def test_pairs_are_the_majorities_of_what_stands(lines):
    """Against the words of the docstring, told once more."""
    votes = [vote(*line) for line in lines]
    said: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for pair, winner, name, left in lines:
        mine = said.setdefault((name, pair), [])
        if winner == "undo":
            del mine[-1:]
        elif left not in [side for _, side in mine]:
            mine.append((winner, left))
    first = {key: mine[0][0] for key, mine in said.items() if mine}
    lead = {p: sum((w == "a") - (w == "b") for (_, q), w in first.items() if q == p) for p in range(4)}
    expected = {group(p, "a" if lead[p] > 0 else "b") for p in lead if lead[p]}
    assert set(pairs(votes)[0]) == expected and len(pairs(votes)[0]) == len(expected)
    decided = Counter((f"p{p}", f"{w}{p}") for (_, p), w in first.items() if w in "ab" and lead[p])
    assert Counter((g.prompt, g.responses[0]) for g in pairs(votes, "count")[0]) == decided


# ---- files -----------------------------------------------------------------------------------------------------------


def rows(n: int) -> list[dict]:
    return [vote(i, "ab"[i % 2], name)._asdict() for i in range(n) for name in "xyz"]


def test_every_script_reads_a_file_of_votes_as_pairs(write):
    path = write(jsonl(*rows(20), vote(1, "tie", "w")._asdict()))
    kind, groups, notes = read(path)
    assert kind == "pairs" and groups == [group(i, "ab"[i % 2]) for i in range(20)]
    assert notes == {"votes dropped: ties": 1}
    for read_as in (feedback, judged):
        training, held_out, notes = read_as(path)
        assert len(training) == 18 and len(held_out) == 2 and notes == {"votes dropped: ties": 1}
    training, held_out, _ = read_feedback(path, kinds(OBJECTIVES), "dpo", votes="count")
    assert len(training) == 54 and len(held_out) == 6
    assert len(read_to_imitate(path)[0]) == 20 and sum(map(len, read_prompts(path))) == 20
    assert {g.scores for g in read_feedback(path, kinds(OBJECTIVES), "kto")[0]} == {(0.0,), (1.0,)}


def test_only_of_votes_can_pairs_be_made(write):
    path = write(jsonl({"prompt": "p", "chosen": "a", "rejected": "b"}))
    with pytest.raises(UserError, match="pairs, and no votes of which --votes could make pairs"):
        read_feedback(path, kinds(OBJECTIVES), "dpo", votes="dawid-skene")


def test_what_a_file_need_not_hold(write):
    """The question, the answers and who won; whatever else is there is ignored, an id too."""
    row = {"prompt": "p", "a": "x", "b": "y", "winner": "b", "id": "7", "more": []}
    path = write(jsonl(row | {"winner": "a"}, row, row | {"annotator": None}, row | {"prompt": "q"}))
    assert read(path) == ("pairs", [Group("p", ("y", "x")), Group("q", ("y", "x"))], Counter())  # two to one, of nobody


@pytest.mark.parametrize("votes", AGGREGATES)
def test_whatever_makes_pairs_of_votes_the_same_prompts_are_held_out(write, votes):
    """Of 60 pairs people differ on half, evenly, of which no aggregate makes anything."""
    cast = [vote(i, w, name)._asdict() for i in range(60) for name, w in (("x", "a"), ("y", "ab"[i % 2]))]
    path = write(jsonl(*cast))
    training, held_out, _ = read_feedback(path, kinds(OBJECTIVES), "dpo", votes=votes)
    prompts = read_prompts(path)
    assert [{g.prompt for g in part} for part in (training, held_out)] == [set(part) for part in prompts]
    assert len(prompts[0]) == 27 and len(prompts[1]) == 3


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"winner": "c"}, "'winner' must be one of a, b, tie, bad, skip, undo, not 'c'"),
        ({"winner": None}, "'winner' must be text"),
        ({"a": 1}, "'a' must be text"),
        ({"prompt": None}, "'prompt' must be text"),
        ({"shown_left": "left"}, "'shown_left' must be a or b, not 'left'"),
        ({"annotator": 3}, "'annotator' must be text"),
        ({"shown_left": []}, "'shown_left' must be a or b, not []"),
        ({"seconds": -1}, "'seconds' must be a number of at least 0 and below 1e15, found -1"),
        ({"seconds": "1"}, "'seconds' must be a number of at least 0"),
        ({"seconds": 10**400}, "'seconds' must be a number of at least 0 and below 1e15"),
        ({"seconds": 1e999}, "'seconds' must be a number of at least 0"),
        ({"b": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_is_no_vote_is_refused(write, change, reason):
    path = write(jsonl(*rows(1)) + json.dumps(rows(1)[0] | change).encode() + b"\n")
    message = refusal(read, path)
    assert "line 4: " in message and reason in message


@pytest.mark.parametrize("winner", ["tie", "bad", "skip", "undo"])
def test_a_file_without_a_vote_that_decides_is_refused(write, winner):
    assert "holds no vote that decides" in refusal(read, write(jsonl(vote(1, winner)._asdict())))


def test_a_line_is_read_as_it_was_written():
    strange = vote(1, "tie", "Zoë \u2028 <b>")._replace(why='"\n', prompt="…")
    strange = strange._replace(id=pair_id(strange.prompt, strange.a, strange.b))
    assert from_row("here", json.loads(strange.line())) == strange and strange.line().count("\n") == 1
