"""What the training scripts share: models, data, feedback, learning, evaluation and runs."""

import importlib.util
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

# How long an OpenMP thread spins before it sleeps. torch reads this when it is first imported. By default it spins for
# milliseconds, and where another process wants the same core, training runs at a fifth of its speed.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def stop_at_once(words: str = "\nstopped: start the same command to continue", code: int = 130) -> None:
    """End the process with these words, if any, and this exit code."""
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, f"{words}\n".encode() if words else b"")
    os._exit(code)


def _is_command() -> bool:
    """Whether a command of ours was started: a script beside this folder, or a module in it with `python -m`."""
    if sys.argv[:1] == ["-m"]:  # as long as the module is looked for
        return any(word.removeprefix("-m").startswith("nanopref.") for word in sys.orig_argv)
    script = getattr(sys.modules["__main__"], "__file__", None)
    return script is not None and Path(script).resolve().parent == Path(__file__).resolve().parent.parent


def _stop_imports_in_a_line() -> None:
    """Make Ctrl-C end a command at once until `flags.execute` takes over, and after it: there is nothing to save, and
    what torch imports would swallow a KeyboardInterrupt, or make another error of it. And say so where memory runs out.
    """
    if not _is_command():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: stop_at_once())

    def tell(kind, error, trace) -> None:
        if kind is MemoryError or "failed to map segment" in str(error) or "allocate memory" in str(error):
            stop_at_once("error: out of memory, before anything has begun: torch alone takes more than there is", 2)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell


_stop_imports_in_a_line()


def _find_kernels() -> None:
    """Make `import kernels` mean the folder beside this one: Hugging Face has a package of that name too, which comes
    first where both are installed and the working directory is not ours."""
    ours = Path(__file__).parent.parent / "kernels" / "__init__.py"
    whole = ours.exists() and "def sequence_logprobs" in ours.read_text(
        encoding="utf-8"
    )  # the other may have replaced it
    module, spec = sys.modules.get("kernels"), importlib.util.find_spec("kernels")
    found = Path((module and module.__file__) or (spec and spec.origin) or "nowhere")
    if whole and found.exists() and found.samefile(ours):
        return
    if whole and module is None:
        spec = importlib.util.spec_from_file_location("kernels", ours, submodule_search_locations=[str(ours.parent)])
        sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])
        return
    raise ImportError(
        f"nanopref needs its own package `kernels`, and Python found another one in {found.parent}: import nanopref "
        "before it, or uninstall the other (pip uninstall kernels) and install nanopref again"
    )


_find_kernels()
