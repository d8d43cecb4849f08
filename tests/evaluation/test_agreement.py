"""What votes say of the people who gave them: against published values, and against counting by hand."""

import json
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopref.data.votes import SAID, Vote, from_row, pair_id
from nanopref.evaluation.agreement import coincidences, conclude, krippendorff_alpha, measure, ranking
from nanopref.evaluation.metrics import wilson
from nanopref.feedback.ballots import Pair
from nanopref.running.flags import UserError

# four observers, twelve units (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C)
PUBLISHED = [
    [1, 1, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4], [4, 4, 4, 4], [1, 1, 2, 1],
    [2, 2, 2, 2], [5, 5, 5], [1, 1],
]  # fmt: skip


def vote(pair: int, winner: str, annotator: str = "ada", left: str = "a", a: str = "a", **more) -> Vote:
    texts = f"p{pair}", a, "bb"
    return Vote(pair_id(*texts), *texts, winner, left, annotator, **{"seconds": 2.0} | more)


def alpha(units) -> float:
    return float(krippendorff_alpha(coincidences(units, 6).sum(0)))


# ---- Krippendorff's α ------------------------------------------------------------------------------------------------


def test_alpha_is_the_published_one():
    assert alpha(PUBLISHED) == pytest.approx(0.743, abs=5e-4)


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=4), min_size=1, max_size=6))
def test_alpha_is_one_less_observed_over_expected_disagreement(units):
    """By its definition: how often two values of a unit differ, over how often two values of all do."""
    values = [value for unit in units for value in unit]
    observed = sum(sum(c != d for c, d in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / len(values)
    chance = np.mean([c != d for c, d in permutations(values, 2)])
    if chance:
        assert alpha(units) == pytest.approx(1 - observed / chance)
    else:
        assert np.isnan(alpha(units))


def test_alpha_of_chance_is_about_0():
    assert abs(alpha(np.random.default_rng(0).integers(3, size=(5000, 2)).tolist())) < 0.03


def test_the_intervals_hold_the_truth_in_95_of_100():
    """Where five people vote on a pair their votes go together, by which Wilson's interval holds it in 60 to 70."""
    rng, held, widths = np.random.default_rng(0), [], []
    for _ in range(120):
        p = np.where(rng.random((40, 1)) < 0.5, 0.9, 0.3)  # the shorter one is better in 60%, but not of each pair
        first = rng.random((40, 5)) < p
        said = [vote(i, "a" if yes else "b", f"{k}") for i, row in enumerate(first) for k, yes in enumerate(row)]
        found = measure(said)
        low, high = found["longer"]["share_95"]
        agree = found["agreement"]["share_95"]  # 0.82 of pairs at 0.9, 0.58 of those at 0.3: 0.7; by chance 0.52
        of_alpha = found["alpha"]["alpha_95"]
        held.append([low <= 0.4 <= high, agree[0] <= 0.7 <= agree[1], of_alpha[0] <= 1 - 0.3 / 0.48 <= of_alpha[1]])
        widths.append(high - low)
    assert (np.abs(np.mean(held, axis=0) - 0.95) <= 0.06).all(), np.mean(held, axis=0)
    # of 40 means of five, each with a variance of 0.3² between pairs and 0.15 / 5 within them; Wilson's would be 0.135
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.12 / 40), rel=0.06)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_shares_are_counted():
    said = [
        vote(1, "a", "x"), vote(1, "a", "y", left="b"), vote(1, "b", "z"),  # one of three agree
        vote(2, "tie", "x"), vote(2, "tie", "y"), vote(3, "bad", "x"), vote(4, "skip", "x"),
        vote(5, "a", "x", a="long"), vote(5, "b", "x", a="long", left="b"),  # another answer, the same side
        vote(6, "b", "x", left="b", seconds=8.0), vote(6, "b", "x"), vote(7, "a", "y"), vote(7, "undo", "y"),
        vote(8, "a", "v", a="as"), vote(8, "skip", "v", a="as", left="b"),  # as long; and a skip is no change of mind
    ]  # fmt: skip
    found = measure(said)
    assert found["pairs"] == 6
    assert found["annotators"]["x"] == {
        "votes": 5, "tie": 1, "bad": 1, "skip": 1, "seconds": 2.0, "left": 1.0
    }  # fmt: skip
    assert found["agreement"]["share"] == pytest.approx(2 / 4) and found["agreement"]["of"] == 4
    assert found["self_agreement"]["share"] == 0.5 and found["self_agreement"]["of"] == 2
    assert found["left"]["share"] == pytest.approx(4 / 6) and found["left"]["of"] == 6
    assert found["longer"]["share"] == pytest.approx(3 / 5) and found["longer"]["of"] == 5
    low, high = found["left"]["share_95"]
    assert 0.2 < low < 4 / 6 < high <= 1
    assert "alpha" in found


