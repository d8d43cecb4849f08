"""What ends a command while it is being imported, whatever torch makes of it; and nothing of it for others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = [[str(path)] for path in sorted(ROOT.glob("train_*.py"))]
COMMANDS += [["-m", f"nanopref.{name}"] for name in ("sft", "generate", "evaluate", "people", "bench", "memory")]
COMMANDS += [["-mnanopref.experiments.losses"]]
PRESSED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
raise ImportError("torch swallows it")
"""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[-1]).stem)
def test_ctrl_c_during_imports_is_a_line(command, tmp_path):
    """With a torch that has it pressed while it is imported."""
    done = start(tmp_path, *command)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\nstopped: start the same command to continue\n"


@pytest.mark.parametrize("how", [["-c", "import nanopref.sft"], ["theirs.py"], ["-m", "theirs"]])
def test_who_imports_nanopref_has_ctrl_c_as_it_was(how, tmp_path):
    (tmp_path / "theirs.py").write_text("import nanopref.sft")
    done = start(tmp_path, *how)
    assert done.returncode == 1 and "ImportError: torch swallows it" in done.stderr


@pytest.mark.parametrize(
    "error, memory",
    [
        ("MemoryError", True),
        ("ImportError('libtorch_cpu.so: failed to map segment from shared object')", True),
        ("OSError(12, 'Cannot allocate memory')", True),
        ("ImportError('libcuda.so: no such file')", False),
    ],
)
def test_no_memory_to_import_torch_is_a_sentence(error, memory, tmp_path):
    done = start(tmp_path, COMMANDS[0][0], torch=f"raise {error}")
    assert done.stderr.startswith("error: out of memory, before anything has begun") == memory
    assert (done.returncode, done.stderr.count("Traceback")) == ((2, 0) if memory else (1, 1))


def start(folder: Path, *words: str, torch: str = PRESSED) -> subprocess.CompletedProcess:
    """Python, in a folder with such a torch."""
    (folder / "torch.py").write_text(torch)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run([sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True)
