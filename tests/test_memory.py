"""Memory counted without the hardware is what a step really takes here."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import by_hand
import pytest
import torch

import kernels
from nanopref import memory
from nanopref.models.llama import LlamaConfig
from nanopref.running import parallel
from nanopref.running.flags import ModelFlags

SHAPE = (512, 512, 6, 8, 2, 512, 1536, 64)  # so small a vocabulary that logits, which kernels never hold, are nothing


def predicted(script: str, **flags) -> dict[str, float]:
    config = ModelFlags(**flags)
    config.seed = 0
    return memory.predicted(script, LlamaConfig(*SHAPE), 2, 512, config)


@pytest.fixture(autouse=True)
def as_triton(monkeypatch):
    monkeypatch.setattr(parallel, "_dtype", "bfloat16")
    monkeypatch.setattr(kernels, "INTERPRETED", True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "script, flags", [("rm", {}), ("dpo", {"lora": 16}), ("ppo", {"lora": 16, "checkpoint_activations": True})]
)
def test_a_prediction_is_what_a_step_takes(script, flags):
    """Within 15% and 25 MiB, which libraries take for themselves."""
    settings = {"script": script, "shape": SHAPE, "rows": 2, "tokens": 512, "dtype": "bfloat16", "flags": flags}
    command = [sys.executable, str(Path(__file__).parent / "real_memory.py"), json.dumps(settings)]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    expected = predicted(script, **flags)["GiB"] - (0 if script == "rm" else kernels.logprob.LIMIT / memory.GIB)
    assert found == pytest.approx(expected, rel=0.15, abs=0.025)


def test_the_parts_are_those_of_adamw_and_of_one_trunk():
    n, trunk = 512 * 512, 6 * (512 * 512 * 2 + 512 * 128 * 2 + 3 * 512 * 1536)  # embedding; the blocks' matrices
    whole, adapted = predicted("dpo"), predicted("dpo", lora=16)
    assert whole["weights"] == pytest.approx(4 * (n + trunk) / memory.GIB, rel=0.01) == whole["gradients"]
    assert whole["optimiser"] == pytest.approx(2 * whole["weights"], rel=0.01) and whole["frozen"] == 0
    assert adapted["frozen"] == pytest.approx((4 * n + 2 * trunk) / memory.GIB, rel=0.01)
    assert adapted["optimiser"] == pytest.approx(2 * adapted["weights"], rel=0.01)
    assert adapted["optimiser"] < 0.1 * whole["optimiser"]
    ppo = predicted("ppo", lora=16)  # policy and reference on one trunk, reward model and critic on another
    assert ppo["frozen"] == pytest.approx(2 * adapted["frozen"], rel=0.01)
    assert ppo["weights"] == pytest.approx(2 * adapted["weights"], rel=0.01)


def test_what_saves_memory_saves_it():
    held, again = predicted("rm", lora=16), predicted("rm", lora=16, checkpoint_activations=True)
    assert again["GiB"] < 0.5 * held["GiB"]


def test_the_command_prints_a_row_for_each_way(tmp_path, capsys):
    folder = by_hand.tiny_model(tmp_path / "model")
    memory.main(memory.Config(model=(folder,), tokens=32))
    lines = capsys.readouterr().out.splitlines()
    assert sum(folder in line for line in lines) == 12 and "computed again" in lines[-1]
    assert asdict(memory.Config())["model"] == tuple(memory.SHAPES) and not torch.is_autocast_enabled("cpu")
