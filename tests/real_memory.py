"""Children of test_memory.py: GiB that a step really takes here, and what one of several processes sends."""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
import nanopref  # noqa: F401  (first, because of its threads)
from nanopref import memory
from nanopref.models.llama import LlamaConfig
from nanopref.running import parallel, sharding
from nanopref.running.flags import ModelFlags


def resident(name: str) -> int:
    """VmRSS now, or VmHWM, the most since it was reset."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


def main(script: str, shape: list[int], rows: int, tokens: int, dtype: str, flags: dict) -> float:
    parallel.start("cpu", 0, dtype)
    config = ModelFlags(**flags)
    config.seed = 0
    small = LlamaConfig(64, 64, 1, 2, 1, 64, 64, 32)
    memory.prepared(script, small, 2, 32, config)[-1]()  # what libraries take when they are first used
    before = resident("VmRSS")
    _, _, step = memory.prepared(script, LlamaConfig(*shape), rows, tokens, config)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    step()
    return (resident("VmHWM") - before) / memory.GIB


def settings(**flags) -> ModelFlags:
    config = ModelFlags(**flags)
    config.seed = 0
    return config


def of_two(
    file: Path, port: int, rank: int, engine: str, shape: dict, rows: int, tokens: int, pieces: int
) -> None:  # fmt: skip
    """What a step on so many micro-batches, but the first, is found to take and to send in one of two processes."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 65536)  # what is larger goes back to the system as soon as it is free
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(where | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    parallel.start("cpu", 0, "bfloat16", engine)

    def begin(shape: LlamaConfig, rows: int, tokens: int):
        modules, _, step = memory.prepared("rm", shape, rows, tokens, settings(), pieces)
        sharding.sum_gradients_of(modules[0])

        def whole_step() -> None:
            step()
            for p in modules[0].parameters():
                p.grad = None

        whole_step()
        whole_step()  # after which DDP's buckets, made anew in it, have been written to
        gc.collect()
        return whole_step

    begin(LlamaConfig(64, 64, 1, 2, 1, 64, 64, 32), 2, 32)
    before = resident("VmRSS")
    with memory.Peak() as peak:
        step = begin(LlamaConfig(**shape), rows, tokens)
        peak.most, peak.sent = peak.now, 0.0
        Path("/proc/self/clear_refs").write_text("5")
        dist.barrier()
        step()
    most = (resident("VmHWM") - before) / memory.GIB
    found = {"GiB": most, "counted": peak.most / memory.GIB, "GB sent": peak.sent / 1e9}
    file.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def foretold(file: Path, script: str, engine: str, processes: int, shape: dict, rows: int, tokens: int, pieces: int):
    """What is said of the first of so many processes."""
    memory.join(processes, "bfloat16", engine)
    kernels.INTERPRETED = True
    found = memory.predicted(script, LlamaConfig(**shape), rows, tokens, settings(), pieces=pieces)
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    print(main(**json.loads(sys.argv[1])))
