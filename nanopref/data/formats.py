"""Rows in, groups out: what a file may hold, and what is refused, dropped and counted.

A file (files.py) holds rows in the field names that the ecosystem uses:

    pairs      {"prompt": …, "chosen": …, "rejected": …}, and perhaps a "margin": by how much
               {"chosen": …, "rejected": …}   two whole conversations, as in Anthropic's HH: what they share is the
               prompt
    ratings    {"prompt": …, "responses": […], "scores": […]}   a number each
    rankings   {"prompt": …, "responses": […]}   the best first
    labels     {"prompt": …, "completion": …, "label": …}   true or 1: a good answer; false or 0: a bad one
               {"text": …, "label": …}   the same of a whole text, which is cut into prompts and answers
    responses  {"prompt": …, "completion": …}; here as in labels it may also be called "response"
    votes      {"prompt": …, "a": …, "b": …, "winner": …}   what people said, as `nanopref.people` writes it: votes.py
    messages   {"messages": […]}   a conversation, of which all that the assistant says is to be imitated
    text       {"text": …}
    prompts    {"prompt": …}

Each prompt and each answer is text or a list of messages, {"role": …, "content": …}; see dialogues.py. Other fields are
ignored. A row that does not fit is refused with the file, the line and the reason; what real data makes necessary (an
empty answer, two that are equal: the row is dropped) is counted, for the user to see.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanopref.data import chat
from nanopref.data.dialogues import TURN, Dialogue, as_prompt, first_turn, messages_of, text_of
from nanopref.data.files import read_rows
from nanopref.data.groups import Group, as_labels, split, standardised
from nanopref.data.tokenizer import Tokenizer
from nanopref.data.votes import AGGREGATES, as_pairs, from_row, majority
from nanopref.running.flags import UserError, require

PASSAGE, OPENING = 32, 12  # words of a passage, at least, and of the prompt that it begins with


# ---- a reader for each kind of row -----------------------------------------------------------------------------------


def _pair(where: str, row: dict, notes: Counter) -> list[Group]:
    sides = {name: _given(where, row, name) for name in ("chosen", "rejected")}
    if "prompt" in row or all(isinstance(side, list) for side in sides.values()):
        group = _answered(where, row, list(sides.items()), notes)
    elif found := split_dialogues(*(text_of(where, *side) for side in sides.items())):
        group = found
    else:
        reason = f"has no field 'prompt', and the two share no dialogue up to a {TURN.strip()!r}"
        raise UserError(f"{where}: {reason}")
    if not (kept := _compared(group._replace(margin=_margin(where, row)), notes)):
        return []
    if group.whole and any(TURN in response for response in group.responses):
        notes[PART_EARLIER] += 1
    return kept


PART_EARLIER = "pairs that part before the last turn (kept: the answer runs to the end)"
ONE_TURN = "answers cut where the user speaks again"


def _answered(where: str, row: dict, answers: list[tuple[str, Any]], notes: Counter) -> Group:
    """A group of a prompt and answers, (name, text or messages). Where messages repeat what was asked, or nothing else
    says it, the prompt is what all of them share up to an assistant's turn; of an answer its first turn counts."""
    prompt = _asked(where, row) if "prompt" in row else None
    given = [(name, messages_of(where, name, value) if isinstance(value, list) else value) for name, value in answers]
    lists = [value for _, value in given if isinstance(value, list)]
    whole = bool(lists) and (prompt is None or _repeats(prompt, lists))
    require(whole or prompt is not None, f"{where}: has no field 'prompt'")
    n = 0
    if whole:
        require(
            len(lists) == len(given), f"{where}: {given[0][0]!r} must be a conversation for each answer, or for none"
        )
        n = len(os.path.commonprefix(lists))  # noqa: RUF071, of lists
        while n > 0 and any(len(messages) == n or messages[n][0] != "assistant" for messages in lists):
            n -= 1
        require(n > 0, f"{where}: {given[0][0]!r}: an assistant turn is missing behind what all answers share")
        prompt = Dialogue(lists[0][:n])
    elif lists and not isinstance(prompt, Dialogue):
        prompt = Dialogue([("user", prompt)])
    texts = []
    for name, value in given:
        if isinstance(value, list):
            speaks = len(value) > n and value[n][0] == "assistant"
            require(speaks, f"{where}: {name!r} must begin with what the assistant says: an assistant turn is missing")
            notes[ONE_TURN] += len(value) > n + 1
            value = f" {value[n][1]}"  # as it stands in the transcript
        texts.append(text_of(where, name, value))
    return Group(prompt, tuple(texts), turns=whole)


