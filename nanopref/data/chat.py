"""Prompts and answers in tokens: plain text as it stands, a conversation as the model's chat template writes it.

Prompt and answer are tokenised each by itself, so the tokens of a prompt are a prefix of those of prompt and answer
whatever the template, and an answer ends with exactly one token that ends it. What the data say is never special: in a
message "<|im_end|>" is characters. A model without a template sees the transcript of a conversation.
"""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from nanopref.data.dialogues import TURN, Dialogue, Message, transcript
from nanopref.data.tokenizer import Tokenizer
from nanopref.running.flags import require

CUT = "prompts cut on the left to fit the context"
SHORTENED = "dialogues that lost their oldest turns to fit the context"


class Closing(NamedTuple):
    """How a template closes what the assistant says."""

    end: str  # the token that ends it; nothing where the template has none
    upto: str  # what stands between its last character and the end of that token
    whole: str  # what stands behind its last character if it is the last to speak


def ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens at which an answer ends. Raises UserError for a chat template that does not work."""
    token = tokenizer.template and _closing(tokenizer).end
    return tokenizer.ends | ({tokenizer.added[token]} if token else set())


def check(tokenizer: Tokenizer, prompt: str = Dialogue([("user", "?")])) -> None:
    """Raise UserError where the chat template refuses a conversation, or an answer to it, or does not work at all."""
    if tokenizer.template and isinstance(prompt, Dialogue):
        _render(tokenizer, prompt.messages, True)
        _render(tokenizer, [*prompt.messages, ("assistant", "?")], False)
        _closing(tokenizer)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, room: int | None = None, notes: Counter | None = None
) -> list[int]:
    """Tokens of a prompt, at most `room`; an empty one becomes end-of-text, after which anything may begin.

    A text that is too long loses its beginning. A conversation loses its oldest turns, never what the system says; if
    still too long, the last message loses its beginning. `notes` counts what was cut.
    """
    notes = Counter() if notes is None else notes
    if not (isinstance(prompt, Dialogue) and tokenizer.template):
        begin, tokens = tokenizer.begin, tokenizer.encode(prompt)
        if room is not None and len(begin) + len(tokens) > room:
            notes[CUT] += 1
            tokens = tokens[-(room - len(begin)) :] if room > len(begin) else tokens
            return (begin + tokens)[-room:]
        return begin + tokens or [tokenizer.end_of_text]
    messages = list(prompt.messages)
    tokens = _encode(tokenizer, messages)
    if room is None or len(tokens) <= room:
        return tokens
    while len(tokens) > room and (shorter := without_oldest(messages)):
        messages, tokens = shorter, _encode(tokenizer, shorter)
    notes[SHORTENED if len(tokens) <= room else CUT] += 1
    while len(tokens) > room and messages[-1][1]:
        role, content = messages[-1]
        kept = tokenizer.encode(content)[len(tokens) - room :]
        messages[-1] = role, tokenizer.decode_bytes(kept).decode("utf-8", "ignore") if kept else ""
        tokens = _encode(tokenizer, messages)
    return tokens[-room:]


def asked(tokenizer: Tokenizer, prompt: str) -> str:
    """The transcript of what a chat template writes in its own way; nothing for a prompt that is read as it stands."""
    return str(prompt) if isinstance(prompt, Dialogue) and tokenizer.template else ""


def encode_answer(tokenizer: Tokenizer, prompt: str, response: str) -> list[int]:
    """Tokens of an answer to a prompt, up to and with the one that ends it."""
    if not (isinstance(prompt, Dialogue) and tokenizer.template):
        return [*tokenizer.encode(response), tokenizer.end_of_text]
    messages, mark = _protected(tokenizer, [*prompt.messages, ("assistant", response.strip())])
    closing = _closing(tokenizer)
    opened, whole = _render(tokenizer, messages[:-1], True), _render(tokenizer, messages, False)
    if whole.startswith(opened) and whole.endswith(closing.whole):
        text = whole[len(opened) : len(whole) - len(closing.whole)] + closing.upto
    else:  # a template that opens an answer in another way than it writes one
        text = messages[-1][1] + closing.upto
    return _tokens(tokenizer, text, mark) + ([] if closing.end else [tokenizer.end_of_text])


def encode_turns(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> tuple[list[int], list[bool], bool]:
    """Tokens of a conversation up to its last answer, which of them count (what the assistant says, and the token that
    ends each turn of it), and whether it lost its oldest turns to fit into `room`; no tokens where one does not fit."""
    shortened = False
    while messages:
        parts = (_template_parts if tokenizer.template else _plain_parts)(tokenizer, messages)
        counted = [its for tokens, its in parts for _ in tokens]
        if len(counted) <= room:
            return [token for tokens, _ in parts for token in tokens], counted, shortened
        messages, shortened = without_oldest(messages), True
    return [], [], shortened


def shortened(tokenizer: Tokenizer, prompts: Sequence[str], room: int) -> Counter:
    """How many prompts lose something to fit into `room`, and what."""
    notes = Counter()
    for prompt in prompts:
        encode_prompt(tokenizer, prompt, room, notes)
    return notes


def without_oldest(messages: Sequence[Message]) -> list[Message]:
    """A conversation without its first exchange, so that behind what the system says it again begins with a user;
    nothing where it has but one."""
    start = next((i for i, (role, _) in enumerate(messages) if role != "system"), len(messages))
    later = [i for i, (role, _) in enumerate(messages) if role == "user" and i > start]
    return [*messages[:start], *messages[later[0] :]] if later else []


# ---- the parts of a conversation, each with whether it counts --------------------------------------------------------


def _plain_parts(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
    """Of the transcript, end-of-text behind each answer."""
    parts, asked = [(tokenizer.begin, False)], []
    for role, content in messages:
        if role == "assistant":
            parts.append((tokenizer.encode(transcript(asked) + TURN), False))
            parts.append(([*tokenizer.encode(f" {content.strip()}"), tokenizer.end_of_text], True))
            asked = []
        else:
            asked.append((role, content))
    return parts


def _template_parts(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
    """Of what the template makes of the whole. A turn begins where the template opens an answer to all before it."""
    messages, mark = _protected(tokenizer, messages)
    closing, text = _closing(tokenizer), _render(tokenizer, messages, False)
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    starts = []
    for i in answers:
        opened = _render(tokenizer, messages[:i], True)
        starts.append(len(opened) if text.startswith(opened) else len(os.path.commonprefix([opened, text])))  # noqa: RUF071
    parts, before = [], 0
    for i, start, limit in zip(answers, starts, [*starts[1:], len(text)], strict=True):
        content = messages[i][1].strip()
        if i == answers[-1] == len(messages) - 1 and text.endswith(closing.whole):
            end = len(text) - len(closing.whole) + len(closing.upto)
        else:  # what is said holds no such token, so the first one ends it
            mine = closing.end or content
            at = text.find(mine, start, limit)
            require(at >= 0, f"the model's chat template leaves no trace of an assistant turn: {content[:80]!r}")
            end = at + len(mine)
        asked, said = (_tokens(tokenizer, part, mark) for part in (text[before:start], text[start:end]))
        parts += [(asked, False), (said, True)]
        before = end
    return parts if closing.end else [*parts, ([tokenizer.end_of_text], True)]


# ---- a template's text in tokens -------------------------------------------------------------------------------------


def _encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    messages, mark = _protected(tokenizer, messages)
    return _tokens(tokenizer, _render(tokenizer, messages, True), mark)


def _render(tokenizer: Tokenizer, messages: Sequence[Message], answer: bool) -> str:
    from nanopref.data import template  # which few need

    return template.render(tokenizer.template, tokenizer.variables, messages, answer)


class _Special(NamedTuple):
    """The special tokens of a tokenizer as text."""

    anywhere: re.Pattern  # each, and
    starting: re.Pattern  # where one starts
    forwards: list[str]  # in order, and
    backwards: list[str]  # read from behind
    longest: int


@lru_cache(maxsize=8)
def _special(tokens: tuple[str, ...]) -> _Special:
    tokens = sorted(tokens, key=len, reverse=True)
    anyone = "|".join(map(re.escape, tokens)) or "(?!)"
    forwards, backwards = sorted(tokens), sorted(token[::-1] for token in tokens)
    longest = max(map(len, tokens), default=0)
    return _Special(re.compile(f"({anyone})"), re.compile(f"(?={anyone})"), forwards, backwards, longest)


def _begins(tokens: list[str], part: str) -> bool:
    """Whether one of the tokens, which are in order, begins with the part and is more."""
    i = bisect_right(tokens, part)
    return i < len(tokens) and tokens[i].startswith(part)


def _protected(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The messages with a character in every place where a content makes, or helps to make, a special token, and that
    character, which stands nowhere else: the template sees it as text, and the tokens are made without it."""
    special = _special(tokenizer.special)
    known = {*"".join(content for _, content in messages), *tokenizer.template}
    mark = next(c for c in map(chr, range(0xE000, 0x10FFFF)) if c not in known)
    return [(role, _broken(content, special, mark)) for role, content in messages], mark


