"""What the tests of files share: rows in, and what is said of a file that cannot be used."""

import json

import pytest

from nanopref.data.formats import read_feedback
from nanopref.learning.objectives import OBJECTIVES, SCORES, kinds
from nanopref.running.flags import UserError


def jsonl(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def refusal(read, path, *args) -> str:
    """What a reader says of a file that it must refuse, in one line that names the file."""
    with pytest.raises(UserError) as error:
        read(path, *args)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def feedback(path, loss="dpo"):
    """As train_dpo.py reads it."""
    return read_feedback(path, kinds(OBJECTIVES), loss)


def judged(path, loss="bradley-terry"):
    """As train_rm.py reads it."""
    return read_feedback(path, kinds(SCORES), loss, meet=True)


def labelled(n: int) -> list[dict]:
    """Texts of two passages each, the even ones good."""
    return [{"text": f"w{i} " * 31 + "end. " + f"v{i} " * 31 + "end.", "label": (i + 1) % 2} for i in range(n)]
