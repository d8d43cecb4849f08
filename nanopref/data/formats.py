"""JSON in, groups out: what a file may hold, and what is refused, dropped and counted.

A file is JSON Lines, one object a row, or a JSON array of them, plain or `.gz`, in the field names that the ecosystem
uses:

    pairs      {"prompt": …, "chosen": …, "rejected": …}, and perhaps a "margin": by how much
               {"chosen": …, "rejected": …}   two whole dialogues, as in Anthropic's HH: what they share is the prompt
    ratings    {"prompt": …, "responses": […], "scores": […]}   a number each
    rankings   {"prompt": …, "responses": […]}   the best first
    labels     {"prompt": …, "completion": …, "label": …}   true or 1: a good answer; false or 0: a bad one
               {"text": …, "label": …}   the same of a whole text, which is cut into prompts and answers
    responses  {"prompt": …, "completion": …}; here as in labels it may also be called "response"
    votes      {"prompt": …, "a": …, "b": …, "winner": …}   what people said, as `nanopref.people` writes it: votes.py
    text       {"text": …}
    prompts    {"prompt": …}

Other fields are ignored. A row that does not fit is refused with the file, the line and the reason; what real data
makes necessary (an empty answer, two that are equal: the row is dropped) is counted, for the user to see.
"""

import codecs
import gzip
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanopref.data.groups import Group, as_labels, split, standardised
from nanopref.data.votes import AGGREGATES, as_pairs, from_row, majority
from nanopref.running.flags import UserError, require

TURN = "\n\nAssistant:"  # what opens an answer in an HH dialogue
PASSAGE, OPENING = 32, 12  # words of a passage, at least, and of the prompt that it begins with


# ---- a reader for each kind of row -----------------------------------------------------------------------------------


def _pair(where: str, row: dict, notes: Counter) -> list[Group]:
    chosen, rejected = _text(where, row, "chosen"), _text(where, row, "rejected")
    if "prompt" in row:
        group = Group(_text(where, row, "prompt"), (chosen, rejected), _margin(where, row))
    elif found := split_dialogues(chosen, rejected):
        group = found._replace(margin=_margin(where, row))
    else:
        reason = f"has no field 'prompt', and the two share no dialogue up to a {TURN.strip()!r}"
        raise UserError(f"{where}: {reason}")
    if not (kept := _compared(group, notes)):
        return []
    if group.whole and any(TURN in response for response in group.responses):
        notes["pairs that part before the last turn (kept: the answer runs to the end)"] += 1
    return kept


def split_dialogues(chosen: str, rejected: str) -> Group | None:
    """Two whole dialogues -> what they share up to the answer in which they part, and the rest of each."""
    prompt = os.path.commonprefix([chosen, rejected])  # noqa: RUF071, which takes the two for paths
    # where one answer begins like the other, or one is a turn longer, the turn opens before the first difference
    cut = prompt.rfind(TURN)
    if cut < 0:
        return None
    cut += len(TURN)
    return Group(chosen[:cut], (chosen[cut:], rejected[cut:]), whole=True)


def _ranking(where: str, row: dict, notes: Counter) -> list[Group]:
    return _compared(Group(_text(where, row, "prompt"), _texts(where, row)), notes)


def _rating(where: str, row: dict, notes: Counter) -> list[Group]:
    texts, scores = _texts(where, row), row.get("scores")
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise UserError(f"{where}: 'scores' must be a list with a number for each of 'responses'")
    rated = [(_number(where, {"scores": score}, "scores"), text) for score, text in zip(scores, texts, strict=True)]
    scores, texts = zip(*sorted(rated, key=lambda pair: -pair[0]), strict=True)  # the best first, as everywhere
    return _compared(Group(_text(where, row, "prompt"), texts, scores=scores), notes)


def _texts(where: str, row: dict) -> tuple[str, ...]:
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{where}: 'responses' must be a list of at least two texts")
    return tuple(_text(where, {"responses": response}, "responses") for response in responses)


def _compared(group: Group, notes: Counter) -> list[Group]:
    """The group, unless nothing can be learnt from it."""
    if len(set(group.responses)) < len(group.responses):
        notes["rows dropped: two answers are equal"] += 1
    elif not group.responses[0].strip():
        notes["rows dropped: the chosen answer is empty"] += 1
    else:
        return [group]
    return []


def _response(where: str, row: dict, notes: Counter) -> list[Group]:
    name = "response" if "response" in row else "completion"
    return _imitated(Group(_text(where, row, "prompt"), (_text(where, row, name),)), notes)