def _broken(content: str, special: _Special, mark: str) -> str:
    said = content.strip()
    start = content.find(said)
    places = {match.start() + 1 for match in special.starting.finditer(said)}
    for n in range(1, min(len(said), special.longest) + 1):
        if _begins(special.forwards, said[-n:]):  # what follows it may be the rest
            places.add(len(said) - n + 1)
        if _begins(special.backwards, said[:n][::-1]):  # what stands before it may be the beginning
            places.add(0)
    bounds = [0, *(start + place for place in sorted(places)), len(content)]
    return mark.join(content[a:b] for a, b in pairwise(bounds))


def _tokens(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """Tokens of a template's text, without the mark."""
    if mark not in text:
        return tokenizer.encode(text, special=True)
    found = []
    for i, piece in enumerate(_special(tokenizer.special).anywhere.split(text)):  # every other one is special
        found += [tokenizer.added[piece]] if i % 2 else tokenizer.encode(piece.replace(mark, ""))
    return found


PROBE = "\ue000"


def _closing(tokenizer: Tokenizer) -> Closing:
    return _closing_of(tokenizer.template, tuple(tokenizer.variables.items()), tuple(tokenizer.added))


@lru_cache(maxsize=8)
def _closing_of(source: str, variables: tuple[tuple[str, str], ...], tokens: tuple[str, ...]) -> Closing:
    from nanopref.data import template

    text = template.render(source, dict(variables), [("user", "?"), ("assistant", PROBE)], False)
    require(PROBE in text, "the model's chat template leaves out what the assistant says")
    behind = text.rpartition(PROBE)[2]
    found = _special(tokens).anywhere.search(behind)
    return Closing(found[0], behind[: found.end()], behind) if found else Closing("", "", behind)