def test_who_follows_the_left_side_is_seen():
    said = [vote(i, left, left=left) for i, left in enumerate("ab" * 20)]
    said += [vote(i, "ba"["ab".index(left)], left="ba"["ab".index(left)]) for i, left in enumerate("ab" * 2)]
    found = measure(said)
    assert found["left"]["share_95"] == wilson(1.0, 40)
    assert found["left"]["share"] == 1.0 and found["self_agreement"]["share"] == 0.0
    assert found["agreement"]["share"] is None and "alpha" not in found


def test_models_are_ranked_by_what_they_won():
    names = ("out/a", "out/b", "out/c")
    pairs, said = [], []
    for i in range(60):
        one, other = ((0, 1), (1, 2), (0, 2))[i % 3]
        cast = vote(i, ("a", "a", "b", "tie")[(i // 3) % 4])
        pairs.append(Pair(*cast[:4], (names[one], names[other])))
        said.append(cast)
    found = ranking(pairs, said)
    assert [row["model"] for row in found] == list(names) and [row["votes"] for row in found] == [40, 40, 40]
    assert sum(row["reward"] for row in found) == pytest.approx(0)
    assert found[0]["reward"] > 0.2 and all(0.1 < row["standard_error"] < 0.6 for row in found)
    swapped = [pair._replace(models=pair.models[::-1]) for pair in pairs]
    assert [row["model"] for row in ranking(swapped, said)] == list(names)[::-1]
    assert ranking([pair._replace(models=()) for pair in pairs], said) == []
    # what is said again does not count, nor what is skipped
    more = [cast._replace(winner="b", shown_left="b") for cast in said]
    more += [cast._replace(winner="skip", annotator="bob") for cast in said]
    assert ranking(pairs, said + more) == found


def test_who_always_wins_is_ahead_and_not_infinitely(tmp_path, capsys):
    said = [vote(i, "a") for i in range(9)]
    pairs = [Pair(*cast[:4], ("out/a", "out/b")) for cast in said]
    found = ranking(pairs, said)
    assert found[0]["model"] == "out/a" and 1 < found[0]["reward"] < 5
    ties = [cast._replace(winner="tie") for cast in said]
    conclude(tmp_path, pairs, ties)
    assert "no ranking: " in capsys.readouterr().out


def test_the_report_is_a_table_and_a_file(tmp_path, capsys):
    said = [vote(i, SAID[(i + k) % 4 if i % 3 == 0 else i % 4], f"person {k}") for i in range(40) for k in range(3)]
    conclude(tmp_path, [], said)
    text, found = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert [line.split("  ")[0] for line in text.splitlines()[2:5]] == [f"person {k}" for k in range(3)]
    assert f"{found['alpha']['alpha']:.2f}" in text and "people agree with one another" in text
    assert all("nan" not in line.lower() for line in text.splitlines())
    for nothing in ([], [vote(1, "a"), vote(1, "undo")]):
        with pytest.raises(UserError, match="no vote is there"):
            conclude(tmp_path, [], nothing)


def test_where_all_say_the_same_there_is_no_alpha(tmp_path, capsys):
    conclude(tmp_path, [], [vote(i, "a", f"\x1b[31m{k}") for i in range(9) for k in range(2)])
    text = capsys.readouterr().out
    assert "α" not in text and "nan" not in text and "\x1b" not in text and "100.0%" in text
    assert json.loads((tmp_path / "report.json").read_text())["alpha"] is None


def test_files_of_two_servers_may_be_joined():
    """Which of them held the two answers the other way round, whoever chose the same text agrees."""
    said = [vote(i, "ab"[i % 3 == 0], "x") for i in range(30)]
    rows = [cast._asdict() | {"a": cast.b, "b": cast.a, "winner": "ba"["ab".index(cast.winner)], "shown_left": "b",
                              "annotator": "y"} for cast in said]  # fmt: skip
    found = measure([from_row("here", row) for row in [*(cast._asdict() for cast in said), *rows]])
    assert found["agreement"]["share"] == 1.0 and found["alpha"]["alpha"] == 1.0
