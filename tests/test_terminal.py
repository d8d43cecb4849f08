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


def test_ctrl_c_while_python_shuts_down_is_a_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    )
    done = start(tmp_path, "-m", "nanopref.sft", "--steps", "0", torch="")
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr == "error: --steps must be at least 1, not 0\n\nstopped: start the same command to continue\n"


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


ALLOCATIONS = """
import mmap, resource, threading
import numpy, torch
from dataclasses import dataclass
from nanopref.running import flags

now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))

@dataclass
class Config:
    micro_batch: int = 16

def threads(config):
    stop = threading.Event()
    try:
        for _ in range(1000):
            threading.Thread(target=stop.wait).start()
    finally:
        stop.set()

ways = [threads, lambda c: bytes(2**30), lambda c: numpy.zeros(2**30), lambda c: torch.empty(2**30),
        lambda c: mmap.mmap(-1, 2**30), lambda c: torch.ones(2**12, 1) @ torch.ones(1, 2**16)]
for way in ways:
    try:
        flags.execute(way, Config())
    except SystemExit as stop:
        assert stop.code == 2
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much memory it has is read there")
def test_whoever_runs_out_of_memory_the_flag_to_lower_is_named(tmp_path):
    """Python, numpy, PyTorch, the system, or threads that have no room for their stacks."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALLOCATIONS], env=environment, capture_output=True, text=True)
    assert done.stderr == 6 * "error: out of memory: lower --micro-batch (now 16)\n" and done.returncode == 0


def start(folder: Path, *words: str, torch: str = PRESSED) -> subprocess.CompletedProcess:
    """Python, in a folder with such a torch in place of the real one."""
    if torch:
        (folder / "torch.py").write_text(torch)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run([sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True)
