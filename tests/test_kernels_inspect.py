"""The kernels compile for GPUs that are not there, without spills, with tensor cores, within shared memory."""

import json
import os
import subprocess
import sys

import pytest

# every kernel on every target, and on sm_90 in both layouts; the whole table, which takes minutes, is
# `python -m kernels.inspect`
SAMPLE = {
    "sm_80": "^float16( sigmoid| policy)?$",
    "sm_90": "^bfloat16",
    "sm_100": "^float32( hinge| policy)?$",
    "sm_120": "^bfloat16( ipo| value)?$",
    "gfx942": "^float16( sigmoid| value)?$",
}


@pytest.mark.parametrize("target", SAMPLE)
def test_compiles(target):
    command = [sys.executable, "-m", "kernels.inspect", "--json", "--targets", target, "--calls", SAMPLE[target]]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"].split(".")[0] for row in rows} == {"logprob", "dpo", "ppo"}
    for row in rows:
        assert "fault" not in row and row["shared"] <= row["shared_limit"] and not row.get("stack")
        product = row["kernel"].split("._")[1] in ("forward", "slopes", "hidden_gradient", "weight_gradient")
        if target == "sm_90" and row["kernel"].startswith("logprob") and product:
            assert "HGMMA" in row["tensor_cores"]
