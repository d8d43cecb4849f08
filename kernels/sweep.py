"""Other tilings of the log-probs' products: compiled and pruned without a GPU, then timed one launch at a time.

    python -m kernels.sweep

Candidates that spill, or take more shared memory than there is, are dropped by what `kernels.inspect` reads off their
code. On a Hopper GPU each of the others must give the default's results, and is timed. Results go to
kernels/results/<gpu>-sweep.json; what is found fastest belongs into `logprob.tilings`.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

import kernels
from kernels import inspect, logprob
from kernels.bench import HEADS, distance, head_inputs, limits, measure, result_path

# Each product's kernel, and the argument that tells the two gradients apart
PRODUCTS = {"forward": ("_forward", {}), "slopes": ("_slopes", {})}
PRODUCTS |= {"hidden": ("_gradient", {"OF_WEIGHT": False}), "weight": ("_gradient", {"OF_WEIGHT": True})}
# An SM of Hopper has 227 KiB of shared memory for programs, each of which takes stages × (rows + columns) × step × 2
# bytes, and 65,536 registers, of which a program's sums take rows × columns and the slopes' or softmax's temporaries
# nearly as many again. 128×256 and 256×128 on 8 warps read the fewest bytes an operation, and fill an SM alone.
# 128×128 (on 8 warps, or on 4 with longer instructions) and 64×256 leave room for a second program, which multiplies
# while the first is at its exponentials, its start or its end; a cap on registers makes room for a third, where 8192
# tokens of 768 numbers make 384 tiles for 132 SMs. Steps of 64 are one swizzled row of 128 bytes; longer ones wait less
# often. The weight's gradient gathers rows by an index that is itself loaded, which takes half of its stages.
SHAPES = [  # rows, columns, step, warps, stages, registers
    (128, 128, 64, 8, 3, None),
    (128, 128, 64, 8, 3, 128),
    (128, 128, 64, 8, 4, 128),
    (128, 128, 128, 8, 3, None),
    (128, 128, 64, 4, 3, None),
    (128, 128, 64, 4, 4, None),
    (128, 128, 64, 4, 2, 168),
    (128, 256, 64, 8, 3, None),
    (128, 256, 64, 8, 4, None),
    (256, 128, 64, 8, 3, None),
    (256, 128, 64, 8, 4, None),
    (128, 128, 64, 8, 5, 128),
    (256, 128, 64, 8, 5, None),
    (64, 256, 64, 4, 2, None),
    (64, 256, 64, 4, 3, None),
    (64, 128, 64, 4, 3, 128),
]
CANDIDATES = [
    dict(zip(("ROWS", "COLUMNS", "STEP", "num_warps", "num_stages", "maxnreg"), shape, strict=True)) for shape in SHAPES
]
# tried on the best of these: how many row tiles share their columns, which is a matter of D; how long a program walks
REFINEMENTS = [{"GROUP": 4}, {"GROUP": 8}, {"GROUP": 16}, {"GROUP": 64}, {"SPAN": 512}, {"SPAN": 2048}]
SPILLS = 64  # bytes of stack a thread that may lie outside the loop, and are left to the clock to judge
SWEEP = [HEADS[0], HEADS[-1]]


@contextmanager
def tiled(product: str, changes: dict) -> Iterator[None]:
    """One product tiled otherwise."""
    usual = logprob.tilings

    def tilings(*of):
        found = usual(*of)
        return found | {product: found[product] | changes}

    logprob.tilings = tilings
    try:
        yield
    finally:
        logprob.tilings = usual


@contextmanager
def launches() -> Iterator[list[tuple]]:
    """What Triton launches meanwhile: (kernel, arguments, options)."""
    kind, seen = type(logprob._forward), []
    run = kind.run

    def record(kernel, *arguments, **options):
        seen.append((kernel, arguments, options))
        return run(kernel, *arguments, **options)

    kind.run = record
    try:
        yield seen
    finally:
        kind.run = run


def title(changes: dict) -> str:
    return " ".join(f"{name.removeprefix('num_')} {x}" for name, x in changes.items() if x is not None) or "default"


def compiled_candidates(heads: list[tuple[int, int]]) -> list[dict]:
    """Rows of `kernels.inspect` for every product in every candidate; Triton's cache keeps them for the GPU."""

    def calls():
        for d, v in heads:
            for product in PRODUCTS:
                for number, changes in enumerate([{}, *CANDIDATES]):
                    yield f"{d} {product} {number}"
                    with tiled(product, changes):
                        # what the compiler sees of the sizes is what powers of two divide them
                        inspect.head(160, math.gcd(d, 256), 2512 + v % 16, torch.bfloat16)

    rows = []
    for row in inspect.survey(["sm_90"], calls=calls):
        d, product, number = row.pop("call").split()
        if row["kernel"].removeprefix("logprob.") == PRODUCTS[product][0] and number != "0":
            row |= {"D": int(d), "product": product, "changes": CANDIDATES[int(number) - 1]}
            if row.get("fault") == "spills registers" and row["stack"] <= SPILLS:
                del row["fault"]
            if "reg" in row:
                threads = 32 * row["warps"]
                fits = 65536 // (row["reg"] * threads), 228 * 1024 // (row["shared"] + 1024), 2048 // threads
                row["programs"] = min(fits)
            rows.append(row)
    return rows


