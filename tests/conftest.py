"""Fixtures that several test files share, and how kernels run without a GPU."""

import nanopref  # noqa: F401  (before torch, whose threads it tells how to wait)

# isort: split
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which must be chosen before anything imports triton

from nanopref import evaluate, sft

settings.register_profile("patient", deadline=None)  # a busy machine is no error
settings.load_profile("patient")


@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory) -> str:
    """A small GPT that has seen a few hundred film reviews."""
    out = tmp_path_factory.mktemp("sft") / "run"
    sft.train(sft.Config(out=str(out), steps=60, device="cpu"))
    return str(out)


@pytest.fixture
def no_picture(monkeypatch) -> None:
    """For runs of which only the numbers are looked at: matplotlib takes longer than so small a run."""
    monkeypatch.setattr(evaluate, "plot", lambda panels, path: None)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, named by NANOPREF_DATA."""
    if "NANOPREF_DATA" not in os.environ:
        pytest.skip("NANOPREF_DATA is not set: it should name the folder with hh_harmless.jsonl.gz")
    return Path(os.environ["NANOPREF_DATA"])
