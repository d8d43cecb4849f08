"""Who sees which pair, and a file that loses nothing: random people, who may be cut off at any moment."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopref.data.votes import SAID, first_and_again, standing
from nanopref.feedback import ballots as module
from nanopref.feedback.ballots import APART, REPEAT, Ballots, Refused, read_pairs, read_votes
from nanopref.running.flags import UserError

CHOICES = ("left", "right", "tie", "bad", "skip")


def filled(folder, n: int, people: int = 1) -> Ballots:
    folder.mkdir(exist_ok=True)
    found = Ballots(folder, people)
    for i in range(n):
        found.add(f"p{i}", f"a{i}", f"b{i}")
    return found


def judge(ballots: Ballots, name: str, choice: str = "left", why: str = "") -> str | None:
    """What one sees next and says: the pair's id."""
    if shown := ballots.next(name):
        ballots.vote(name, shown.pair.id, shown.again, choice, 1.0, why)
        return shown.pair.id
    return None


def everybody_judges(ballots: Ballots) -> None:
    """By turns, until nothing is left."""
    while [name for name in "vwxyz" if judge(ballots, name)]:
        pass


PEOPLE = st.tuples(st.sampled_from("xyz"), st.sampled_from(["judge"] * 12 + ["twice", "undo", "late undo", "die"]))


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 30), st.lists(st.tuples(PEOPLE, st.sampled_from(CHOICES)), max_size=99)
)  # fmt: skip
def test_nothing_is_lost_nothing_is_twice(tmp_path_factory, people, n, script):
    """What is on the disk is at all times what was acknowledged; each person judges a pair once, and every twentieth
    again with its sides swapped; no more people than asked judge it; and a killed process goes on as it was."""
    folder = tmp_path_factory.mktemp("people")
    ballots = filled(folder, n, people)
    expected: dict[str, list[tuple[str, str, bool]]] = {name: [] for name in "xyz"}  # what should stand
    most = people
    for (name, action), choice in script:
        mine = expected[name]
        if action == "die":
            before = [ballots.next(person) for person in "xyz"]
            ballots = filled(folder, n, people)
            if people == 3:  # where nobody takes a pair away from another
                assert [ballots.next(person) for person in "xyz"] == before
        elif action.endswith("undo"):
            number = len(mine) - (action == "late undo")
            ballots.undo(name, number)
            if mine and action == "undo":
                id, winner, again = mine.pop()
                most += winner == "skip"  # others may have judged it since
                assert (ballots.next(name).pair.id, ballots.next(name).again) == (id, again)
        elif shown := ballots.next(name):
            assert ballots.next(name) == shown  # it stays until it is judged
            ballots.vote(name, shown.pair.id, shown.again, choice, 1.0, "")
            if action == "twice":
                ballots.vote(name, shown.pair.id, shown.again, "tie", 1.0, "")
            winner = {"left": shown.left, "right": "ba"["ab".index(shown.left)]}.get(choice, choice)
            mine.append((shown.pair.id, winner, shown.again))
        votes = standing(read_votes(folder))
        for person in "xyz":
            theirs = [vote for vote in votes if vote.annotator == person]
            assert [(vote.id, vote.winner) for vote in theirs] == [(id, winner) for id, winner, _ in expected[person]]
            first, again = first_and_again(theirs)
            assert len(again) <= sum(vote.winner in SAID for vote in first) // REPEAT
            assert all(a.shown_left != b.shown_left for a, b in again)
            assert ballots.progress(person)["said"] == len(theirs)
        first, _ = first_and_again(votes)
        assert max(Counter(vote.id for vote in first if vote.winner in SAID).values(), default=0) <= most
    assert ballots.total() == sum(vote.winner in SAID for vote in standing(read_votes(folder)))


def test_every_twentieth_pair_returns_with_its_sides_swapped(tmp_path):
    ballots, seen = filled(tmp_path, 100), []
    while id := judge(ballots, "x"):
        seen.append(id)
    assert len(seen) == 105 and len(set(seen)) == 100
    votes = read_votes(tmp_path)
    _, again = first_and_again(votes)
    assert len(again) == 5 and all(a.shown_left != b.shown_left and a.winner != b.winner for a, b in again)
    for id in [a.id for a, _ in again]:
        first, second = (i for i, other in enumerate(seen) if other == id)
        assert second - first > APART
    ballots.undo("x", 105)
    assert ballots.next("x").again and ballots.next("y") is None  # it is for nobody else
    assert 35 <= sum(vote.shown_left == "a" for vote in first_and_again(votes)[0]) <= 65


def test_several_people_share_the_work(tmp_path):
    ballots = filled(tmp_path, 10)
    shown = [ballots.next(name).pair.id for name in "vwxyz"]
    assert len(set(shown)) == 5  # nobody does what another is about to do
    everybody_judges(ballots)
    assert Counter(vote.id for vote in read_votes(tmp_path)) == dict.fromkeys(ballots.pairs, 1)
    assert ballots.progress("x") == {"said": 2, "left": 0} and ballots.total() == 10
    both = filled(tmp_path, 10, people=2)  # asked anew, each pair has one vote already, and goes on with it
    assert both.next("x").pair.id in ballots.pairs
    everybody_judges(both)
    first, _ = first_and_again(read_votes(tmp_path))
    assert Counter(vote.id for vote in first) == dict.fromkeys(ballots.pairs, 2)


