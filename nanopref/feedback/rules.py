"""Written rules that an answer keeps or breaks: a small constitution, after Bai et al. 2022 (Constitutional AI).

A TOML file holds a list of [[rule]]: a name, one test with its argument and, as one likes, the principle in words and a
weight (1). constitution.toml beside this file is the example, and what is taken where no other is named. A principle
without a test is for a chat model that is asked (asking.py), as those of harmless.toml.
"""

import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanopref.data import reviews
from nanopref.running.flags import UserError, require

SHIPPED = Path(__file__).parent / "constitution.toml"


def _says(text: str, phrases: Iterable[str]) -> bool:
    """Whether one of the phrases stands in the text as whole words, in capitals or not, however they are spaced."""
    either = "|".join(r"\s+".join(map(re.escape, phrase.replace("’", "'").split())) for phrase in phrases)
    return re.search(rf"(?<!\w)(?:{either})(?!\w)", text.replace("’", "'"), re.IGNORECASE) is not None


def _last_sentence(response: str) -> str:
    return next((s for s in reversed(reviews.sentences(response)) if s.strip()), "")


def _is_consistent(response: str) -> bool:
    """No aspect is both praised and blamed, as the true reward reads it; a verdict is an aspect, too."""
    said = {(aspect, value > 0) for s in reviews.sentences(response) for aspect, _, value in reviews.judgements(s)}
    return len(said) == len({aspect for aspect, _ in said})


def _is_phrases(argument: Any) -> bool:
    return isinstance(argument, list) and bool(argument) and all(isinstance(x, str) and x.strip() for x in argument)


def _is_count(argument: Any) -> bool:
    return type(argument) is int and argument > 0  # True is an int, too


def _is_pattern(argument: Any) -> bool:
    try:
        return isinstance(argument, str) and bool(re.compile(argument))
    except (re.error, OverflowError, RecursionError):  # as of "(", "a{99999999999}" and very many brackets
        return False


# test: (its argument in words, whether an argument is one, (response, argument) -> kept)
_PHRASES = ("a list of words or phrases", _is_phrases)
_COUNT = ("a whole number of at least 1", _is_count)
_YES = ("true", lambda argument: argument is True)
TESTS: dict[str, tuple[str, Callable[[Any], bool], Callable[[str, Any], bool]]] = {
    "mentions": (*_PHRASES, _says),
    "avoids": (*_PHRASES, lambda response, phrases: not _says(response, phrases)),
    "ends_with": (*_PHRASES, lambda response, phrases: _says(_last_sentence(response), phrases)),
    "at_most_words": (*_COUNT, lambda response, n: len(response.split()) <= n),
    "at_least_words": (*_COUNT, lambda response, n: len(response.split()) >= n),
    "matches": ("a regular expression", _is_pattern, lambda response, regex: bool(re.search(regex, response))),
    "ends_with_verdict": (*_YES, lambda response, _: _says(_last_sentence(response), reviews.VERDICTS)),
    "consistent": (*_YES, lambda response, _: _is_consistent(response)),
}  # fmt: skip


class Rule(NamedTuple):
    name: str
    principle: str  # in words, for readers, or for a model that is asked; may be empty
    test: str  # a key of TESTS; none where a model is asked
    argument: Any
    weight: float

    def kept(self, response: str) -> bool:
        return TESTS[self.test][2](response, self.argument)


def load(path: str = "", sentences: bool = False) -> list[Rule]:
    """The rules of a file, or those shipped; with `sentences` a principle without a test is one, too. Raises UserError
    where it cannot be read or a rule is none."""
    file = Path(path) if path else SHIPPED
    require(file.is_file(), f"{file}: {'a folder, not a file' if file.is_dir() else 'no such file'}")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not TOML ({error})") from None
    unknown, rows = sorted(content.keys() - {"rule"}), content.get("rule", [])
    require(not unknown, f"{file}: unknown key {', '.join(unknown)}: there is [[rule]] alone")
    tables = isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)
    require(tables, f"{file}: there is no [[rule]] in it")
    rules = []
    for number, row in enumerate(rows, 1):
        rules.append(_rule(f"{file}, rule {number}", row, sentences))
        same = [i for i, rule in enumerate(rules, 1) if rule.name == rules[-1].name]
        require(len(same) == 1, f"{file}, rule {number}: rule {same[0]} has the same name, {rules[-1].name!r}")
    return rules


def _rule(where: str, row: dict[str, Any], sentences: bool) -> Rule:
    """A rule from its table. Raises UserError, which says where, if it is none."""
    name, principle, weight = row.get("name"), row.get("principle", ""), row.get("weight", 1.0)
    require(isinstance(name, str) and bool(name.strip()), f"{where}: needs a name")
    where = f"{where} ({name!r})"
    require(isinstance(principle, str), f"{where}: principle must be text, not {principle!r}")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    finite = is_number and 0 < weight <= sys.float_info.max
    require(finite, f"{where}: weight must be a finite number above 0, not {weight!r}")
    tests = [key for key in row if key not in ("name", "principle", "weight")]
    unknown = [key for key in tests if key not in TESTS]
    require(not unknown, f"{where}: unknown test {', '.join(unknown)}: there are {', '.join(TESTS)}")
    if not tests and principle.strip():
        require(sentences, f"{where}: has no test but a principle, by which --reward asks:FOLDER:FILE.toml has a chat "
                "model judge")  # fmt: skip
        return Rule(name, principle.strip(), "", None, float(weight))
    given = " and ".join(tests) or "none"
    require(len(tests) == 1, f"{where}: needs one test, not {given}: there are {', '.join(TESTS)}")
    wanted, fits, _ = TESTS[tests[0]]
    argument = row[tests[0]]
    require(fits(argument), f"{where}: {tests[0]} must be {wanted}, not {argument!r}")
    return Rule(name, principle, tests[0], argument, float(weight))


def broken(rules: Sequence[Rule], response: str) -> list[Rule]:
    """The rules that an answer breaks, the heaviest, its critique, first; of equal weight, in the order of the file."""
    return sorted((rule for rule in rules if not rule.kept(response)), key=lambda rule: -rule.weight)
