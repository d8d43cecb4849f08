"""What people said of pairs of answers: the file that holds it, and the pairs that are learnt from.

    {"id", "prompt", "a", "b", "winner", "shown_left", "annotator", "seconds", "time", "why"}

A line is what one person said of one pair: `winner` is a, b, tie or bad (neither is any good), or skip (nothing was
said), or undo, which takes back what that person last said of it. `shown_left` is the answer that stood on the left.
Whoever speaks of a pair twice saw it again with its sides swapped, which tells how far they agree with themselves; only
the first time counts. Files may be joined: `id` is a digest of prompt and answers.

People may differ. AGGREGATES are the ways to make labelled pairs of what k of them said of N.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from nanopref.data.dialogues import as_prompt
from nanopref.data.groups import Group
from nanopref.running.flags import UserError, require

DECIDED = ("a", "b")
SAID = (*DECIDED, "tie", "bad")  # what counts as a vote
WINNERS = (*SAID, "skip", "undo")


class Vote(NamedTuple):
    """A line of the file."""

    id: str
    prompt: str
    a: str
    b: str
    winner: str
    shown_left: str = "a"
    annotator: str = ""
    seconds: float = 0.0
    time: str = ""
    why: str = ""

    def line(self) -> str:
        return json.dumps(self._asdict(), ensure_ascii=False) + "\n"

    def in_order(self) -> "Vote":
        """The same with the answer that sorts first as a, as all are held, so that files may be joined."""
        if self.a <= self.b:
            return self
        other = dict(zip(DECIDED, reversed(DECIDED), strict=True))
        return self._replace(
            a=self.b, b=self.a, winner=other.get(self.winner, self.winner), shown_left=other[self.shown_left]
        )

    @property
    def who(self) -> tuple[str, str]:
        """Who spoke of which pair."""
        return self.annotator, self.id


def pair_id(prompt: str, a: str, b: str) -> str:
    """What tells a pair of answers from others, whichever comes first."""
    return hashlib.sha256(json.dumps([prompt, *sorted((a, b))]).encode()).hexdigest()[:16]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def from_row(where: str, row: dict) -> Vote:
    """A row of a file as a vote. Raises UserError, with the row's place in the file, for one that does not fit."""
    for name in ("prompt", "a", "b", "winner"):
        require(isinstance(row.get(name), str), f"{where}: {name!r} must be text")
    require(row["winner"] in WINNERS, f"{where}: 'winner' must be one of {', '.join(WINNERS)}, not {row['winner']!r}")
    left = "a" if row.get("shown_left") in (None, "") else row["shown_left"]
    require(left in DECIDED, f"{where}: 'shown_left' must be a or b, not {left!r}")
    found = {**row, "id": pair_id(row["prompt"], row["a"], row["b"])}
    found |= {"shown_left": left, "annotator": row.get("annotator") or where}  # who has no name is nobody else
    vote = Vote(**{name: found[name] for name in Vote._fields if found.get(name) is not None}).in_order()
    for name in ("annotator", "time", "why"):
        require(isinstance(getattr(vote, name), str), f"{where}: {name!r} must be text")
    known = isinstance(vote.seconds, int | float) and 0 <= vote.seconds < 1e15
    require(known, f"{where}: 'seconds' must be a number of at least 0 and below 1e15, found {vote.seconds!r}")
    try:
        vote.line().encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which no text can") from None
    return vote


def standing(votes: Iterable[Vote]) -> list[Vote]:
    """What is still said after all undoing, in the order in which it was said; the same showing counts once."""
    found: dict[tuple[str, str, str], Vote] = {}
    for vote in votes:
        if vote.winner == "undo":
            found.pop(next((said for said in reversed(found) if said[:2] == vote.who), None), None)
        else:
            found.setdefault((*vote.who, vote.shown_left), vote)
    return list(found.values())


def first_and_again(votes: Iterable[Vote]) -> tuple[list[Vote], list[tuple[Vote, Vote]]]:
    """Of standing votes what each said of a pair the first time, and what of it and its swapped showing, both times."""
    first: dict[tuple[str, str], Vote] = {}
    again = []
    for vote in votes:
        if (before := first.setdefault(vote.who, vote)) is not vote:
            again.append((before, vote))
    return list(first.values()), again