def _label(where: str, row: dict, notes: Counter) -> list[Group]:
    good = _good(where, row)
    return [group._replace(scores=(good,)) for group in _response(where, row, notes)]


def _good(where: str, row: dict) -> float:
    label = row.get("label")
    if label not in (0, 1):
        raise UserError(f"{where}: 'label' must be 1 or true (good), 0 or false (bad), found {label!r}")
    return float(label)


def _prompt(where: str, row: dict, notes: Counter) -> list[Group]:
    return [Group(_text(where, row, "prompt"), ())]


def _plain(where: str, row: dict, notes: Counter) -> list[Group]:
    return _imitated(Group("", (_text(where, row, "text"),), whole=True), notes)


def _imitated(group: Group, notes: Counter) -> list[Group]:
    if group.responses[0].strip():
        return [group]
    notes["rows dropped: no text"] += 1
    return []


def _labelled_text(where: str, row: dict, notes: Counter) -> list[Group]:
    text, good = _text(where, row, "text"), _good(where, row)
    found = [Group(prompt, (rest,), scores=(good,), source=text) for prompt, rest in passages(text)]
    notes[f"texts dropped: no sentence ends after its first {PASSAGE} words"] += not found
    return found


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Openings of a text and how each goes on: it is cut at the first end of a sentence after every 32 words, or after
    64, and the first 12 words of such a passage are the prompt. What is left at the end is dropped."""
    passage: list[str] = []
    for word in text.split():
        passage.append(word)
        if (len(passage) >= PASSAGE and word[-1] in ".!?") or len(passage) == 2 * PASSAGE:
            yield " ".join(passage[:OPENING]), " " + " ".join(passage[OPENING:])
            passage = []


class Kind(NamedTuple):
    """Rows that have all `fields` and belong together: how one is read, and what one that holds nothing lacks."""

    fields: tuple[str, ...]
    read: Callable[[str, dict, Counter], list[Group]]
    nothing: str


KINDS = {  # a file is of the first kind that fits its first row
    "pairs": Kind(("chosen",), _pair, "no usable pair"),
    "ratings": Kind(("responses", "scores"), _rating, "no usable rating"),
    "rankings": Kind(("responses",), _ranking, "no usable ranking"),
    "texts with labels": Kind(
        ("text", "label"), _labelled_text, f"no text in which a sentence ends after its first {PASSAGE} words"
    ),
    "text": Kind(("text",), _plain, "no text"),
    "labels": Kind(("label",), _label, "no text"),
    "responses": Kind(("completion",), _response, "no text"),
    "votes": Kind(("a", "b", "winner"), lambda where, row, notes: [from_row(where, row)], "no vote that decides"),
    "prompts": Kind((), _prompt, "no prompt"),
}


# ---- whole files -----------------------------------------------------------------------------------------------------


def read(path: str | Path, aggregate: Callable = majority) -> tuple[str, list[Group], Counter]:
    """The kind of a file, its groups, and how many rows were dropped and why. Votes become pairs by the `aggregate`.

    Raises UserError for a file without rows and for a row that does not fit.
    """
    groups, notes, kind, name = [], Counter(), None, ""
    for where, row in read_rows(path):
        if kind is None:
            fields = {name for name, value in row.items() if value is not None}
            fields = {"completion" if name == "response" else name for name in fields}
            name = next(name for name, kind in KINDS.items() if fields >= set(kind.fields))
            name = "pairs" if name == "prompts" and "rejected" in fields else name  # which will say what it lacks
            kind = KINDS[name]
        if name == "pairs" and "text" in row and "chosen" not in row:
            raise UserError(f"{where}: a text in a file of pairs")
        groups += kind.read(where, row, notes)
    require(kind is not None, f"{path}: holds no row")
    require(name == "votes" or aggregate is majority, f"{path}: {name}, and no votes of which --votes could make pairs")
    if name == "votes":
        name, groups = "pairs", [g for pair in as_pairs(groups, aggregate, notes) for g in _compared(pair, notes)]
    require(bool(groups), f"{path}: holds {kind.nothing}")
    return name, groups, +notes


def read_to_imitate(path: str | Path) -> tuple[list[Group], Counter]:
    """What SFT learns to write, K = 1, and how many rows were dropped and why. Raises UserError as `read` does.

    Of answers that were compared the best counts, of two dialogues the whole of it. What has a label counts whether it
    is good or bad, since that is what will be judged.
    """
    kind, groups, notes = read(path)
    require(kind != "prompts", f"{path}: prompts without an answer, of which there is nothing to imitate")
    return [group._replace(responses=group.responses[:1], margin=1.0, scores=()) for group in groups], notes


def read_feedback(
    path: str | Path, kinds: dict[str, Sequence[str]], loss: str, *, votes: str = "majority", meet: bool = False,
    hint: str = "use --loss",
) -> tuple[list[Group], list[Group], Counter]:  # fmt: skip
    """What --loss learns from (for training, held out), and how many rows were dropped and why.

    `kinds` says which each name of --loss takes. A loss of labels takes pairs as two each, ratings are
    standardised, and rankings of two are pairs. With `meet` a loss of pairs also takes labels, of which each good
    answer meets a bad one: pairs with a prompt each, of which only a reward model can learn. `votes` names what makes
    pairs of a file of votes. Raises UserError as `read` does, and for a file of another kind.
    """
    kind, groups, notes = read(path, AGGREGATES[votes])
    kind, wanted = kind.removeprefix("texts with "), kinds[loss]
    if kind == "rankings" and all(len(group.responses) == 2 for group in groups):
        kind = "pairs"
    if kind == "pairs" and "labels" in wanted:
        groups = as_labels(groups)
    elif kind == "labels" and kind not in wanted and "pairs" in wanted and meet:
        return *_meet(path, groups, notes), +notes
    else:
        others = [name for name, taken in kinds.items() if kind == taken[0]][:2]
        silent = "they do not say which answer is better, which train_dpo.py and train_ppo.py can ask a --reward"
        hint = f"{hint} {' or '.join(others)}" if others else silent
        require(kind in wanted, f"{path}: {kind}: {hint}")
    parts = split(groups)
    if "labels" in wanted:
        both = {group.scores for group in parts[0]} == {(0.0,), (1.0,)}
        require(both, f"{path}: needs good and bad answers (label 1 and 0) to train on")
    return *(standardised(str(path), *parts) if kind == "ratings" else parts), notes


def _meet(path: str | Path, groups: list[Group], notes: Counter) -> list[list[Group]]:
    parts = []
    for part in split(groups):
        random.Random(0).shuffle(part)  # or all passages of a text would meet those of one other
        good, bad = ([group for group in part if group.scores == (label,)] for label in (1, 0))
        require(bool(good and bad), f"{path}: needs good and bad answers (label 1 and 0), to train on and to hold out")
        met = zip(good, bad, strict=False)  # what one side has more of is left over
        parts.append([Group(a.prompt, a.responses + b.responses, prompts=(a.prompt, b.prompt)) for a, b in met])
        notes["answers dropped: more of one label than of the other"] += abs(len(good) - len(bad))
    return parts


def read_prompts(path: str | Path) -> tuple[list[str], list[str]]:
    """(for training, held out): the prompts of a file, each once. Raises UserError where there is none to hold out."""
    _, groups, _ = read(path)
    training, held_out = (dict.fromkeys(group.prompt for group in part) for part in split(groups))
    # passages of two texts may begin alike
    training, held_out = list(training), [prompt for prompt in held_out if prompt not in training]
    require(bool(held_out), f"{path}: holds too few different prompts: there is none to hold out")
    return training, held_out


# ---- rows and fields -------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) for each row, or "row n" of an array. Raises UserError where the file cannot be read or a
    row is no JSON object."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            if f.peek(1).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                rows = _json(str(path), f.read().removeprefix(codecs.BOM_UTF8))
                yield from ((where := f"{path}, row {i}", _object(where, row)) for i, row in enumerate(rows, 1))
                return
            for number, line in enumerate(f, 1):
                where = f"{path}, line {number}"
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield where, _object(where, _json(where, line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off after line {number} ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _json(where: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError:
        raise UserError(f"{where}: not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _object(where: str, row: Any) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with named fields, found a {type(row).__name__}")
    return row


def _text(where: str, row: dict, name: str) -> str:
    if name not in row:
        raise UserError(f"{where}: has no field {name!r}")
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text, found a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name!r} holds half of a surrogate pair, which no text can") from None
    return value


def _margin(where: str, row: dict) -> float:
    return 1.0 if row.get("margin") is None else _number(where, row, "margin")


def _number(where: str, row: dict, name: str) -> float:
    value = row[name]
    if type(value) not in (int, float) or not abs(value) < 1e15:  # an int of JSON may be too large for a float
        raise UserError(f"{where}: {name!r} must be a number below 1e15, found {value!r}")
    return float(value)
