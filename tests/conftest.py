"""Fixtures that several test files share, and how kernels run without a GPU."""

import nanopref  # noqa: F401  (before torch, whose threads it tells how to wait)

# isort: split
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which must be chosen before anything imports triton

from nanopref import sft
from nanopref.evaluation import report
from nanopref.running import replace

settings.register_profile("patient", deadline=None)  # a busy machine is no error
settings.load_profile("patient")


def pytest_collection_modifyitems(items):
    """What waits for the compiler comes last."""
    items.sort(key=lambda item: "compiled" in item.fixturenames)


@pytest.fixture(autouse=True)
def no_run_comes_back_at_the_end():
    """Of the old runs that tests leave set aside."""
    yield
    replace._aside.clear()


@pytest.fixture(scope="session", autouse=True)
def compiler(request):
    """`kernels.inspect`, at work from the first test on with what the tests, of one thread mostly, leave idle."""
    if not any("compiled" in item.fixturenames for item in request.session.items):
        yield
        return
    command = ["nice", "-n", "5", sys.executable, "-m", "kernels.inspect", "--json"]
    environment, pipe = os.environ | {"TRITON_INTERPRET": "0"}, subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    yield process
    if process.poll() is None:  # the tests were stopped before they needed it
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def compiled(compiler) -> list[dict]:
    """A row for each kernel, target and configuration."""
    output, errors = compiler.communicate()
    assert compiler.returncode == 0, output + errors
    return json.loads(output)


@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory) -> str:
    """A small GPT that has seen a few hundred film reviews."""
    out = tmp_path_factory.mktemp("sft") / "run"
    sft.train(sft.Config(out=str(out), steps=60, device="cpu"))
    return str(out)


@pytest.fixture
def no_picture(monkeypatch) -> None:
    """For runs of which only the numbers are looked at: matplotlib takes longer than so small a run."""
    monkeypatch.setattr(report, "plot", lambda panels, path: None)


@pytest.fixture(scope="module")
def small_and_plain() -> Iterator[None]:
    """For runs of tiny models: one thread, since tensors this small wait for each other with more; and no pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda panels, path: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pools(tmp_path_factory) -> Iterator[dict]:
    """Processes that stay together, 2, 3 and 4, see processes.py."""
    import processes

    found = {n: processes.Pool(n, tmp_path_factory.mktemp(f"pool of {n}")) for n in (2, 3, 4)}
    yield found
    for pool in found.values():
        pool.close()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """What their runs begin with, and where they are."""
    import processes

    return processes.prepare(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, named by NANOPREF_DATA."""
    if "NANOPREF_DATA" not in os.environ:
        pytest.skip("NANOPREF_DATA is not set: it should name the folder with hh_harmless.jsonl.gz")
    return Path(os.environ["NANOPREF_DATA"])
