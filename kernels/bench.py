"""Each kernel against plain PyTorch: error, time, memory, and how far from what the same card can do.

    python -m kernels.bench [--sweep]

With a GPU: every shape of the grid below, forward and forward + backward, for the Triton kernels, eager PyTorch,
`torch.compile` of the reference and other libraries' kernels where they are installed. The limits are measured by the
same run: a large matmul, a large copy. Results go to kernels/results/<gpu>.json and .png. Without one: the errors, in
Triton's interpreter, and what the kernels compile to for an H100. Nothing is timed there.

`--sweep` is for Hopper: other tilings of each product of `token_logprobs`, compiled first, without the GPU, which drops
those that do not fit; the rest timed one launch at a time and held against the default's results, and the best of each
together. Results go to kernels/results/<gpu>-sweep.json. Without a GPU: what each candidate compiles to.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

import kernels
from kernels import inspect, logprob, reference

HEADS = [(768, 50257), (1024, 50257), (2048, 128256), (4096, 128256)]
TOKENS = [4096, 8192, 16384, 32768]
ELEMENTS = [2**k for k in range(10, 27, 2)]
# bytes an element that a float32 loss must move, forward and forward + backward: see kernels/dpo.py and kernels/ppo.py
LOSS_BYTES = {"dpo_loss": (32, 48), "ppo_clip_loss": (17, 25), "clipped_value_loss": (17, 25)}
LOSSES = {
    "dpo_loss": lambda f, *x: f(*x, beta=0.1)[0].sum(),
    "ppo_clip_loss": lambda f, *x: f(*x)[0],
    "clipped_value_loss": lambda f, *x: f(*x)[0],
}


def head_inputs(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Hidden states and an unembedding with logits around 1, as at the start of training; fresh numbers each time."""
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device=device) / math.sqrt(d)).to(dtype).requires_grad_()
    return [hidden, weight, torch.randint(v, (n,), device=device)]


def loss_inputs(name: str, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Four vectors for DPO; for PPO [1, n] new, old (half a unit apart), advantages or returns, and a mask of 70%."""
    if name == "dpo_loss":
        return [torch.randn(n, device=device).to(dtype).requires_grad_(i < 2) for i in range(4)]
    old = torch.randn(1, n, device=device)
    new = (old + 0.5 * torch.randn(1, n, device=device)).to(dtype).requires_grad_()
    return [new, old.to(dtype), torch.randn(1, n, device=device).to(dtype), torch.rand(1, n, device=device) < 0.7]


def with_triton(name: str) -> Callable:
    def run(*arguments, **options):
        with kernels.use("triton"):
            return getattr(kernels, name)(*arguments, **options)

    return run


def head_peers() -> dict[str, Callable]:
    """Other libraries' summed log-probs from (hidden, weight, targets), where they are installed."""
    found = {}

    def offer(name: str, build: Callable[[], Callable]) -> None:
        try:
            found[name] = build()
        except (ImportError, AttributeError) as error:
            print(f"{name}: not measured ({error})")

    def liger():
        loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda h, w, t: -loss(w, h, t)

    def cut_cross_entropy():
        loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda h, w, t: -loss(h, w, t, reduction="none").sum()

    def trl():
        function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        size = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
        return lambda h, w, t: function.apply(h, w, None, t, 1.0, size, None, 1.0, ())[0].sum()

    offer("liger", liger)
    offer("cut-cross-entropy", cut_cross_entropy)
    offer("trl", trl)
    return found


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in inputs if x.requires_grad]))


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst ‖got - want‖ / ‖want‖ among pairs."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def errors(device: str, n: int, d: int, v: int, elements: int) -> list[dict]:
    """Relative errors against float64, values and gradients, of the Triton kernels and of eager PyTorch."""
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cases = {"token_logprobs": (lambda f, *x: f(*x), head_inputs(n, d, v, dtype, device))}
        for name, run in LOSSES.items():
            cases[name] = run, loss_inputs(name, elements, dtype, device)
        for name, (run, inputs) in cases.items():
            exact = [
                x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
            ]
            want = run(getattr(reference, name), *exact)
            slopes = gradients(want.sum(), exact)
            row = {"function": name, "dtype": str(dtype).removeprefix("torch.")}
            for who, f in (("triton", with_triton(name)), ("eager", getattr(reference, name))):
                got = run(f, *inputs)
                row[who] = distance([got], [want])
                row[f"{who} gradient"] = distance(gradients(got.sum(), inputs), slopes)
            rows.append(row)
    return rows


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds (the cache is emptied before each run) and peak MiB beyond what was there before."""
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    return do_bench(call, warmup=25, rep=200, return_mode="median"), memory


def limits() -> dict[str, float]:
    """What this card does: TFLOP/s of a large matmul in each precision, GB/s of a large copy (read + written)."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / measure(lambda a=a, b=b: a @ b)[0] / 1e9
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = 2 * 4 * 2**29 / measure(lambda: target.copy_(source))[0] / 1e6
    return found