def _repeats(prompt: str, lists: list[list]) -> bool:
    """Whether messages begin with what was asked: with the same messages, or a prompt that is text with any."""
    if isinstance(prompt, Dialogue):
        n = len(prompt.messages)
        return all(tuple(messages[:n]) == prompt.messages for messages in lists)
    return all(messages[0][0] != "assistant" for messages in lists)


def _asked(where: str, row: dict) -> str:
    """The prompt of a row."""
    prompt = _given(where, row, "prompt")
    if not isinstance(prompt, list):
        return as_prompt(text_of(where, "prompt", prompt))
    messages = messages_of(where, "prompt", prompt)
    require(messages[-1][0] != "assistant", f"{where}: 'prompt' ends with an answer, to which there is none")
    return Dialogue(messages)


def _given(where: str, row: dict, name: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: has no field {name!r}")
    return row[name]


def split_dialogues(chosen: str, rejected: str) -> Group | None:
    """Two whole dialogues -> what they share up to the answer in which they part, and the rest of each."""
    prompt = os.path.commonprefix([chosen, rejected])  # noqa: RUF071, which takes the two for paths
    # where one answer begins like the other, or one is a turn longer, the turn opens before the first difference
    cut = prompt.rfind(TURN)
    if cut < 0:
        return None
    cut += len(TURN)
    return Group(as_prompt(chosen[:cut]), (chosen[cut:], rejected[cut:]), whole=True)


def _ranking(where: str, row: dict, notes: Counter) -> list[Group]:
    return _compared(_answered(where, row, _responses(where, row), notes), notes)


def _rating(where: str, row: dict, notes: Counter) -> list[Group]:
    answers, scores = _responses(where, row), row.get("scores")
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise UserError(f"{where}: 'scores' must be a list with a number for each of 'responses'")
    scores = [_number(where, {"scores": score}, "scores") for score in scores]
    order = sorted(range(len(scores)), key=lambda k: -scores[k])  # the best first, as everywhere
    group = _answered(where, row, [answers[k] for k in order], notes)
    return _compared(group._replace(scores=tuple(scores[k] for k in order)), notes)


def _responses(where: str, row: dict) -> list[tuple[str, Any]]:
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{where}: 'responses' must be a list of at least two texts")
    return [("responses", response) for response in responses]


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
    return _imitated(_answered(where, row, [(name, _given(where, row, name))], notes), notes)


def _messages(where: str, row: dict, notes: Counter) -> list[Group]:
    messages = messages_of(where, "messages", _given(where, row, "messages"))
    last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=0)
    require(last > 0, f"{where}: 'messages': an assistant turn is missing, which answers something")
    notes["messages dropped that nobody answers"] += len(messages) - last - 1
    return _imitated(Group(Dialogue(messages[:last]), (f" {messages[last][1]}",), turns=True), notes)


def _label(where: str, row: dict, notes: Counter) -> list[Group]:
    good = _good(where, row)
    return [group._replace(scores=(good,)) for group in _response(where, row, notes)]


def _good(where: str, row: dict) -> float:
    label = row.get("label")
    if label not in (0, 1):
        raise UserError(f"{where}: 'label' must be 1 or true (good), 0 or false (bad), found {label!r}")
    return float(label)


def _prompt(where: str, row: dict, notes: Counter) -> list[Group]:
    return [Group(_asked(where, row), ())]


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
    "messages": Kind(("messages",), _messages, "no answer"),
    "labels": Kind(("label",), _label, "no text"),
    "responses": Kind(("completion",), _response, "no text"),
    "votes": Kind(("a", "b", "winner"), lambda where, row, notes: [from_row(where, row)], "no vote that decides"),
    "prompts": Kind((), _prompt, "no prompt"),
}


# ---- whole files -----------------------------------------------------------------------------------------------------


