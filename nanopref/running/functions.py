"""Functions of the user's own, which a flag names as FILE.py:FUNCTION: a judge for --reward, a loss for --loss."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from nanopref.running.flags import UserError, require


def load(flag: str, name: str) -> Callable:
    """The function that `name`, FILE.py:FUNCTION, names. Raises UserError, which names the flag too, without one."""
    path, function = file_of(name), name.rpartition(":")[2]
    require(path.is_file(), f"{flag} {name}: {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"{flag.strip('-')}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for themselves
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the code is not ours
        raise UserError(f"{flag} {name}: {path} cannot be imported: {in_a_line(error)}") from None
    found = getattr(module, function, None)
    require(callable(found), f"{flag} {name}: {path} has no function {function!r}")
    return found


def file_of(name: str) -> Path:
    """Of FILE.py:FUNCTION."""
    return Path(name.rpartition(":")[0])


def parameters(function: Callable) -> set[str]:
    """Their names; none of a function that does not tell, as some that are built in."""
    try:
        return set(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return set()


def in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
