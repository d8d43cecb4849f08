"""The bench where there is no GPU: its errors are small, its tables and picture come out."""

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
