r"""A prompt that is a conversation: text as any other to all that read text, and messages to a chat template.

As text it is a transcript in the format of Anthropic's HH:

    \n\nHuman: what the user says\n\nAssistant: what was answered\n\nHuman: what the user says to that\n\nAssistant:

In files a conversation is such a text, or a list of messages: [{"role": "user", "content": "…"}, …].
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from nanopref.running.flags import UserError, require

TURN, NEXT = "\n\nAssistant:", "\n\nHuman:"  # what opens an answer, and what the user says to it
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
_OPENING = re.compile(r"\n\n(Human|Assistant):")

Message = tuple[str, str]  # a role and what it says
PARTS = ("role", "content")


class Dialogue(str):
    """Messages that ask for an answer; its value as text is their transcript, or the text that they were read from."""

    messages: tuple[Message, ...]

    def __new__(cls, messages: Iterable[Message], text: str | None = None) -> "Dialogue":
        messages = tuple(messages)
        found = super().__new__(cls, transcript(messages) + TURN if text is None else text)
        found.messages = messages
        return found

    def __getnewargs__(self) -> tuple:
        return self.messages, str(self)


def transcript(messages: Sequence[Message]) -> str:
    return "".join(f"\n\n{NAMES.get(role, role.capitalize())}: {content}" for role, content in messages)


def turns(text: str) -> list[Message]:
    """The messages of a transcript, or nothing where a text is none. What the same side says twice in a row is one."""
    before, *parts = _OPENING.split(text)
    system = before.startswith("\n\nSystem:")
    if not parts or parts[0] != "Human" or (before and not system):
        return []
    found = [("system", before.removeprefix("\n\nSystem:").strip())] if system else []
    for name, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = "user" if name == "Human" else "assistant", said.strip()
        if found and found[-1][0] == role:
            said = "\n\n".join(filter(None, (found.pop()[1], said)))
        found.append((role, said))
    return found


def as_prompt(text: str) -> str:
    """The text, as a Dialogue where it is the transcript of one."""
    messages = turns(text.removesuffix(TURN)) if text.endswith(TURN) else []
    return Dialogue(messages, text) if messages else text


def first_turn(answer: str) -> str:
    """An answer up to where its transcript goes on with another turn."""
    found = _OPENING.search(answer)
    return answer[: found.start()] if found else answer


# ---- messages in files -----------------------------------------------------------------------------------------------


def text_of(where: str, name: str, value: Any) -> str:
    """A text of a row. Raises UserError where it is none."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text, found a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name!r} holds half of a surrogate pair, which no text can") from None
    return value


def messages_of(where: str, name: str, value: Any) -> list[Message]:
    """A list of messages. Raises UserError where it is none, or one has no role, or a content that is no text."""
    found = []
    for message in value if isinstance(value, list) else (None,):
        whole = isinstance(message, dict) and message.keys() >= set(PARTS)
        require(whole, f"{where}: {name!r} must be text, or a list of messages with a 'role' and a 'content'")
        found.append(tuple(text_of(where, f"{part} of a message in {name}", message[part]) for part in PARTS))
    require(bool(found), f"{where}: {name!r} is a list without messages")
    return found


def as_json(prompt: str) -> str | list[dict[str, str]]:
    """What a file says of a prompt, so that it is read back as it is."""
    if isinstance(prompt, Dialogue) and prompt == Dialogue(prompt.messages):
        return [dict(zip(PARTS, message, strict=True)) for message in prompt.messages]
    return prompt  # from whose text the messages were read, and are again