def timings(limit: dict[str, float]) -> list[dict]:
    rows = []

    def time(row: dict, ways: dict[str, Callable[[], Tensor]], inputs: list[Tensor], work: tuple, ceiling: float):
        for who, forward in ways.items():
            for what, amount, call in (
                ("forward", work[0], forward),
                ("forward+backward", work[1], lambda forward=forward: gradients(forward(), inputs)),
            ):
                new = row | {"who": who, "pass": what}
                try:
                    with torch.set_grad_enabled(what != "forward"):
                        ms, memory = measure(call)
                except torch.OutOfMemoryError:
                    new["failed"] = "out of memory"
                except Exception as error:  # another library's failure at one shape must not end the run
                    if who == "triton":
                        raise
                    new["failed"] = f"{type(error).__name__}: {str(error)[:80]}"
                else:
                    new |= {"ms": ms, "MiB": memory, "rate": amount / ms / 1e9, "share": amount / ms / 1e9 / ceiling}
                rows.append(new)
                torch.cuda.empty_cache()

    peers = head_peers()
    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        for d, v in HEADS:
            for n in TOKENS:
                torch._dynamo.reset()
                h, w, t = inputs = head_inputs(n, d, v, dtype, "cuda")
                own = {
                    "triton": with_triton("token_logprobs"),
                    "eager": reference.token_logprobs,
                    "compile": torch.compile(reference.token_logprobs, dynamic=False),
                }
                ways = {who: lambda f=f, h=h, w=w, t=t: f(h, w, t).sum() for who, f in own.items()}
                ways |= {who: lambda f=f, h=h, w=w, t=t: f(h, w, t) for who, f in peers.items()}
                row = {"function": "token_logprobs", "dtype": short, "shape": f"N={n} D={d} V={v}", "unit": "TFLOP/s"}
                time(row, ways, inputs, (2 * n * d * v, 6 * n * d * v), limit[short])
                print(table(rows[-2 * len(ways) :]), flush=True)
    for name, run in LOSSES.items():
        for n in ELEMENTS:
            torch._dynamo.reset()
            inputs = loss_inputs(name, n, torch.float32, "cuda")
            own = {
                "triton": with_triton(name),
                "eager": getattr(reference, name),
                "compile": torch.compile(getattr(reference, name), dynamic=False),
            }
            ways = {who: lambda f=f, run=run, inputs=inputs: run(f, *inputs) for who, f in own.items()}
            row = {"function": name, "dtype": "float32", "shape": f"{n} elements", "unit": "TB/s"}
            time(row, ways, inputs, tuple(n * b for b in LOSS_BYTES[name]), limit["copy"] / 1e3)
            print(table(rows[-2 * len(ways) :]), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Timings as text."""
    lines = []
    for row in rows:
        start = f"{row['function']:19}{row['dtype']:9}{row['shape']:24}{row['who']:18}{row['pass']:17}"
        if "failed" in row:
            lines.append(f"{start} {row['failed']}")
        else:
            end = f"{row['rate']:8.1f} {row['unit']:8}{row['share']:5.0%} of the limit"
            lines.append(f"{start}{row['ms']:9.3f} ms{row['MiB']:9.0f} MiB{end}")
    return "\n".join(lines)


def error_table(rows: list[dict]) -> str:
    lines = [f"{'relative error against float64':30}{'triton':>10}{'eager':>10}{'gradients: triton':>20}{'eager':>10}"]
    for row in rows:
        values = f"{row['triton']:10.1e}{row['eager']:10.1e}{row['triton gradient']:20.1e}{row['eager gradient']:10.1e}"
        lines.append(f"{row['function']:20}{row['dtype']:10}{values}")
    return "\n".join(lines)


def picture(results: dict, path: Path) -> None:
    """Forward + backward of each function: time against size, one line a way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["timings"] if row["pass"] == "forward+backward" and "ms" in row]
    panels = [("token_logprobs", f" D={d} V={v}") for d, v in HEADS] + [(name, " elements") for name in LOSSES]
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), constrained_layout=True)
    for axis, (function, end) in zip(axes.flat, panels, strict=False):
        chosen = [row for row in rows if row["function"] == function and row["shape"].endswith(end)]
        chosen = [row for row in chosen if row["dtype"] == "bfloat16" or function != "token_logprobs"]
        for who in dict.fromkeys(row["who"] for row in chosen):
            line = [row for row in chosen if row["who"] == who]
            sizes = [int(row["shape"].removeprefix("N=").split()[0]) for row in line]
            axis.loglog(sizes, [row["ms"] for row in line], "o-", label=who)
        axis.set(
            title=f"{function}{end if 'D=' in end else ''}", xlabel="tokens or pairs", ylabel="ms, forward + backward"
        )
    axes.flat[0].legend()
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.suptitle(results["gpu"])
    figure.savefig(path, dpi=110)


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
        print("kernels.bench: there is no GPU here, so nothing is timed.")
        return
    if torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("kernels.bench: the candidates are counted for Hopper")
    gpu = torch.cuda.get_device_name()
    results = {"gpu": gpu, "torch": torch.__version__, "triton": kernels.triton.__version__, "limits": limits()}
    results |= {"compiled": rows, "timings": []}
    print(gpu, {key: round(value) for key, value in results["limits"].items()}, "TFLOP/s, TFLOP/s, GB/s", flush=True)
    path = result_path(gpu + "-sweep")
    for d, v in SWEEP:
        results["timings"] += timed_candidates(rows, 8192, d, v, "cuda", results["limits"]["bfloat16"])
        path.write_text(json.dumps(results, indent=1))
    print(f"{path} after {time.time() - start:.0f} s")