def read(
    path: str | Path, aggregate: Callable = majority, tokenizer: Tokenizer | None = None
) -> tuple[str, list[Group], Counter]:
    """The kind of a file, its groups, and how many rows were dropped and why. Votes become pairs by the `aggregate`.

    With a model's `tokenizer` they are `for_chat`, if it has a chat template. Raises UserError for a file without rows,
    for a row that does not fit, and for a conversation that the template refuses.
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
    if tokenizer is not None and tokenizer.template:
        groups = for_chat(path, groups, tokenizer, notes)
    require(bool(groups), f"{path}: holds {kind.nothing}")
    return name, groups, +notes


def for_chat(path: str | Path, groups: list[Group], tokenizer: Tokenizer, notes: Counter) -> list[Group]:
    """The groups for a model with a chat template, to which an answer is one turn: those of HH's dialogues that run on
    are cut, and dropped where that makes them equal. Raises UserError for what the template refuses."""
    found = []
    for group in groups:
        if group.whole and isinstance(group.prompt, Dialogue):
            cut = tuple(map(first_turn, group.responses))
            notes[ONE_TURN] += sum(map(str.__ne__, cut, group.responses))
            notes[PART_EARLIER] -= any(TURN in response for response in group.responses)
            kept = _compared(group._replace(responses=cut), notes)
            group = kept[0] if kept else None
        if group:
            found.append(group)
    try:
        for group in found:
            chat.check(tokenizer, group.prompt)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found


def read_to_imitate(path: str | Path, tokenizer: Tokenizer | None = None) -> tuple[list[Group], Counter]:
    """What SFT learns to write, K = 1, and how many rows were dropped and why. Raises UserError as `read` does.

    Of answers that were compared the best counts, of two dialogues the whole of it. What has a label counts whether it
    is good or bad, since that is what will be judged.
    """
    kind, groups, notes = read(path, tokenizer=tokenizer)
    require(kind != "prompts", f"{path}: prompts without an answer, of which there is nothing to imitate")
    return [group._replace(responses=group.responses[:1], margin=1.0, scores=()) for group in groups], notes


def read_feedback(
    path: str | Path, kinds: dict[str, Sequence[str]], loss: str, votes: str = "majority",
    tokenizer: Tokenizer | None = None, *, meet: bool = False, hint: str = "use --loss",
) -> tuple[list[Group], list[Group], Counter]:  # fmt: skip
    """What --loss learns from (for training, held out), and how many rows were dropped and why.

    `kinds` says which each name of --loss takes. A loss of labels takes pairs as two each, ratings are
    standardised, and rankings of two are pairs. With `meet` a loss of pairs also takes labels, of which each good
    answer meets a bad one: pairs with a prompt each, of which only a reward model can learn. `votes` names what makes
    pairs of a file of votes. Raises UserError as `read` does, and for a file of another kind.
    """
    kind, groups, notes = read(path, AGGREGATES[votes], tokenizer)
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


def read_prompts(path: str | Path, tokenizer: Tokenizer | None = None) -> tuple[list[str], list[str]]:
    """(for training, held out): the prompts of a file, each once. Raises UserError where there is none to hold out."""
    _, groups, _ = read(path, tokenizer=tokenizer)
    training, held_out = (dict.fromkeys(group.prompt for group in part) for part in split(groups))
    # passages of two texts may begin alike
    training, held_out = list(training), [prompt for prompt in held_out if prompt not in training]
    require(bool(held_out), f"{path}: holds too few different prompts: there is none to hold out")
    return training, held_out


# ---- fields ----------------------------------------------------------------------------------------------------------


def _text(where: str, row: dict, name: str) -> str:
    if name not in row:
        raise UserError(f"{where}: has no field {name!r}")
    return text_of(where, name, row[name])


def _margin(where: str, row: dict) -> float:
    return 1.0 if row.get("margin") is None else _number(where, row, "margin")


def _number(where: str, row: dict, name: str) -> float:
    value = row[name]
    if type(value) not in (int, float) or not abs(value) < 1e15:  # an int of JSON may be too large for a float
        raise UserError(f"{where}: {name!r} must be a number below 1e15, found {value!r}")
    return float(value)
