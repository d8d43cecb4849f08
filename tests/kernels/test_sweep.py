"""The sweep over tilings: what is wrong is dropped, what is fastest is kept, and candidates compile without a GPU."""

import os
import subprocess
import sys

import kernels
from kernels import sweep

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"


def test_a_sweep_drops_what_is_wrong_and_keeps_the_fastest(monkeypatch):
    """Times are invented: the second thing measured is the fastest. Results are the interpreter's."""
    times = iter([2.0, 1.0] + [2.0] * 20)

    def measure(call):
        call()
        return next(times), 0.0

    good, overlapping, impossible = {"ROWS": 32, "COLUMNS": 32}, {"COLUMNS": 128, "SPAN": 64}, {"STEP": 24}
    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(sweep, "REFINEMENTS", [{"GROUP": 1}, {"SPAN": 512}])
    rows = [{"D": 32, "product": "forward", "changes": changes} for changes in (good, overlapping, impossible)]
    rows.append({"D": 32, "product": "weight", "changes": good, "fault": "spills registers"})
    found = sweep.timed_candidates(rows, 20, 32, 150, DEVICE, 1.0)
    *found, _, _, _, together = found
    assert [row["changes"] for row in found if row["product"] == "forward"] == [
        {}, good, overlapping, impossible, good | {"GROUP": 1}, good | {"SPAN": 512}
    ]  # fmt: skip
    failed = [row["changes"] for row in found if "failed" in row]
    assert failed == [overlapping, impossible]
    assert [row["product"] for row in found[6:]] == ["slopes"] * 2 + ["hidden"] * 2 + ["weight"] * 2
    assert together["changes"] == {"forward": good, "slopes": {}, "hidden": {}, "weight": {}}
    assert "of the limit" in sweep.sweep_table(found) and "error" in sweep.sweep_table(found)
    assert sweep.logprob.tilings(0, False, True)["forward"]["COLUMNS"] == 128


STATIC = """
import torch
from kernels import sweep
torch.cuda.device_count, torch.cuda.is_available = lambda: 0, lambda: False
deep = {"STEP": 128, "num_stages": 8, "maxnreg": None}
sweep.PRODUCTS = {"forward": sweep.PRODUCTS["forward"]}
sweep.CANDIDATES[:] = [{"ROWS": 256, "num_stages": 3, "maxnreg": None}, deep]
sweep.sweep()
"""


def test_candidates_are_compiled_without_a_gpu():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", STATIC], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 1 + 2 + 2, done.stdout + done.stderr
    assert all(("STEP 128" in line) == ("more shared memory" in line) for line in lines[1:3])
    assert lines[3].startswith("1 of 2 candidates remain") and "nothing is timed" in lines[4]
