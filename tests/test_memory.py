"""Memory counted without the hardware is what a step really takes here."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import by_hand
import pytest
import real_memory
import torch
from helpers import Fork, forks

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


def test_what_a_storage_gives_back_is_not_counted():
    with memory.Peak() as peak:
        storage = torch.zeros(1000).untyped_storage()
        storage.resize_(0)
        assert (peak.now, peak.most) == (0, 4000)
        storage.resize_(400)
        assert (peak.now, peak.most) == (400, 4000)
        del storage
        assert peak.now == 0
    assert "resize_" not in vars(torch.UntypedStorage)


# ---- several processes -----------------------------------------------------------------------------------------------

FEW = dict(zip(memory.SIZES, (2048, 512, 4, 8, 2, 512, 1536, 64, False), strict=True))
MATRICES = 4 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1536)  # of the blocks
REST = (2 * 4 + 1) * 512 + 2 * 2048 * 512  # norms; embedding and unembedding


def at_once(folder: Path, *calls: tuple) -> list[dict[str, float]]:
    """What functions of real_memory.py write, each in a process of its own."""
    files = [folder / str(i) for i in range(len(calls))]
    each = [forks.Process(target=f, args=(file, *args)) for file, (f, *args) in zip(files, calls, strict=True)]
    for process in each:
        process.start()
    for process in each:
        process.join(120)
        assert process.exitcode == 0
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("engine, pieces", [("ddp", 1), ("ddp", 2), ("fsdp", 2)])
def test_of_two_processes_each_takes_and_sends_what_was_foretold(engine, pieces, tmp_path):
    """To the byte that is sent; in tensors to 0.1%, but gloo holds gradients of a block longer than FSDP2 does; as the
    system sees it within 25 MiB, which libraries take."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    real = [(real_memory.of_two, port, rank, engine, FEW, 2, 256, pieces) for rank in range(2)]
    *found, expected = at_once(tmp_path, *real, (real_memory.foretold, "rm", engine, 2, FEW, 2, 256, pieces))
    longer = MATRICES / memory.GIB if engine == "fsdp" else 0  # 4 bytes a weight of one of four blocks
    for one in found:
        assert 0.999 * expected["GiB"] < one["counted"] < 1.001 * expected["GiB"] + longer
        assert one["GiB"] == pytest.approx(expected["GiB"], abs=0.025)
        assert one["GB sent"] == pytest.approx(expected["GB sent"], rel=1e-6)


def test_a_step_sends_eight_bytes_a_weight_with_ddp_and_with_fsdp_for_each_micro_batch(tmp_path):
    """float32 gradients go round twice; or bfloat16 matrices are gathered twice and all else, in float32, once, and
    gradients scattered in float32. Adapters' gradients are little, but what is frozen is gathered too."""
    ways = [(engine, pieces) for engine in ("ddp", "fsdp") for pieces in (1, 3)]
    found = at_once(tmp_path, *((real_memory.foretold, "dpo", e, 8, FEW, 2, 64, n) for e, n in ways))
    once = 7 / 8 * 8 * (MATRICES + REST) / 1e9
    assert [x["GB sent"] for x in found] == pytest.approx([once, once, once, 3 * once], rel=1e-9)
    ddp, fsdp = found[0], found[2]
    assert fsdp["optimiser"] == pytest.approx(ddp["optimiser"] / 8, rel=1e-4) and fsdp["GiB"] < ddp["GiB"]
    assert ddp["ms sending"] == pytest.approx(once / 450 * 1e3)


def test_flops_are_six_for_a_weight_and_a_token_and_those_of_attention():
    """And two more for what is computed again: by kernels logits, and attention's products; blocks but their ends."""
    found = []
    for again in (False, True):
        with memory.Fake(), memory.Peak() as peak, kernels.use("triton"):
            config = real_memory.settings(dtype="bfloat16", checkpoint_activations=again)
            *_, step = memory.prepared("dpo", LlamaConfig(**FEW), 2, 64, config)
            peak.flops = 0
            step()
        found.append(peak.flops / (2 * 64))
    attention, unembedding, ends = 4 * 512 * 64, 2048 * 512, 4 * 512 * 1536
    once = 6 * MATRICES + (12 + 2) * attention + (6 + 2) * unembedding
    assert found == [once, once + 2 * (MATRICES - ends) + 4 * attention]


def test_the_command_tells_what_is_sent(tmp_path):
    folder = by_hand.tiny_model(tmp_path / "model")
    words = ("--model", folder, "--tokens", "32", "--gpus", "16", "--parallel", "fsdp")
    process = Fork(tmp_path / "log", "nanopref.memory", *words)
    code, said = process.finish()
    rows = [line for line in said.splitlines() if folder in line]
    assert code == 0 and len(rows) == 12 and "ms sending" in said, said
