"""Each kernel against plain PyTorch: error, time, memory, and how far from what the same card can do.

    python -m kernels.bench

With a GPU: every shape of the grid below, forward and forward + backward, for the Triton kernels, eager PyTorch,
`torch.compile` of the same and other libraries' kernels where they are installed. The limits are measured by the
same run: a large matmul, a large copy. Results go to kernels/results/<gpu>.json and .png. Without one: the errors, in
Triton's interpreter, and what the kernels compile to for an H100. Nothing is timed there.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import reference

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


def usual_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As PyTorch users write it, logits rounded to the inputs' dtype; the reference, in float32, is slow beside it."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


EAGER = {"token_logprobs": usual_logprobs} | {name: getattr(reference, name) for name in LOSSES}


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
    torch.manual_seed(0)  # a mean that is near 0 by chance would make a small error look large
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
            for who, f in (("triton", with_triton(name)), ("eager", EAGER[name])):
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
                    "eager": usual_logprobs,
                    "compile": torch.compile(usual_logprobs, dynamic=False),
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
                "eager": EAGER[name],
                "compile": torch.compile(EAGER[name], dynamic=False),
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
    torch.manual_seed(0)
    if parser.parse_args().errors:
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
