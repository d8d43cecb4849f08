"""What a process is to those around it: alone or one of several, what it may print, and how Ctrl-C ends it."""

import codecs
import hashlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress

import torch.distributed as dist

from nanopref import stop_at_once


def place() -> tuple[int, int] | None:
    """RANK and LOCAL_RANK, where torchrun has started this process beside others: all that it tells a process is there
    and makes sense. What is left of that in an environment means nothing."""
    numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not os.environ.get("MASTER_ADDR") or not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        return None
    rank, local_rank, size, _ = map(int, numbers)
    return (rank, local_rank) if rank < size else None


@contextmanager
def said_once() -> Iterator[None]:
    """Of what all processes print alike, as --help, let the first print its own alone."""
    with ExitStack() as stack:
        if (place() or (0, 0))[0] > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def is_first_to_say(message: str, alike: bool) -> bool:
    """Whether no other process of this run has said so before. Of processes that never met the first is to speak where
    all of them would say it (`alike`), and each where not."""
    with suppress(RuntimeError, ValueError):
        key = f"said {hashlib.sha256(message.encode()).hexdigest()}"
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    return not alike or (place() or (0, 0))[0] == 0


# ---- text that is printed --------------------------------------------------------------------------------------------

# what a terminal obeys, as to move, to colour or to turn round what was written, and halves of surrogate pairs
_OBEYED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\N{ARABIC LETTER MARK}\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_PLAIN = {"─": "-", "│": "|", "…": "...", "×": "x", "·": "-", "±": "+-", "β": "beta", "θ": "theta", "π": "pi"}


def shown(text: str) -> str:
    """A text with escapes in place of what a terminal would obey instead of showing it."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def line(said: object, most: int = 1200) -> str:
    """What is said, as a line: escapes in place of all that is not printable, and of a long one both ends."""

    def cut(text: str) -> str:
        return text if len(text) <= most else f"{text[: most * 3 // 4]} … {text[-most // 4 :]}"

    return cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut(str(said))))


def _in_its_place(error: UnicodeError) -> tuple[str, int]:
    """For what an encoding lacks: something alike, or its escape."""
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in letters), error.end


def prepare() -> None:
    """Make what this process prints printable in whatever encoding, and what is typed readable; a stream that is
    closed swallows what it is given."""
    codecs.register_error("nanopref", _in_its_place)
    for name in ("stdin", "stdout", "stderr"):
        stream, reads = getattr(sys, name), name == "stdin"
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if reads else "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if reads else "nanopref")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@contextmanager
def interrupts(again: str) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in the block, and comes out of it as that even where something makes another
    error of it, as a module does that is being imported. A second one ends the process at once, and says `again`."""
    before, pressed = signal.getsignal(signal.SIGINT), []
    ours = threading.current_thread() is threading.main_thread() and callable(before)

    def press(*_) -> None:
        if pressed:
            stop_at_once(f"\nstopped: {again}" if (place() or (0, 0))[0] == 0 else "")
        pressed.append(True)
        raise KeyboardInterrupt

    try:
        if ours:
            signal.signal(signal.SIGINT, press)
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
