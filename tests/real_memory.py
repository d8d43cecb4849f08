"""A child of test_memory.py: GiB that a step really takes here."""

import json
import sys

import nanopref  # noqa: F401  (first, because of its threads)
from nanopref import memory
from nanopref.models.llama import LlamaConfig
from nanopref.running import parallel
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


if __name__ == "__main__":
    print(main(**json.loads(sys.argv[1])))
