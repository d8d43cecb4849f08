"""Real people's votes as they come in: which pair a person sees next, and a file that loses nothing.

OUT/pairs.jsonl holds the pairs, a line each, and OUT/votes.jsonl what was said of them (data/votes.py). A vote is
acknowledged when its line is on the disk. All that decides what is shown follows from these two files and from digests,
so a process that was killed goes on as if nothing had been, and a vote that is sent twice counts once.
"""

import hashlib
import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from nanopref.data import votes
from nanopref.data.files import read_rows
from nanopref.data.votes import SAID, Vote, first_and_again, pair_id, standing
from nanopref.running.flags import require

REPEAT = 20  # a person sees every so manieth pair again, with its sides swapped
APART = 5  # after at least so many others
AWAY = 120.0  # seconds after which a pair that was shown and not judged is offered to others


class Pair(NamedTuple):
    id: str
    prompt: str
    a: str
    b: str
    models: tuple[str, ...] = ()  # who wrote a and who wrote b, where several models are compared


class Showing(NamedTuple):
    """A pair as a person sees it, for the first time or `again`."""

    pair: Pair
    again: bool
    left: str  # a or b


class Refused(Exception):
    """A request that changes nothing, in a sentence."""


class Ballots:
    """The votes in a folder, for many threads. One process at a time may hold them."""

    def __init__(self, folder: Path, people: int = 1):
        """`people` vote on each pair. Raises UserError where a line of the folder's files does not fit."""
        self.people, self.pairs = people, {}
        self._lock = threading.Lock()
        self._standing: dict[str, list[Vote]] = defaultdict(list)  # of each person, in order
        self._count: Counter[str] = Counter()  # who said something of each pair
        self._open: dict[str, None] = {}  # the pairs that wait for people, in order
        self._shown: dict[str, tuple[str, float]] = {}  # what each person looks at, and since when
        self._files = [_Lines(folder / name) for name in ("pairs.jsonl", "votes.jsonl")]
        self.pairs |= {pair.id: pair for pair in read_pairs(folder)}
        for vote in standing(read_votes(folder)):
            self._standing[vote.annotator].append(vote)
            self._count[vote.id] += vote.winner in SAID and not self._again(vote.annotator, vote)
        self._reopen()

    def _reopen(self) -> None:
        self._open = {id: None for id in self.pairs if self._count[id] < self.people}

    def add(self, prompt: str, a: str, b: str, models: Sequence[str] = ()) -> None:
        """One pair more, unless it is there already or leaves no choice: an answer is empty, or both are equal."""
        if a > b:
            a, b, models = b, a, models[::-1]
        pair = Pair(pair_id(prompt, a, b), prompt, a, b, tuple(models))
        with self._lock:
            if pair.id not in self.pairs and a.strip() and b.strip() and a != b:
                self._files[0].append(json.dumps(pair._asdict(), ensure_ascii=False) + "\n")
                self.pairs[pair.id] = pair
                self._open[pair.id] = None

    def next(self, annotator: str) -> Showing | None:
        """What a person is to judge now; None where nothing is left for them, or not yet."""
        with self._lock:
            now = time.monotonic()
            first, again = first_and_again(self._standing[annotator])
            known, repeated = {vote.id for vote in first}, {vote.id for _, vote in again}
            current, _ = self._shown.get(annotator, ("", 0.0))
            looked_at = Counter(
                id for name, (id, since) in self._shown.items() if name != annotator and now - since < AWAY
            )
            open_ids = (id for id in self._open if id not in known and self._count[id] + looked_at[id] < self.people)
            fresh = current if current in self.pairs and current not in known else next(open_ids, None)
            said = [vote.id for vote in first if vote.winner in SAID]
            due = len(said) // REPEAT > len(repeated)
            old = [id for id in said[: -APART if fresh else None] if id not in repeated] if due else []
            id = min(old, key=lambda id: _digest(annotator, id)) if old else fresh
            if id:
                self._shown[annotator] = id, now
                return self._showing(annotator, id, id in known)
            self._shown.pop(annotator, None)
            return None

    def _showing(self, annotator: str, id: str, again: bool) -> Showing:
        left = "ab"[(_digest(annotator, id) + again) % 2]
        return Showing(self.pairs[id], again, left)

    def _again(self, annotator: str, vote: Vote) -> bool:
        return vote.shown_left != self._showing(annotator, vote.id, False).left if vote.id in self.pairs else False

    def vote(self, annotator: str, id: str, again: bool, choice: str, seconds: float, why: str) -> dict[str, Any]:
        """Write down what a person said: left, right, tie, bad or skip. What they have said of the same showing before
        stays as it was; where that was something else, the answer says that the page is `stale`."""
        with self._lock:
            if id not in self.pairs:
                raise Refused("there is no such pair")
            pair, again, left = self._showing(annotator, id, again)
            winner = {"left": left, "right": "ba"["ab".index(left)]}.get(choice, choice)
            mine = self._standing[annotator]
            before = [vote for vote in mine if vote.id == id]
            if said := [vote.winner for vote in before if vote.shown_left == left]:
                return {"stale": said != [winner]}
            if again and not before:
                raise Refused("the pair was not seen before")
            vote = Vote(id, *pair[1:4], winner, left, annotator, seconds, votes.now(), why)
            self._files[1].append(vote.line())
            mine.append(vote)
            self._count[id] += winner in SAID and not again
            if self._count[id] >= self.people:
                self._open.pop(id, None)
            self._shown.pop(annotator, None)
            return {}

    def undo(self, annotator: str, number: int) -> dict[str, Any]:
        """Take back what a person said last, if it is the `number`-th that stands: a request that is sent twice counts
        once. The answer has the reason that was given; or it says that the page is `stale`."""
        with self._lock:
            mine = self._standing[annotator]
            if not mine or len(mine) != number:
                return {"stale": len(mine) != number - 1}
            vote = mine[-1]
            self._files[1].append(vote._replace(winner="undo", seconds=0.0, time=votes.now(), why="").line())
            mine.pop()
            self._count[vote.id] -= vote.winner in SAID and not self._again(annotator, vote)
            self._reopen()
            self._shown[annotator] = vote.id, time.monotonic()
            return {"why": vote.why}

    def progress(self, annotator: str) -> dict[str, int]:
        """How many votes of a person stand, and how many pairs wait for them."""
        with self._lock:
            mine = self._standing[annotator]
            return {"said": len(mine), "left": len(self._open) - len({vote.id for vote in mine} & self._open.keys())}

    def total(self) -> int:
        """All that was said by now, what people saw again included."""
        with self._lock:
            return sum(vote.winner in SAID for said in self._standing.values() for vote in said)


