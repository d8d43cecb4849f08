"""Every kernel, in every configuration it is launched with, compiled for GPUs that need not be there.

    python -m kernels.inspect [--json]

The configurations are not listed by hand: the operators themselves are run with Triton's launcher replaced by one that
notes what it is given (types, which numbers are 1 or multiples of 16, constants, warps, stages), and each distinct note
is compiled for each target. Read from the result: registers a thread, bytes of stack (on CUDA a stack means spilled
registers), shared memory against the most a block may have, and the tensor-core instructions in the machine code.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels import dpo, logprob, ppo

# (target, shared memory a block may have; CUDA C++ Programming Guide, table of compute capabilities, and CDNA 3 LDS)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
TENSOR_CORES = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA|v_mfma)\w*\b")


def note(kernel, args: tuple, options: dict) -> tuple:
    """What Triton's launcher would compile for this call: hashable."""
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in options.items() if k in kernel.arg_names
    }
    signature, constants, aligned = [], [], []
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = bound[name]
        if parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((name, "*" + NAMES[value.dtype]))
        elif isinstance(value, bool):
            signature.append((name, "u1"))
        elif isinstance(value, int):
            signature.append((name, "i32" if value < 2**31 else "i64"))
        else:
            signature.append((name, "fp32"))
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned.append(position)
    launched = tuple((k, v) for k, v in options.items() if k not in kernel.arg_names)
    return kernel, tuple(signature), tuple(constants), tuple(aligned), launched


def configurations(target: str) -> dict[tuple, str]:
    """Each distinct configuration that calls on this target lead to, and the first call that uses it."""
    architecture = TARGETS[target][0].arch
    seen: dict[tuple, str] = {}
    call = ""
    kind, run = triton.runtime.jit.JITFunction, triton.runtime.jit.JITFunction.run
    generation = logprob.generation

    def record(self, *args, grid, warmup, **options):
        seen.setdefault(note(self, args, options), call)

    kind.run = record
    logprob.generation = lambda _: architecture // 10 if isinstance(architecture, int) else 0
    try:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            short = str(dtype).removeprefix("torch.")
            for d, what in ((128, ""), (33, " odd width")):
                call = short + what
                hidden, weight = torch.zeros(1, 160, d, dtype=dtype), torch.zeros(200, d, dtype=dtype)
                targets, grad = torch.zeros(1, 160, dtype=torch.int64), torch.zeros(1, 160)
                out = logprob.token_logprobs(hidden, weight, targets, 1.0)
                logprob.token_logprobs_backward(grad, grad, hidden, weight, targets, *out, 1.0)
            x = torch.zeros(64, dtype=dtype)
            for loss in kernels.reference.DPO_LOSSES:
                call = f"{short} {loss}"
                slopes = dpo.dpo_loss(x, x, x, x, 0.1, 0.0, loss)[3]
            call = short
            dpo.dpo_loss_backward(slopes, slopes, dtype, dtype)
            x = x.view(1, 64)
            for policy in (True, False):
                call = f"{short} {'policy' if policy else 'value'}"
                *_, share, factors = ppo.clipped_loss(x, x, x, x.bool(), 0.2, policy)
            call = short
            ppo.clipped_loss_backward(share, factors, share, dtype)
    finally:
        kind.run, logprob.generation = run, generation
    return seen


def compile_one(job: tuple[str, str, tuple]) -> dict:
    """What the compiler made of one configuration, as a row of the table; `fault` says what is wrong with it."""
    target, call, (kernel, signature, constants, aligned, options) = job
    row = {
        "target": target,
        "kernel": f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.fn.__name__}",
        "call": call,
    }
    source = ASTSource(
        kernel, dict(signature), dict(constants), {(position,): [["tt.divisibility", 16]] for position in aligned}
    )
    try:
        built = triton.compile(source, target=TARGETS[target][0], options=dict(options))
    except Exception as error:  # whatever the compiler raises is the finding
        return row | {"fault": f"does not compile: {str(error)[:200]}"}
    row |= {"shared": built.metadata.shared, "shared_limit": TARGETS[target][1]}
    if "cubin" in built.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage, code = (_dump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
        row |= {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    else:
        code = built.asm["amdgcn"]
    row["tensor_cores"] = sorted({match[1] for match in TENSOR_CORES.finditer(code)})
    product = "PRECISION" in kernel.arg_names and not call.startswith("float32")
    if row["shared"] > row["shared_limit"]:
        row["fault"] = "more shared memory than a block may have"
    elif row.get("stack"):
        row["fault"] = "spills registers"
    elif product and target == "sm_90" and "HGMMA" not in row["tensor_cores"]:
        row["fault"] = "no tensor-core instruction"
    return row


def _dump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def survey(targets: list[str], calls: str = "") -> list[dict]:
    """Rows for every configuration of these targets whose call's description matches the regular expression."""
    if kernels.INTERPRETED:
        raise SystemExit("kernels.inspect: the interpreter compiles nothing; run it without TRITON_INTERPRET")
    jobs = [
        (target, call, configuration)
        for target in targets
        for configuration, call in configurations(target).items()
        if re.search(calls, call)
    ]
    # processes, because a compilation holds Python's lock; forked, because a kernel cannot be pickled
    global _jobs
    _jobs = jobs
    with get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(_compile_numbered, range(len(jobs)), chunksize=1)


def _compile_numbered(number: int) -> dict:
    return compile_one(_jobs[number])


def table(rows: list[dict]) -> str:
    lines = [f"{'target':8}{'kernel':26}{'first call':22}{'registers':>9}{'stack':>6}{'shared':>8}  tensor cores"]
    for row in rows:
        registers, stack, shared = (row.get(key, "-") for key in ("reg", "stack", "shared"))
        end = row.get("fault", ", ".join(row.get("tensor_cores", ())))
        lines.append(f"{row['target']:8}{row['kernel']:26}{row['call']:22}{registers:>9}{stack:>6}{shared:>8}  {end}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that need not be there.")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, help="which GPUs")
    parser.add_argument("--calls", default="", help="only calls that match this, as 'bfloat16' or 'odd width'")
    arguments = parser.parse_args()
    rows = survey(arguments.targets, arguments.calls)
    print(json.dumps(rows) if arguments.json else table(rows))
    faults = sum("fault" in row for row in rows)
    if faults:
        raise SystemExit(f"kernels.inspect: {faults} of {len(rows)} configurations have a fault")


if __name__ == "__main__":
    main()