def static_table(rows: list[dict]) -> str:
    lines = [f"{'product':9}{'candidate':60}{'registers':>9}{'stack':>7}{'shared':>8}{'programs an SM':>16}"]
    for row in rows:
        numbers = (row.get(key, "-") for key in ("reg", "stack", "shared", "programs"))
        reg, stack, shared, programs = numbers
        start = f"{row['product']:9}{title(row['changes']):60}{reg:>9}{stack:>7}{shared:>8}{programs:>16}"
        lines.append(f"{start}  {row.get('fault', ', '.join(row.get('tensor_cores', ())))}")
    return "\n".join(lines)


def timed_candidates(rows: list[dict], n: int, d: int, v: int, device: str, limit: float) -> list[dict]:
    """Each product in the default tiling, in each row's, in the best one's refinements; then the best ones together."""
    hidden, weight, targets = (x.detach() for x in head_inputs(n, d, v, torch.bfloat16, device))
    up, up_entropy = torch.randn(1, n, device=device), torch.randn(1, n, device=device)

    def forward() -> tuple[Tensor, ...]:
        return logprob.token_logprobs(hidden[None], weight, targets[None], 1.0)

    def both() -> list[Tensor]:
        out = forward()
        every = up, up_entropy, hidden[None], weight, targets[None], *out, 1.0, True, True
        return [*out, *logprob.token_logprobs_backward(*every)]

    want = both()
    # all but the forward work on a block of some entries
    entries = dict.fromkeys(PRODUCTS, min(v, logprob.plan(n, v, d, 2)[1])) | {"forward": v}
    found = []

    def time_one(product: str, changes: dict) -> None:
        row = {"D": d, "product": product, "changes": changes}
        found.append(row)
        name, constants = PRODUCTS[product]
        try:
            with tiled(product, changes), launches() as seen:
                row["error"] = distance(both(), want)
            own = [x for x in seen if x[0].fn.__name__ == name and x[2].items() >= constants.items()]
            kernel, arguments, options = own[:2][-1]  # the second block: the first has nothing to add to
            ms, _ = measure(lambda: kernel.run(*arguments, **options))
        except Exception as error:  # a candidate that does not run must not end the sweep
            row["failed"] = f"{type(error).__name__}: {str(error)[:80]}"
            return
        rate = 2 * n * d * entries[product] / ms / 1e9
        row |= {"ms": ms, "rate": rate, "share": rate / limit}
        if not row["error"] < 2**-7:  # twice bfloat16's rounding
            row["failed"] = f"error {row['error']:.1e}"

    best = {}
    for product in PRODUCTS:
        start = len(found)
        time_one(product, {})
        for row in rows:
            if row["product"] == product and row["D"] == d and "fault" not in row:
                time_one(product, row["changes"])

        def good(start: int = start) -> list[dict]:
            """The fastest first."""
            return sorted((row for row in found[start:] if "failed" not in row), key=lambda row: row["ms"])

        leader = good()[0]["changes"]
        for refinement in REFINEMENTS:
            if product == "forward" or "SPAN" not in refinement:
                time_one(product, leader | refinement)
        best[product] = good()[0]["changes"]
        failed = [row for row in found[start:] if "failed" in row]
        print(sweep_table(good() + failed), flush=True)
    for name, tilings in (("default", {}), ("best together", best)):
        with ExitStack() as stack:
            for product, changes in tilings.items():
                stack.enter_context(tiled(product, changes))
            for what, call, products in (("forward", forward, 1), ("forward+backward", both, 3)):
                ms, memory = measure(call)
                rate = 2 * products * n * d * v / ms / 1e9
                row = {"D": d, "product": what, "changes": tilings, "ms": ms, "rate": rate, "share": rate / limit}
                found.append(row | {"MiB": memory})
                print(f"D={d} {name}, {what}: {ms:.3f} ms, {rate:.1f} TFLOP/s, {rate / limit:.0%}, {memory:.0f} MiB")
    return found


def sweep_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        start = f"D={row['D']:<6}{row['product']:9}{title(row['changes']):60}"
        if "failed" in row:
            lines.append(f"{start} {row['failed']}")
        else:
            end = f"{row['rate']:8.1f} TFLOP/s{row['share']:5.0%} of the limit, differs {row['error']:.0e}"
            lines.append(f"{start}{row['ms']:9.3f} ms{end}")
    return "\n".join(lines)


def sweep() -> None:
    start = time.time()
    # counting the GPUs leaves CUDA alone, which must not be awake when the compiling processes are forked
    rows = compiled_candidates(SWEEP if torch.cuda.device_count() else SWEEP[:1])
    print(static_table([row for row in rows if row["D"] == SWEEP[0][0]]))
    left = sum("fault" not in row for row in rows)
    print(f"{left} of {len(rows)} candidates remain after {time.time() - start:.0f} s", flush=True)
    if not torch.cuda.is_available():
        print("kernels.sweep: there is no GPU here, so nothing is timed.")
        return
    if torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("kernels.sweep: the candidates are counted for Hopper")
    gpu = torch.cuda.get_device_name()
    results = {"gpu": gpu, "torch": torch.__version__, "triton": kernels.triton.__version__, "limits": limits()}
    results |= {"compiled": rows, "timings": []}
    print(gpu, {key: round(value) for key, value in results["limits"].items()}, "TFLOP/s, TFLOP/s, GB/s", flush=True)
    path = result_path(gpu + "-sweep")
    for d, v in SWEEP:
        results["timings"] += timed_candidates(rows, 8192, d, v, "cuda", results["limits"]["bfloat16"])
        path.write_text(json.dumps(results, indent=1))
    print(f"{path} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    sweep()
