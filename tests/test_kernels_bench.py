"""The bench where there is no GPU: its errors are small, its tables and picture come out."""

import os
import subprocess
import sys

import kernels
from kernels import bench

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
ROUND = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-6}


def test_errors():
    rows = bench.errors(DEVICE, n=20, d=128, v=200, elements=300)
    assert {row["function"] for row in rows} == {"token_logprobs", *bench.LOSSES}
    for row in rows:
        assert row["triton"] <= 1e-6 and row["triton gradient"] <= max(1e-6, ROUND[row["dtype"]])
    assert len(bench.error_table(rows).splitlines()) == len(rows) + 1


def test_table_and_picture(tmp_path):
    row = {"dtype": "bfloat16", "who": "triton", "pass": "forward+backward", "ms": 1.5, "MiB": 2.0, "rate": 3.0}
    row |= {"unit": "TFLOP/s", "share": 0.5}
    rows = [row | {"function": "token_logprobs", "shape": f"N={n} D=768 V=50257"} for n in bench.TOKENS]
    rows += [row | {"function": name, "shape": "1024 elements"} for name in bench.LOSSES]
    failed = {"function": "dpo_loss", "shape": "4 elements", "who": "eager", "failed": "out of memory"}
    rows.append({"dtype": "float32", "pass": "forward+backward"} | failed)
    assert "50% of the limit" in bench.table(rows) and "out of memory" in bench.table(rows)
    bench.picture({"gpu": "no GPU: invented rows of a test", "timings": rows}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_a_sweep_drops_what_is_wrong_and_keeps_the_fastest(monkeypatch):
    """Times are invented: the second thing measured is the fastest. Results are the interpreter's."""
    times = iter([2.0, 1.0] + [2.0] * 20)

    def measure(call):
        call()
        return next(times), 0.0

    good, overlapping, impossible = {"ROWS": 32, "COLUMNS": 32}, {"COLUMNS": 128, "SPAN": 64}, {"STEP": 24}
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "REFINEMENTS", [{"GROUP": 1}, {"SPAN": 512}])
    rows = [{"D": 32, "product": "forward", "changes": changes} for changes in (good, overlapping, impossible)]
    rows.append({"D": 32, "product": "weight", "changes": good, "fault": "spills registers"})
    found = bench.timed_candidates(rows, 20, 32, 300, DEVICE, 1.0)
    *found, _, _, _, together = found
    assert [row["changes"] for row in found if row["product"] == "forward"] == [
        {}, good, overlapping, impossible, good | {"GROUP": 1}, good | {"SPAN": 512}
    ]  # fmt: skip
    failed = [row["changes"] for row in found if "failed" in row]
    assert failed == [overlapping, impossible]
    assert [row["product"] for row in found[6:]] == ["slopes"] * 2 + ["hidden"] * 2 + ["weight"] * 2
    assert together["changes"] == {"forward": good, "slopes": {}, "hidden": {}, "weight": {}}
    assert "of the limit" in bench.sweep_table(found) and "error" in bench.sweep_table(found)
    assert bench.logprob.tilings(0, False, True)["forward"]["COLUMNS"] == 128


STATIC = """
import torch
from kernels import bench
torch.cuda.device_count, torch.cuda.is_available = lambda: 0, lambda: False
deep = {"STEP": 128, "num_stages": 8, "maxnreg": None}
bench.CANDIDATES[:] = [{"ROWS": 256, "num_stages": 3, "maxnreg": None}, deep]
bench.sweep()
"""


def test_candidates_are_compiled_without_a_gpu():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", STATIC], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 1 + 4 * 2 + 2, done.stdout + done.stderr
    assert all(("STEP 128" in line) == ("more shared memory" in line) for line in lines[1:9])
    assert lines[9].startswith("4 of 8 candidates remain") and "nothing is timed" in lines[10]
