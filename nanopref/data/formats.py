"""JSON Lines in, groups out: what a file may hold, and what is refused, dropped and counted.

A file is `.jsonl` or `.jsonl.gz`, one object a row, in the field names that the ecosystem uses:

    pairs      {"prompt": …, "chosen": …, "rejected": …}, and perhaps a "margin": by how much
               {"chosen": …, "rejected": …}   two whole dialogues, as in Anthropic's HH: what they share is the prompt
    rankings   {"prompt": …, "responses": […]}   the best first
    responses  {"prompt": …, "completion": …}, or "response"
    text       {"text": …}
    labels     {"text": …, "label": …}   1 or 0: whether the text is what people want

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanopref.data.groups import Group, split
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
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{where}: 'responses' must be a list of at least two texts, the best first")
    texts = tuple(_text(where, {"responses": response}, "responses") for response in responses)
    return _compared(Group(_text(where, row, "prompt"), texts), notes)


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


def _plain(where: str, row: dict, notes: Counter) -> list[Group]:
    return _imitated(Group("", (_text(where, row, "text"),), whole=True), notes)


def _imitated(group: Group, notes: Counter) -> list[Group]:
    if group.responses[0].strip():
        return [group]
    notes["rows dropped: no text"] += 1
    return []


def _labelled(where: str, row: dict, notes: Counter) -> list[Group]:
    text, label = _text(where, row, "text"), row.get("label")
    if label not in (0, 1):
        raise UserError(f"{where}: 'label' must be 1 (good) or 0 (bad), found {label!r}")
    found = [Group(prompt, (rest,), label=int(label), source=text) for prompt, rest in passages(text)]
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
    "rankings": Kind(("responses",), _ranking, "no usable ranking"),
    "labels": Kind(("text", "label"), _labelled, f"no text in which a sentence ends after its first {PASSAGE} words"),
    "text": Kind(("text",), _plain, "no text"),
    "responses": Kind((), _response, "no text"),
}


# ---- whole files -----------------------------------------------------------------------------------------------------


def read(path: str | Path) -> tuple[str, list[Group], Counter]:
    """The kind of a file, its groups, and how many rows were dropped and why.

    Raises UserError for a file without rows and for a row that does not fit.
    """
    groups, notes, kind, name = [], Counter(), None, ""
    for where, row in read_rows(path):
        if kind is None:
            name, kind = next((name, kind) for name, kind in KINDS.items() if row.keys() >= set(kind.fields))
        if name == "pairs" and "text" in row and "chosen" not in row:
            raise UserError(f"{where}: a text in a file of pairs")
        groups += kind.read(where, row, notes)
    require(kind is not None, f"{path}: holds no row")
    require(bool(groups), f"{path}: holds {kind.nothing}")
    return name, groups, +notes


def read_to_imitate(path: str | Path) -> tuple[list[Group], Counter]:
    """What SFT learns to write, K = 1, and how many rows were dropped and why. Raises UserError as `read` does.

    Of answers that were compared the best counts, of two dialogues the whole of it. Texts with a label become passages,
    the good and the bad, which is what a reward model will judge.
    """
    _, groups, notes = read(path)
    return [group._replace(responses=group.responses[:1], margin=1.0) for group in groups], notes


def read_comparisons(path: str | Path, *, labels: bool = False) -> tuple[list[Group], list[Group], Counter]:
    """Groups of at least two answers (for training, held out), and how many rows were dropped and why.

    With `labels` also from labelled texts, of which each good passage meets a bad one: pairs with a prompt each, of
    which only a reward model can learn. Raises UserError as `read` does, and for a file that compares nothing.
    """
    kind, groups, notes = read(path)
    if kind in ("pairs", "rankings"):
        return *split(groups), notes
    hint = "train_rm.py learns from texts with labels, and then --reward names what it learnt"
    require(kind == "labels" and labels, f"{path}: {kind}, which compare nothing; {hint}")
    parts = []
    for part in split(groups):
        random.Random(0).shuffle(part)  # or all passages of a text would meet those of one other
        good, bad = ([group for group in part if group.label == label] for label in (1, 0))
        require(bool(good and bad), f"{path}: needs good and bad texts (label 1 and 0), to train on and to hold out")
        met = zip(good, bad, strict=False)  # what one side has more of is left over
        parts.append([Group(a.prompt, a.responses + b.responses, prompts=(a.prompt, b.prompt)) for a, b in met])
        notes["passages dropped: more of one label than of the other"] += abs(len(good) - len(bad))
    return *parts, +notes


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
    """("file, line n", row) for each row. Raises UserError where the file cannot be read or a row is no JSON object."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            for number, line in enumerate(f, 1):
                where = f"{path}, line {number}"
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError:
                    raise UserError(f"{where}: not valid UTF-8") from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where}: must be an object with named fields, found a {type(row).__name__}")
                yield where, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off after line {number} ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


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
    value = row.get("margin")
    value = 1.0 if value is None else value
    if type(value) not in (int, float) or not 0 <= value < 1e30:  # an int of JSON may be too large for a float
        raise UserError(f"{where}: 'margin' must be a number of at least 0, found {value!r}")
    return float(value)
