"""What the training scripts share: models, data, feedback, learning, evaluation and runs."""

import importlib.util
import os
import sys
from pathlib import Path

# How long an OpenMP thread spins before it sleeps. torch reads this when it is first imported. By default it spins for
# milliseconds, and where another process wants the same core, training runs at a fifth of its speed.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


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
