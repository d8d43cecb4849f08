"""The public functions: which implementation runs, what torch.library promises, what is refused."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch

import kernels
from kernels import dpo, logprob, ppo, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = ["token_logprobs", "entropy", "sequence_logprobs", "dpo_loss", "ppo_clip_loss", "clipped_value_loss"]


def call(name, dtype=torch.float32):
    """A function of one output, and small arguments of which the first (and weight) take a gradient."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape, grad=False):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype).requires_grad_(grad)

    targets = torch.tensor([[1, 3, -100], [0, 2, 4]], device=DEVICE)
    mask = torch.tensor([[True, True, False], [False, True, True]], device=DEVICE)
    if name in ("token_logprobs", "entropy"):
        entropy = name == "entropy"
        return (
            lambda h, w, t: torch.stack(kernels.token_logprobs(h, w, t, entropy=True))[int(entropy)],
            (randn(6, 8, grad=True), randn(5, 8, grad=True), targets.flatten()),
        )
    if name == "sequence_logprobs":
        return kernels.sequence_logprobs, (randn(2, 3, 8, grad=True), randn(5, 8, grad=True), targets, mask)
    if name == "dpo_loss":
        return lambda *x: kernels.dpo_loss(*x, beta=0.1)[0], (randn(4, grad=True), *(randn(4) for _ in range(3)))
    function = getattr(kernels, name)
    return lambda *x: function(*x)[0], (randn(2, 3, grad=True), randn(2, 3), randn(2, 3), mask)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_and_torch_agree(name):
    results = []
    for backend in ("torch", "triton"):
        f, x = call(name)
        with kernels.use(backend):
            y = f(*x)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in x if t.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "of"), [("dpo_loss", 2), ("ppo_clip_loss", 1), ("clipped_value_loss", 1)])
def test_only_the_policy_or_the_values_take_a_gradient(backend, name, of):
    """Not π_ref, π_old, advantages or returns; and neither implicit rewards nor statistics carry one."""
    _, x = call(name)
    x = [t.detach().requires_grad_(t.is_floating_point()) for t in x]
    loss, *rest = getattr(kernels, name)(*x, **({"beta": 0.1} if name == "dpo_loss" else {}))
    loss.sum().backward()
    assert all((t.grad is not None) == (i < of) for i, t in enumerate(x))
    assert not any(t.requires_grad for t in (rest if name == "dpo_loss" else rest[0].values()))


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_waits_for_the_gpu(name):
    f, x = call(name)
    with kernels.use("triton"):
        f(*x).sum().backward()  # what is compiled at the first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            f(*x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_whole(name):
    f, x = call(name)
    with kernels.use("triton"):
        want = f(*x)
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(*x)
    assert torch.equal(got, want)
    (wanted,) = torch.autograd.grad(want.sum(), x[0])
    assert torch.equal(torch.autograd.grad(got.sum(), x[0])[0], wanted)


@pytest.mark.parametrize("frozen", [0, 1])
def test_compiles_whole_with_a_frozen_input(frozen):
    f, x = call("token_logprobs")
    x[frozen].requires_grad_(False)
    with kernels.use("triton"):
        want, got = f(*x), torch.compile(f, fullgraph=True, backend="aot_eager")(*x)
    assert torch.equal(got, want)
    (wanted,) = torch.autograd.grad(want.square().sum(), x[1 - frozen])
    assert torch.equal(torch.autograd.grad(got.square().sum(), x[1 - frozen])[0], wanted)


def test_the_backend_may_be_chosen_inside_a_compiled_function():
    f, x = call("dpo_loss")

    def chosen(*x):
        with kernels.use("triton"):
            return f(*x)

    torch.testing.assert_close(torch.compile(chosen, fullgraph=True, backend="aot_eager")(*x), f(*x))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_function_follows_the_backend(compiler):
    """Also into other threads: it is compiled anew, and what was compiled for a backend is found again."""
    torch._dynamo.reset()
    f, x = call("dpo_loss")
    compiled = torch.compile(f, fullgraph=True, backend=compiler)

    def runs() -> str:
        return "triton" if uses_triton(lambda: compiled(*x)) else "torch"

    assert runs() == "torch"
    with kernels.use("triton"):
        assert runs() == "triton"
        with kernels.use("torch"):
            assert runs() == "torch"
            assert in_a_thread(runs) == "torch"
        assert runs() == "triton"
    assert runs() == in_a_thread(runs) == "torch"


def uses_triton(compute) -> bool:
    with torch.profiler.profile() as profile:
        compute()
    return any(event.name.startswith("kernels::") for event in profile.events())


