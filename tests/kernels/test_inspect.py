"""The kernels compile for GPUs that are not there, without spills, with tensor cores, within shared memory."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from kernels.reference import MARGIN_LOSSES

TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
# in three dtypes: two layouts (and two gradients), each loss of DPO, two of PPO; `_finish` knows float32 alone
CONFIGURATIONS = {
    **{f"logprob.{name}": 6 for name in ("_forward", "_merge", "_slopes")},
    "logprob._gradient": 12,
    **{"dpo._forward": 3 * len(MARGIN_LOSSES), "dpo._backward": 3},
    **{"ppo._forward": 6, "ppo._finish": 1, "ppo._backward": 3},
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    assert Counter(row["kernel"] for row in rows) == CONFIGURATIONS
    for row in rows:
        assert "fault" not in row and row["shared"] <= row["shared_limit"]
        product = row["kernel"] in ("logprob._forward", "logprob._slopes", "logprob._gradient")
        if target == "gfx942":
            assert row["tensor_cores"] == ["v_mfma"] * product
        else:
            instruction = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(target, "mma.sync")
            assert row["stack"] == 0 and 0 < row["reg"] <= 255 and row["tensor_cores"] == [instruction] * product


FAULTS = """
import torch
from kernels import dpo, inspect, ppo
def show():
    (row,) = inspect.survey(["sm_90"], "^float16 policy$")
    print(row.get("fault"))
show()
note, target = inspect.note, inspect.TARGETS["sm_90"]
inspect.note = lambda kernel, args, options, target: note(kernel, args, options | {"maxnreg": 24}, target)
show()
inspect.note = note
inspect.PRODUCTS.add("ppo._forward")
show()
inspect.TARGETS["sm_90"] = target[0], 0
show()
def unknown():
    yield "a loss without a branch"
    dpo.dpo_loss(*[torch.zeros(3)] * 4, 0.1, 0.0, "unknown")
(row,) = inspect.survey(["sm_90"], calls=unknown)
print(row["fault"])
ppo.BLOCK = 1000
inspect.main()
"""


def test_faults_are_found():
    command = [sys.executable, "-c", FAULTS, "--targets", "sm_90", "--calls", "^float16 policy$"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    first, *found = done.stdout.splitlines()
    assert first == "None" and found[0] == "spills registers" and found[1] == "no tensor-core instruction"
    assert found[2] == "more shared memory than a block may have"
    assert found[3] == "does not compile: a row of reference.MARGIN_LOSSES has no branch here"
    assert any("does not compile: Shape element 0 must be a power of 2" in line for line in found[4:])
    assert done.returncode == 1 and "1 of 1 configurations have a fault" in done.stderr