def as_pairs(votes: Iterable[Vote], aggregate: Callable, notes: Counter) -> list[Group]:
    """The labelled pairs that an aggregate makes of the votes, for training; what says nothing of two is counted."""
    first, again = first_and_again(standing(votes))
    pairs = {vote.id: vote for vote in first if vote.winner in DECIDED}
    notes["votes dropped: a pair that one person saw again"] += len(again)
    for winner, what in (("tie", "ties"), ("bad", "both answers are bad"), ("skip", "skipped")):
        notes[f"votes dropped: {what}"] += sum(vote.winner == winner for vote in first)
    people = {name: k for k, name in enumerate(dict.fromkeys(vote.annotator for vote in first))}
    columns = {id: n for n, id in enumerate(pairs)}
    said = np.full((len(people), len(pairs)), np.nan)
    for vote in first:
        if vote.winner in DECIDED:
            said[people[vote.annotator], columns[vote.id]] = vote.winner == "a"
    decided, _ = majority(said) if pairs else ([], [])  # whatever the aggregate, so that all hold out the same prompts
    notes["pairs dropped: as many people for one answer as for the other"] += len(pairs) - len(decided)
    if not len(decided):
        return []
    every = list(pairs.values())
    shown = [every[n] for n in decided]
    kept, a_is_better = aggregate(said[:, decided])
    return [
        Group(as_prompt(shown[n].prompt), (shown[n].a, shown[n].b) if a else (shown[n].b, shown[n].a))
        for n, a in zip(kept, a_is_better, strict=True)
    ]


# ---- which of N pairs become labelled ones [M], and whether the first answer is the better one [M], by votes [k, N]:
# 1 for a, 0 for b, NaN where nothing was said


def _check_votes(said) -> np.ndarray:
    said = np.asarray(said, dtype=np.float64)
    if said.ndim != 2 or not said.size:
        raise ValueError(f"votes must be [people, pairs] with at least one of both, not {said.shape}")
    return said


def majority(said) -> tuple[np.ndarray, np.ndarray]:
    """What most say, of pairs on which it is not half of them."""
    lead = np.nansum(2 * _check_votes(said) - 1, axis=0)
    return np.flatnonzero(lead), lead[lead != 0] > 0


def count(said) -> tuple[np.ndarray, np.ndarray]:
    """Every vote is a pair of its own, those on the same one after the other."""
    said = _check_votes(said).T
    return np.nonzero(~np.isnan(said))[0], said[~np.isnan(said)] > 0


def weighed(said) -> tuple[np.ndarray, np.ndarray]:
    """What most say, weighed by how reliable each is."""
    p, _ = dawid_skene(said)
    return np.arange(len(p)), p > 0.5


def dawid_skene(said, *, steps: int = 1000, tolerance: float = 1e-8) -> tuple[np.ndarray, np.ndarray]:
    """The probability [N] that a is better, and how reliable people are [k, 2], from nothing but their votes [k, N].

    The model of Dawid and Skene (Applied Statistics 28, 1979) with two classes: person i says a with probability
    accuracy[i, 0] where a is better, and b with accuracy[i, 1] where b is, each on their own. EM from the mean vote
    until no probability moves by the tolerance; so a is what most of the people take for it, and a majority that is
    worse than chance would turn all round. Each rate counts as if it had been seen once to hold and once not, a prior
    of Beta(2, 2) which keeps it off 0 and 1, where nothing could ever change one's mind. Pairs that are hard for all
    make people agree in their errors, which the model takes for skill.
    """
    a, b = np.nan_to_num(_check_votes(said)), np.nan_to_num(1 - _check_votes(said))
    p = a.sum(0) / np.maximum((a + b).sum(0), 1)
    for _ in range(steps):
        share = (p.sum() + 1) / (len(p) + 2)  # of the pairs in which a is better
        right_a = (a @ p + 1) / ((a + b) @ p + 2)
        right_b = (b @ (1 - p) + 1) / ((a + b) @ (1 - p) + 2)
        evidence = np.log(right_a / (1 - right_b)) @ a + np.log((1 - right_a) / right_b) @ b
        before, p = p, 0.5 * (1 + np.tanh((np.log(share / (1 - share)) + evidence) / 2))
        if np.abs(p - before).max() < tolerance:
            break
    return p, np.stack([right_a, right_b], axis=1)


AGGREGATES: dict[str, Callable[[Sequence], tuple[np.ndarray, np.ndarray]]] = {
    "majority": majority, "count": count, "dawid-skene": weighed,
}  # fmt: skip