def read_pairs(folder: Path) -> list[Pair]:
    """OUT/pairs.jsonl, if it is there. Raises UserError for a line that is no pair."""
    found = []
    for where, row in _rows(folder / "pairs.jsonl"):
        shown, wrote = votes.from_row(where, {"winner": "skip", **row}), row.get("models") or []
        named = isinstance(wrote, list) and len(wrote) in (0, 2) and all(isinstance(name, str) for name in wrote)
        require(named, f"{where}: 'models' must be the names of two, or none")
        found.append(Pair(*shown[:4], tuple(wrote if shown.a == row["a"] else reversed(wrote))))
    return found


def read_votes(folder: Path) -> list[Vote]:
    """OUT/votes.jsonl, if it is there. Raises UserError for a line that is no vote."""
    return [votes.from_row(where, row) for where, row in _rows(folder / "votes.jsonl")]


def _rows(path: Path) -> Iterable[tuple[str, dict]]:
    return read_rows(path) if path.exists() else ()


def _digest(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:8])


class _Lines:
    """A file that grows by whole lines, each on the disk before `append` returns."""

    def __init__(self, path: Path):
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        content = self._file.read()
        self._end = content.rfind(b"\n") + 1
        last = content[self._end :].decode(errors="replace")
        self._file.truncate(self._end)  # a line that a kill cut off was never acknowledged
        with suppress(ValueError):  # one that is whole has lost its end in an editor
            json.loads(last)
            self.append(last + "\n")

    def append(self, line: str) -> None:
        try:
            left = memoryview(line.encode())
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:  # a full disk: what could not be written whole is not there at all
            self._file.truncate(self._end)
            raise
        self._end += len(line.encode())