def result_path(name: str) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{name.replace(' ', '-').replace('/', '-')}.json"


def without_gpu() -> None:
    """Errors in the interpreter, and one GPU's static table; each in a process of its own, as Triton's mode asks."""
    print("kernels.bench: there is no GPU here, so nothing is timed.\n", flush=True)
    for arguments, interpret in (
        (["kernels.bench", "--errors"], "1"),
        (["kernels.inspect", "--targets", "sm_90", "--calls", "^bfloat16( sigmoid| policy| value)?$"], "0"),
    ):
        environment = os.environ | {"TRITON_INTERPRET": interpret}
        subprocess.run([sys.executable, "-W", "ignore", "-m", *arguments], env=environment, check=True)
        print(flush=True)
    print("The interpreter truncates to bfloat16 where a GPU rounds. Every configuration: python -m kernels.inspect")


def main() -> None:
    parser = argparse.ArgumentParser(description="Each kernel against plain PyTorch: error, time, memory.")
    parser.add_argument("--errors", action="store_true", help="only the table of errors")
    parser.add_argument("--sweep", action="store_true", help="other tilings of the log-probs' products")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.sweep:
        sweep()
        return
    if arguments.errors:
        device = "cpu" if kernels.INTERPRETED else "cuda"
        print(error_table(errors(device, n=96, d=128, v=1500, elements=3000)))
        return
    if not torch.cuda.is_available():
        without_gpu()
        return
    gpu = torch.cuda.get_device_name()
    results = {"gpu": gpu, "torch": torch.__version__, "triton": kernels.triton.__version__, "limits": limits()}
    print(gpu, {key: round(value) for key, value in results["limits"].items()}, "TFLOP/s, TFLOP/s, GB/s", flush=True)
    results["errors"] = [
        row | {"shape": f"N=256 D={d} V={v}, {2**20} elements"}
        for d, v in HEADS
        for row in errors("cuda", n=256, d=d, v=v, elements=2**20)
    ]
    print(error_table(results["errors"]), flush=True)
    results["timings"] = timings(results["limits"])
    path = result_path(gpu)
    path.write_text(json.dumps(results, indent=1))
    picture(results, path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