def test_what_is_seen_again_is_no_vote_of_a_second_person(tmp_path):
    for reload in (False, True):
        ballots = filled(tmp_path / str(reload), 25, people=2)
        while judge(ballots, "x"):
            pass
        _, again = first_and_again(read_votes(tmp_path / str(reload)))
        assert len(again) == 1
        if not reload:
            for number in range(26, 20, -1):  # back to what was seen again, and on
                ballots.undo("x", number)
            assert ballots.next("x").again
            while judge(ballots, "x"):
                pass
        ballots = filled(tmp_path / str(reload), 25, people=2) if reload else ballots
        assert ballots.progress("y")["left"] == 25
        ballots.add("new", "a", "b")
        assert ballots.progress("y")["left"] == 26 and ballots.progress("x")["left"] == 1


def test_what_one_takes_back_is_for_others_again(tmp_path):
    ballots = filled(tmp_path, 3)
    taken_back = [judge(ballots, "x") for _ in range(3)][-1]
    assert ballots.next("y") is None
    ballots.undo("x", 3)
    ballots.vote("x", taken_back, False, "skip", 1.0, "")
    assert ballots.next("y").pair.id == taken_back


def test_each_person_has_sides_of_their_own(tmp_path):
    ballots, left = filled(tmp_path, 40, people=2), {"x": {}, "y": {}}
    for name, sides in left.items():
        while shown := ballots.next(name):
            sides.setdefault(shown.pair.id, shown.left)
            ballots.vote(name, shown.pair.id, shown.again, "left", 1.0, "")
    assert 8 < sum(left["x"][id] == left["y"][id] for id in ballots.pairs) < 32


def test_one_showing_is_voted_on_once_by_two_threads(tmp_path, monkeypatch):
    ballots, slow = filled(tmp_path, 1), module.os.fsync
    shown = ballots.next("x")
    monkeypatch.setattr(module.os, "fsync", lambda file: (time.sleep(0.05), slow(file)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ballots.vote("x", shown.pair.id, False, "left", 1.0, ""), range(4)))
    assert len(read_votes(tmp_path)) == 1


def test_who_went_away_does_not_keep_a_pair_from_others(tmp_path, monkeypatch):
    ballots, clock = filled(tmp_path, 1), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    assert ballots.next("x") and ballots.next("y") is None
    clock[0] = module.AWAY - 1
    assert ballots.next("y") is None
    clock[0] = module.AWAY + 1
    assert ballots.next("y").pair.prompt == "p0"


def test_a_skipped_pair_is_for_others(tmp_path):
    ballots = filled(tmp_path, 2)
    skipped = judge(ballots, "x", "skip")
    assert judge(ballots, "x") != skipped and ballots.next("x") is None
    assert judge(ballots, "y") == skipped
    assert ballots.progress("x") == {"said": 2, "left": 0} and ballots.total() == 2


def test_what_cannot_be_said(tmp_path):
    ballots = filled(tmp_path, 2)
    shown = ballots.next("x")
    assert ballots.vote("y", shown.pair.id, False, "tie", 1.0, "") == {}
    assert [ballots.vote("y", shown.pair.id, False, choice, 1.0, "")["stale"] for choice in ("tie", "left")] == [
        False, True
    ]  # fmt: skip
    assert ballots.undo("y", 3)["stale"] and "stale" not in ballots.undo("y", 1) and not ballots.undo("y", 1)["stale"]
    before = (tmp_path / "votes.jsonl").read_bytes()
    for id, again in (("nowhere", False), (shown.pair.id, True)):
        with pytest.raises(Refused):
            ballots.vote("x", id, again, "left", 1.0, "")
    assert (tmp_path / "votes.jsonl").read_bytes() == before


def test_a_line_that_a_kill_cut_off_is_forgotten_and_any_other_is_refused(tmp_path):
    judge(filled(tmp_path, 3), "x", why="ö")
    path = tmp_path / "votes.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert filled(tmp_path, 3).progress("x")["said"] == 1 and path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # as an editor may leave it
    assert filled(tmp_path, 3).progress("x")["said"] == 1 and path.read_bytes() == whole
    path.write_bytes(b'{"prompt": "p"}\n' + whole)
    with pytest.raises(UserError, match="line 1: 'a' must be text"):
        Ballots(tmp_path)
    for damage in (b'"a": 1', b'"c": ""', b'"models": ["one"]', b'"models": "ab"'):
        (tmp_path / "pairs.jsonl").write_bytes(b'{"prompt": "p", "b": "x", %s}\n' % damage)
        with pytest.raises(UserError, match=r"line 1: '(a|models)' must be"):
            read_pairs(tmp_path)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    ballots = filled(tmp_path, 3)
    judge(ballots, "x")
    whole = (tmp_path / "votes.jsonl").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        judge(ballots, "x")
    assert (tmp_path / "votes.jsonl").read_bytes() == whole and ballots.progress("x")["said"] == 1
    monkeypatch.undo()
    assert judge(ballots, "x") and len(read_votes(tmp_path)) == 2


def test_a_line_is_on_the_disk_when_a_vote_is_acknowledged(tmp_path, monkeypatch):
    """Without fsync a crash of the machine would take it."""
    synced, ballots = [], filled(tmp_path, 3)
    monkeypatch.setattr(module.os, "fsync", lambda _: synced.append((tmp_path / "votes.jsonl").read_bytes()))
    judge(ballots, "x")
    ballots.undo("x", 1)
    assert [content.count(b"\n") for content in synced] == [1, 2]
    assert json.loads(synced[1].splitlines()[1])["winner"] == "undo"


def test_pairs_that_leave_no_choice_are_not_asked(tmp_path):
    ballots = Ballots(tmp_path)
    for a, b in (("x", "x"), ("x", " "), ("", "x"), ("y", "x"), ("x", "y")):
        ballots.add("p", a, b, ("one", "two"))
    assert [pair[1:] for pair in read_pairs(tmp_path)] == [("p", "x", "y", ("two", "one"))]
    assert list(ballots.pairs.values()) == read_pairs(tmp_path)