def in_a_thread(compute):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def test_the_backend_is_the_threads_own():
    """Two that choose at once do not meet, whichever ends first; one that has not chosen sees the main thread's."""
    f, x = call("dpo_loss")
    chosen, both, left = Event(), Event(), Event()

    def first():
        with kernels.use("triton"):
            chosen.set()
            assert both.wait(60)
            found = uses_triton(lambda: f(*x))
        left.set()
        return found

    def second():
        assert chosen.wait(60)
        with kernels.use("torch"):
            both.set()
            assert left.wait(60)
            return uses_triton(lambda: f(*x))

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(first), pool.submit(second)]
        assert [result.result() for result in results] == [True, False]
    with kernels.use("triton"):
        assert in_a_thread(lambda: uses_triton(lambda: f(*x)))
        with kernels.use("torch"):
            assert not in_a_thread(lambda: uses_triton(lambda: f(*x)))


def test_opcheck():
    h, w, targets = torch.randn(2, 3, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE), torch.ones(2, 3).long()
    targets = targets.to(DEVICE)
    x = [torch.randn(4, device=DEVICE) for _ in range(4)]
    m = [torch.randn(2, 3, device=DEVICE) for _ in range(3)]
    mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    out = logprob.token_logprobs(h, w, targets, 1.0)
    *_, share, factors = ppo.clipped_loss(*m, mask, 0.2, True)
    cases = [
        (logprob.token_logprobs, (h.clone().requires_grad_(), w.clone().requires_grad_(), targets, 0.9)),
        (logprob.token_logprobs_backward, (out[0], out[1], h, w, targets, *out, 0.9, True, True)),
        (logprob.token_logprobs, (h.clone().requires_grad_(), w, targets, 0.9)),
        (logprob.token_logprobs, (h, w.clone().requires_grad_(), targets, 0.9)),
        (logprob.token_logprobs_backward, (out[0], out[1], h, w, targets, *out, 0.9, True, False)),
        (logprob.token_logprobs_backward, (out[0], out[1], h, w, targets, *out, 0.9, False, True)),
        (dpo.dpo_loss, (x[0].clone().requires_grad_(), x[1].clone().requires_grad_(), *x[2:], 0.1, 0.0, "sigmoid")),
        (dpo.dpo_loss_backward, (x[0], x[1], torch.float32, torch.float16)),
        (ppo.clipped_loss, (m[0].clone().requires_grad_(), *m[1:], mask, 0.2, True)),
        (ppo.clipped_loss_backward, (share, factors, share, torch.bfloat16)),
    ]
    for op, arguments in cases:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused(name):
    f, x = call(name)
    with kernels.use("triton"):
        (grad,) = torch.autograd.grad(f(*x).square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; use kernels.use\('torch'\)"):
        grad.sum().backward()


@pytest.fixture
def around_minus_80():
    """hidden [20, 64], weight [50, 64] and targets whose logits lie around -80, where bfloat16 has steps of ½."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = 1 + 0.1 * torch.randn(20, 64, generator=g), -80 / 64 + 0.1 * torch.randn(50, 64, generator=g)
    assert -90 < (hidden @ weight.t()).max() < -70
    targets = torch.randint(50, (20,), generator=g)
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), targets.to(DEVICE)


@pytest.mark.parametrize("who", ["reference", "torch", "triton"])
def test_autocast_rounds_factors_and_not_logits(who, around_minus_80):
    hidden, weight, targets = around_minus_80
    with kernels.use("auto" if who == "reference" else who), torch.autocast(DEVICE, torch.bfloat16):
        got = (reference if who == "reference" else kernels).token_logprobs(hidden, weight, targets, entropy=True)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    want = reference.token_logprobs(*exact, targets, entropy=True)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 1e-4
    (got[0] - got[1]).sum().backward()
    (want[0] - want[1]).sum().backward()
    for a, b in zip((hidden, weight), exact, strict=True):
        assert a.grad.dtype == torch.float32 and (a.grad - b.grad).abs().max() <= 2**-5 * b.grad.abs().max()


def test_under_autocast_triton_and_torch_agree(around_minus_80):
    hidden, weight, targets = around_minus_80
    tokens, mask = targets.view(4, 5), (targets % 3 > 0).view(4, 5)
    results = []
    for backend in ("torch", "triton"):
        with kernels.use(backend), torch.autocast(DEVICE, torch.bfloat16):
            logprobs = kernels.token_logprobs(hidden, weight, targets)
            results.append((logprobs, kernels.sequence_logprobs(hidden.view(4, 5, 64), weight, tokens, mask)))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-4


def test_autocast_casts_hidden_and_weight():
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(6, 8, generator=g).to(DEVICE), torch.randn(5, 8, generator=g).to(DEVICE)
    h.requires_grad_(), w.requires_grad_()
    targets = torch.arange(6, device=DEVICE) % 5
    with kernels.use("triton"):
        with torch.autocast(DEVICE, torch.bfloat16):
            got = kernels.token_logprobs(h, w, targets)
            assert torch.equal(kernels.token_logprobs(h, w.bfloat16(), targets), got)
        want = kernels.token_logprobs(h.bfloat16(), w.bfloat16(), targets)
    assert torch.equal(got, want)
    got.sum().backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32


def test_auto_is_torch_on_the_cpu_and_on_float64():
    f, x = call("dpo_loss", torch.float64)
    assert f(*x).dtype == torch.float64
    name = (kernels.dpo_loss(*(t.float().cpu() for t in x), beta=0.1)[0]).grad_fn.name()
    assert "kernels" not in name
    with kernels.use("triton"):
        f32, x32 = call("dpo_loss")
        assert "kernels" in f32(*x32).grad_fn.name()
        with kernels.use("torch"):
            assert "kernels" not in f32(*x32).grad_fn.name()


def test_triton_without_a_gpu_or_the_interpreter_is_a_clear_error():
    code = "import kernels\nwith kernels.use('triton'): pass"
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode and "asked for Triton, but there is no GPU" in done.stderr


H, W, T = torch.zeros(6, 8), torch.zeros(5, 8), torch.zeros(6, dtype=torch.int64)
B, M = torch.zeros(4), torch.zeros(2, 3)
REFUSED = {
    "backend": (lambda: kernels.use("cuda").__enter__(), "no backend 'cuda'"),
    "float64 in Triton": (lambda: kernels.token_logprobs(H.double(), W.double(), T), "no float64 kernels"),
    "widths": (lambda: kernels.token_logprobs(H, W[:, :7], T), "needs hidden"),
    "lengths": (lambda: kernels.token_logprobs(H, W, T[:5]), "needs hidden"),
    "dimensions": (lambda: kernels.sequence_logprobs(H, W, T, T), "needs hidden"),
    "dtypes": (lambda: kernels.token_logprobs(H, W.half(), T), "share a floating dtype"),
    "whole numbers": (lambda: kernels.token_logprobs(H.int(), W.int(), T), "share a floating dtype"),
    "targets' dtype": (lambda: kernels.token_logprobs(H, W, T.int()), "targets must be int64"),
    "devices": (lambda: kernels.token_logprobs(H, W, T.to("meta")), "one device"),
    "target too large": (lambda: kernels.token_logprobs(H, W, T + 5), r"target 5 is not in \[0, 5\)"),
    "target negative": (lambda: kernels.token_logprobs(H, W, T - 1), "target -1 is not"),
    "temperature": (lambda: kernels.token_logprobs(H, W, T, temperature=0.0), "temperature must be above 0"),
    "mask": (lambda: kernels.sequence_logprobs(H[None], W, T[None], T), "mask .* must have the shape"),
    "pairs": (lambda: kernels.dpo_loss(B, B, B, B[:3], beta=1.0), "share a shape"),
    "pairs' dtype": (lambda: kernels.dpo_loss(B, B, B, B.int(), beta=1.0), "must be floating"),
    "beta": (lambda: kernels.dpo_loss(B, B, B, B, beta=0.0), "beta must be above 0"),
    "smoothing": (lambda: kernels.dpo_loss(B, B, B, B, beta=1.0, label_smoothing=0.5), "below 0.5"),
    "smoothing of ipo": (lambda: kernels.dpo_loss(B, B, B, B, beta=1.0, label_smoothing=0.1, loss="ipo"), "belongs to"),
    "loss": (lambda: kernels.dpo_loss(B, B, B, B, beta=1.0, loss="kto"), "must be one of sigmoid, "),
    "tokens": (lambda: kernels.ppo_clip_loss(M, M, M, M[:1]), "share a shape"),
    "tokens' dimensions": (lambda: kernels.clipped_value_loss(B, B, B, B), "share a shape"),
    "clip": (lambda: kernels.ppo_clip_loss(M, M, M, M, clip=0.0), "clip must be above 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    attempt, reason = REFUSED[what]
    with kernels.use("triton") if kernels.INTERPRETED else kernels.use("auto"):
        with pytest.raises((ValueError, RuntimeError), match=reason):
            attempt()


def test_references_are_the_only_definition():
    """Every public function has a reference of the same name and parameters."""
    import inspect

    for name in ("token_logprobs", "sequence_logprobs", "dpo_loss", "ppo_clip_loss", "clipped_value_loss"):
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (kernels, reference))
        assert ours.parameters == theirs.parameters
