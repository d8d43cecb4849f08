"""Every kernel, in every configuration it is launched with, compiled for GPUs that need not be there.

    python -m kernels.inspect [--json]

The configurations are not listed by hand: the operators themselves are run with Triton's launcher replaced by one that
notes what it would compile (types, which numbers are 1 or multiples of 16, constants, warps, stages), and each distinct
note is compiled for each target. Read from the result: registers a thread, bytes of stack (on CUDA a stack means
spilled registers), shared memory against the most a block may have, and the tensor-core instructions (of PTX, which the
assembler translates one by one, and of AMD's machine code).
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

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
PRODUCTS = {f"logprob.{name}" for name in ("_forward", "_slopes", "_gradient")}
TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)\b|\b(v_mfma)_")


def note(kernel, args: tuple, options: dict, target: GPUTarget) -> tuple[ASTSource, dict]:
    """What Triton's launcher would compile for this call, found as the launcher finds it."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options


def operators() -> Iterator[str]:
    """Calls every operator in every dtype and layout, and before each says what comes."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for d, what in ((128, ""), (33, " odd width")):
            yield short + what
            head(160, d, 2500, dtype)
        x = torch.zeros(64, dtype=dtype)
        for loss in kernels.reference.MARGIN_LOSSES:
            yield f"{short} {loss}"
            slopes = dpo.dpo_loss(x, x, x, x, 0.1, 0.0, loss)[3]
        yield short
        dpo.dpo_loss_backward(slopes, slopes, dtype, dtype)
        x = x.view(1, 64)
        for policy in (True, False):
            yield f"{short} {'policy' if policy else 'value'}"
            *_, share, factors = ppo.clipped_loss(x, x, x, x.bool(), 0.2, policy)
        yield short
        ppo.clipped_loss_backward(share, factors, share, dtype)


def head(n: int, d: int, v: int, dtype: torch.dtype) -> None:
    """The log-probs of n tokens, forward and backward."""
    hidden, weight = torch.zeros(1, n, d, dtype=dtype), torch.zeros(v, d, dtype=dtype)
    targets, grad = torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, n)
    out = logprob.token_logprobs(hidden, weight, targets, 1.0)
    logprob.token_logprobs_backward(grad, grad, hidden, weight, targets, *out, 1.0, True, True)


def configurations(name: str, calls: Callable[[], Iterator[str]] = operators) -> list[tuple[str, str, ASTSource, dict]]:
    """(target, first call that uses it, source, options) of each distinct configuration on this target."""
    target, _ = TARGETS[name]
    seen = {}
    kind, run = triton.runtime.jit.JITFunction, triton.runtime.jit.JITFunction.run
    generation = logprob.generation

    def record(self, *args, grid, warmup, **options):
        source, options = note(self, args, options, target)
        seen.setdefault((source.hash(), str(options)), (name, call, source, options))

    kind.run = record
    logprob.generation = lambda _: target.arch // 10 if target.backend == "cuda" else 0
    try:
        for call in calls():  # noqa: B007 (`record` reads it)
            pass
    finally:
        kind.run, logprob.generation = run, generation
    return list(seen.values())


def compile_one(name: str, call: str, source: ASTSource, options: dict) -> dict:
    """What the compiler made of one configuration, as a row of the table; `fault` says what is wrong with it."""
    target, limit = TARGETS[name]
    file = Path(source.fn.fn.__code__.co_filename).stem
    row = {"target": name, "kernel": f"{file}.{source.fn.__name__}", "call": call}
    try:
        built = triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever the compiler raises is the finding; the first cause's last line says why
        while error.__cause__:
            error = error.__cause__
        return row | {"fault": f"does not compile: {(str(error).strip() or repr(error)).splitlines()[-1][:200]}"}
    code = built.asm["ptx" if "ptx" in built.asm else "amdgcn"]
    cores = sorted({match[1] or match[2] for match in TENSOR_CORES.finditer(code)})
    row |= {"shared": built.metadata.shared, "shared_limit": limit, "tensor_cores": cores}
    row["warps"] = built.metadata.num_warps
    if "cubin" in built.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
        row |= {key.lower(): int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}
    if row["shared"] > limit:
        row["fault"] = "more shared memory than a block may have"
    elif row.get("stack"):
        row["fault"] = "spills registers"
    elif row["kernel"] in PRODUCTS and not cores and not (name == "gfx942" and call.startswith("float32")):
        row["fault"] = "no tensor-core instruction"
    return row


def survey(targets: list[str], matching: str = "", calls: Callable[[], Iterator[str]] = operators) -> list[dict]:
    """Rows for every configuration of these targets whose call's description matches the regular expression."""
    if kernels.INTERPRETED:
        raise SystemExit("kernels.inspect: the interpreter compiles nothing; run it without TRITON_INTERPRET")
    # processes, because a compilation holds Python's lock; forked, because a kernel cannot be pickled
    global _jobs
    _jobs = [job for target in targets for job in configurations(target, calls) if re.search(matching, job[1])]
    with get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_compile_numbered, range(len(_jobs)), chunksize=1)


def _compile_numbered(number: int) -> dict:
    return compile_one(*_jobs[number])


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
