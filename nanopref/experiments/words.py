"""The words of a response: what the true reward pays for each, and what of the credit of tokens falls on each."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanopref.data import reviews

ROLES = ("negator", "opinion", "degree", "aspect", "rest")


class Word(NamedTuple):
    """A word of a response, a phrase that is read as one ("skip it", "far from"), or a mark."""

    start: int
    end: int
    value: float  # what an opinion word says, 0 elsewhere
    paid: float  # and what of that is paid
    clause: int  # in which clause and sentence it stands, from 0
    sentence: int
    role: str  # one of ROLES


_WORD = re.compile(rf"\b(?:{'|'.join([*reviews.VERDICTS, 'far from'])})\b|[\w'’]+|[^\w\s]", re.I)
_BEGINS = {"and", *reviews.TURNS, *reviews.CONCESSIONS}  # a clause, as in reviews.py


def words(response: str) -> list[Word]:
    """All words and marks of a response; a word that begins a clause is of it, a mark of the clause that it ends."""
    found: list[Word] = []
    opinions, ended, clause, sentence = {o.start: o for o in reviews.opinions(response)}, "", 0, 0
    for match in _WORD.finditer(response):
        word = match[0].lower().replace("’", "'")
        ended += "\n" * bool(found and re.search(r"[\r\n]", response[found[-1].end : match.start()]))
        sentence += bool(found and set(ended) & set(".!?\n"))
        clause += bool(found and (ended or word in _BEGINS))
        ended = word if word in reviews.PAUSES or word in ".!?" else ""
        inside = [opinions[i] for i in range(*match.span()) if i in opinions]
        value, paid = sum(o.value for o in inside), sum(o.paid for o in inside)
        found.append(Word(*match.span(), value, paid, clause, sentence, role(word, value)))
    return found


def role(word: str, value: float) -> str:
    """What a word does in its clause."""
    if value:
        return "opinion"
    if word in reviews.NEGATORS or word.endswith("n't"):
        return "negator"
    return "degree" if word in reviews.DEGREES else "aspect" if word in reviews.ASPECT_OF else "rest"


def by_word(numbers: Sequence[float], texts: Sequence[str], found: Sequence[Word]) -> np.ndarray:
    """The credit of each token added up over each word: [words]. A token is of the word in which it ends, spaces behind
    it left aside; what stands behind all words is of the last one."""
    sums, ends, at = np.zeros(len(found)), [word.end for word in found], 0
    for number, text in zip(numbers, texts, strict=True):
        last = at + max(len(text.rstrip()), 1) - 1
        at += len(text)
        sums[min(bisect_right(ends, last), len(ends) - 1)] += number
    return sums
