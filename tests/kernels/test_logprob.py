"""The Triton log-probs against float64, forward and backward, within bounds derived from the arithmetic they do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

import kernels
from kernels import logprob, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
U = 2.0**-24  # float32: half a unit in the last place of 1
# the interpreter truncates to bfloat16 where a GPU rounds to nearest: a whole unit in place of half a one
ROUND = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if kernels.INTERPRETED else 2.0**-8}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}  # below it lies 0


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory layout."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    if layout == "aligned slice":
        wide = torch.full((x.shape[0], (x.shape[1] // 128 + 1) * 128), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]
    return x


def problem(n, v, d, dtype, *, magnitude=1.0, ignored=0.3, layout="contiguous", seed=0):
    """hidden and weight whose logits are around `magnitude`; targets of which a share is ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g) * (magnitude / d) ** 0.5
    weight = torch.randn(v, d, generator=g) * magnitude**0.5
    targets = torch.randint(v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    return laid_out(hidden, layout), laid_out(weight, layout), targets.to(DEVICE)


def tile(monkeypatch, **changes):
    """All four products tiled otherwise."""
    usual = logprob.tilings
    monkeypatch.setattr(logprob, "tilings", lambda *of: {name: t | changes for name, t in usual(*of).items()})


def check(hidden, weight, targets, temperature=1.0, seed=0):
    """Values and gradients of both outputs against float64, element by element; returns them as computed."""
    g = torch.Generator().manual_seed(seed + 1)
    up, up_entropy = (torch.randn(len(targets), generator=g).to(DEVICE) for _ in range(2))
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with kernels.use("triton"):
        logp, entropy = kernels.token_logprobs(h, w, targets, temperature=temperature, entropy=True)
    (logp * up + entropy * up_entropy).sum().backward()

    H, W = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want_logp, want_entropy = reference.token_logprobs(H, W, targets, temperature=temperature, entropy=True)
    (want_logp * up + want_entropy * up_entropy).sum().backward()
    assert logp.dtype == entropy.dtype == torch.float32 and h.grad.dtype == w.grad.dtype == hidden.dtype
    if not len(targets):
        assert not w.grad.any()
        return logp, entropy, h.grad, w.grad

    with torch.no_grad():
        v, d = weight.shape
        counts = (targets != -100).double()
        # a logit is a sum of d products: Higham 2002, eq. 3.5; scaling and exponent add a few roundings of its size
        size = (H.abs() @ W.abs().t()).amax(1) / temperature
        logit = (d + 8) * U * size
        # the log-prob is the difference of two such logits, and sums over V entries
        bound = counts * (2 * logit + 8 * U * (want_logp.abs() + math.log(v) + 4))
        assert ((logp - want_logp).abs() <= bound).all()
        # dH = -Σ p (log p + H) dz, and Σ p |log p + H| <= 2H <= 2 log V
        bound_entropy = counts * (2 * logit * (2 * math.log(v) + 1) + 16 * U * (math.log(v) + 1))
        assert ((entropy - want_entropy).abs() <= bound_entropy).all()

        # a slope ∂/∂z is wrong by its own rounding to 16 bits, by p's relative error (that of the log-prob), and by the
        # errors of log p and H; the products sum V (or N) of them in float32, and the result is rounded once more
        log_p = (H @ W.t() / temperature).log_softmax(1)
        p = log_p.exp()
        gain = counts[:, None] * (up[:, None].abs() + up_entropy[:, None].abs() * (log_p + want_entropy[:, None]).abs())
        hit = torch.zeros_like(p).scatter_(1, targets.clamp(min=0)[:, None], (counts * up.abs())[:, None])
        relative = ROUND[hidden.dtype] + bound[:, None] + (v + len(targets) + 16) * U
        slope = relative * (hit + p * gain) + 2.0**-126 * gain  # where a smaller p is 0
        slope += p * (counts * up_entropy.abs() * (bound + bound_entropy))[:, None]
        # float16 slopes are scaled so that the largest possible is near 2^13: what rounds to 0 is below 2^-24 of that
        slope += SMALLEST[hidden.dtype] * 2.0**-12 * (up.abs().max() + 22 * up_entropy.abs().max()) * counts[:, None]
        for got, want, allowed in (
            (h.grad, H.grad, slope @ W.abs() / temperature),
            (w.grad, W.grad, slope.t() @ H.abs() / temperature),
        ):
            allowed += ROUND[hidden.dtype] * want.abs() + SMALLEST[hidden.dtype]
            assert ((got - want).abs() <= allowed).all()
    return logp, entropy, h.grad, w.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=10)
@given(
    n=st.integers(0, 80),
    v=st.integers(1, 200),
    d=st.sampled_from([1, 7, 33, 64, 128, 129, 256]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    magnitude=st.sampled_from([0.01, 1.0, 20.0]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "aligned slice"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(dtype, n, v, d, temperature, magnitude, ignored, layout, seed):
    check(*problem(n, v, d, dtype, magnitude=magnitude, ignored=ignored, layout=layout, seed=seed), temperature, seed)


def test_a_width_that_is_no_multiple_of_a_tile_in_rows_that_are():
    check(*problem(5, 40, 129, torch.float32, layout="aligned slice"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vocabulary_of_several_spans_and_no_multiple_of_a_block(dtype):
    check(*problem(130, 2 * 1024 + 77, 128, dtype))


def test_logits_of_ten_thousand():
    hidden, weight, targets = problem(40, 200, 128, torch.float32, magnitude=1e4)
    assert (hidden @ weight.t()).abs().max() > 1e4
    for x in check(hidden, weight, targets):
        assert x.isfinite().all()


def test_log_probs_are_never_positive():
    hidden, weight, _ = problem(64, 200, 128, torch.float32, magnitude=1e3, ignored=0)
    targets = (hidden @ weight.t()).argmax(1)
    with kernels.use("triton"):
        assert (kernels.token_logprobs(hidden, weight, targets) <= 0).all()


def test_no_tokens():
    check(*problem(0, 50, 16, torch.float32))


@pytest.mark.parametrize("v, d", [(0, 8), (5, 0), (0, 0)])
def test_no_vocabulary_or_no_width(backend, v, d):
    """Where no token counts there is nothing to look up; where one does, it is no entry of an empty vocabulary."""
    hidden, weight = (torch.ones(n, d, device=DEVICE, requires_grad=True) for n in (3, v))
    targets, mask = torch.full((3,), -100, device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    found = [*kernels.token_logprobs(hidden, weight, targets, entropy=True)]
    found.append(kernels.sequence_logprobs(hidden[None], weight, targets[None] + 7, mask))
    torch.cat(found).sum().backward()
    assert not torch.cat(found).any() and not hidden.grad.any() and not weight.grad.any()
    if v:
        uniform = kernels.token_logprobs(hidden, weight, targets * 0)
        torch.testing.assert_close(uniform, torch.full_like(uniform, -math.log(v)))
    elif DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"target 0 is not in \[0, 0\)"):
            kernels.token_logprobs(hidden, weight, targets * 0)


def test_slopes_at_both_ends_of_the_range_of_float16():
    """g = 1e-5 times p = 1e-3 rounds to 0 in float16, but 512 such slopes times a hidden 8 do not add up to 0."""
    hidden = torch.full((512, 128), 8.0, device=DEVICE, dtype=torch.float16)
    weight = problem(0, 1000, 128, torch.float16, magnitude=1e-4)[1].requires_grad_()
    with kernels.use("triton"):
        logp = kernels.token_logprobs(hidden, weight, torch.zeros(512, device=DEVICE, dtype=torch.int64))
    (logp.sum() * 1e-5).backward()
    p = (hidden[:1].double() @ weight.double().t()).softmax(1)[0]
    p[0] -= 1  # the target, whose slope is the largest there can be and must not overflow
    want = -1e-5 * 512 * 8 * p[:, None]
    assert ((weight.grad - want).abs() <= 2.0**-9 * want.abs() + 2.0**-24).all()


def small_budgets(monkeypatch, together, size, d):
    """So small that 580 tokens and 530 entries make every loop over bands, blocks and groups run more than once."""
    monkeypatch.setattr(logprob, "SPAN_BYTES", 12 * 2 * 256)
    monkeypatch.setattr(logprob, "BAND", 256)
    monkeypatch.setattr(logprob, "BLOCK_BYTES", 512 * size * 256)
    monkeypatch.setattr(logprob, "HIDDEN_BYTES", (768 if together else 512) * 4 * d)
    monkeypatch.setattr(logprob, "WEIGHT_BYTES", 256 * 4 * d)
    assert logprob.plan(580, 530, d, size) == ((256, 256, 768, 256) if together else (256, 512, 512, 0))


@pytest.mark.parametrize("together", [True, False])
def test_bands_and_blocks_of_rows_and_columns(monkeypatch, together):
    small_budgets(monkeypatch, together, 4, 64)
    check(*problem(580, 530, 64, torch.float32))
    check(*problem(580, 530, 64, torch.float32, ignored=0.7))  # the last bands then hold no token that counts


TILINGS = {  # with the width, whose tiles of 256 columns need a mask but for 256, and how often blocks are visited
    "128x256": ({"ROWS": 128, "COLUMNS": 256, "STEP": 32, "num_warps": 8}, 128, True),
    "256x128": ({"ROWS": 256, "COLUMNS": 128, "STEP": 32, "num_warps": 8, "GROUP": 2}, 33, True),
    "64x256": ({"ROWS": 64, "COLUMNS": 256, "STEP": 64, "num_warps": 4, "SPAN": 256}, 256, False),
}


@pytest.mark.parametrize("name", TILINGS)
def test_other_tilings(monkeypatch, name):
    changes, d, together = TILINGS[name]
    small_budgets(monkeypatch, together, 2, d)
    tile(monkeypatch, **changes)
    check(*problem(580, 531, d, torch.bfloat16))
    check(*problem(3, 65, d, torch.float16))


def test_any_tiling_fits_the_buffers_and_the_steps_over_slopes():
    for of in (0, 7, 8, 9, 10, 12):
        for wide in (True, False):
            for even in (True, False):
                found = logprob.tilings(of, wide, even)
                assert list(found) == ["forward", "slopes", "hidden", "weight"]
                for tiling in found.values():
                    assert logprob.WHOLE % tiling["ROWS"] == logprob.WHOLE % tiling["COLUMNS"] == 0
                    assert tiling["SPAN"] % tiling["COLUMNS"] == 0
                assert found["slopes"]["COLUMNS"] % found["hidden"]["STEP"] == 0
                assert found["slopes"]["ROWS"] % found["weight"]["STEP"] == 0


def test_memory_is_bounded_whatever_the_size():
    """The sizes of every buffer, from the same arithmetic, at sizes no test could run."""
    for d in (768, 1024, 2048, 3072, 4096, 8192):
        for size in (2, 4):
            for n in (1, 4096, 8193, 16384, 32768, 2**20, 2**31):
                for v in (100, 50257, 128256, 2**20):
                    band, width, group, extra = logprob.plan(n, v, d, size)
                    assert size * band * width + 4 * d * (group + extra) <= logprob.LIMIT
                    assert band % logprob.WHOLE == width % logprob.WHOLE == group % band == 0
                    bands = 1 if band >= n else 2
                    assert bands == 1 or (extra or group) >= width  # the sums hold a block's columns


def test_more_row_tiles_than_share_their_columns(monkeypatch):
    tile(monkeypatch, GROUP=3)
    check(*problem(64 * 8 - 20, 130, 16, torch.float32, ignored=0.01))


def test_offsets_beyond_two_to_the_thirty_one():
    """Rows 2^31 elements apart: the storage is reserved, not filled, and only the rows' own pages are touched."""
    far = torch.empty(2**31 + 2**10, dtype=torch.float16, device=DEVICE)
    near, weight, targets = problem(2, 20, 64, torch.float16, ignored=0)
    hidden = far.as_strided((2, 64), (2**31, 1))
    hidden.copy_(near)
    with kernels.use("triton"):
        got, want = (kernels.token_logprobs(x, weight, targets) for x in (hidden, near))
        assert torch.equal(got, want)
        weight_far = far.as_strided((2, 64), (2**31, 1))
        got, want = (kernels.token_logprobs(near, x, targets.clamp(max=1)) for x in (weight_far, near.clone()))
        assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE == "cpu", reason="two billion logits need a GPU")
def test_more_logits_than_two_to_the_thirty_one():
    """Each row stands alone, so the last ones, beyond 2^31 logits, can be checked by themselves."""
    few = 100
    hidden, weight, targets = problem(33_000, 65_600, 64, torch.float16)
    with kernels.use("triton"):
        got = kernels.token_logprobs(hidden.requires_grad_(), weight, targets)
        got.sum().backward()
    last = hidden[-few:].detach().double().requires_grad_()
    want = reference.token_logprobs(last, weight.double(), targets[-few:])
    want.sum().backward()
    torch.testing.assert_close(got[-few:].double(), want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(hidden.grad[-few:].double(), last.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, *(changes for changes, d, _ in TILINGS.values() if d == 128)])
def test_the_same_bits_every_run(parallel, monkeypatch, changes):
    small_budgets(monkeypatch, True, 2, 128)
    tile(monkeypatch, **changes)
    runs = [check(*problem(580, 531, 128, torch.bfloat16)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences(dtype):
    """Sums over the mask, of a slice of a batch (nothing is contiguous), with a row without any response token."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 24, 32, generator=g).to(DEVICE, dtype)[:, :-1]
    weight = torch.randn(70, 32, generator=g).to(DEVICE, dtype)
    targets = torch.randint(70, (3, 24), generator=g).to(DEVICE)[:, 1:]
    mask = (torch.rand(3, 23, generator=g) < 0.5).to(DEVICE)
    mask[1] = False
    targets = targets.masked_fill(~mask, 12345)  # what the mask leaves out may hold anything
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    H, W = hidden.double().requires_grad_(), weight.double().requires_grad_()
    with kernels.use("triton"):
        got = kernels.sequence_logprobs(h, w, targets, mask, temperature=0.8)
        assert torch.equal(kernels.sequence_logprobs(hidden, w, targets, mask, temperature=0.8), got)
    want = reference.sequence_logprobs(H, W, targets, mask, temperature=0.8)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert got[1] == 0
    got.square().sum().backward()
    want.square().sum().backward()
    for a, b in ((h.grad, H.grad), (w.grad, W.grad)):
        assert (a - b).abs().max() <= (4 * ROUND[dtype] + 4e-6) * b.abs().max()
    assert not h.grad[1].any()


@pytest.fixture
def products(monkeypatch):
    """A list that grows by one with every product of tiles, which only the interpreter shows."""
    if not kernels.INTERPRETED:
        pytest.skip("counts calls, which only the interpreter shows")
    calls, builder = [], interpreter.InterpreterBuilder
    dot = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *a, **k: (calls.append(1), dot(*a, **k))[1])
    return calls


def test_masked_tokens_cost_no_arithmetic(products):
    """With one response token in 40 rows of 64, only one row of tiles is multiplied."""
    hidden, weight, targets = torch.randn(40, 64, 16), torch.randn(60, 16), torch.zeros(40, 64, dtype=torch.int64)
    hidden.requires_grad_(), weight.requires_grad_()
    mask = torch.zeros(40, 64)
    mask[17, 3] = 1
    with kernels.use("triton"):
        logprobs = kernels.sequence_logprobs(hidden, weight, targets, mask)
    assert len(products) == 1
    logprobs.sum().backward()
    # the logits again, then 60 entries in steps of 16 for the token's gradient, one step of tokens for the weight's
    assert len(products) == 1 + 1 + 4 + 1


@pytest.mark.parametrize("together", [True, False])
def test_a_frozen_input_costs_no_arithmetic(monkeypatch, products, together):
    """The other's gradient is the same to the bit, and as many products fewer as the frozen one's gradient takes."""
    if not together:
        monkeypatch.setattr(logprob, "HIDDEN_BYTES", 256 * 4 * 128)
    hidden, weight, targets = problem(300, 100, 128, torch.float32, ignored=0)
    assert (logprob.plan(300, 100, 128, 4)[2] >= 300) == together
    counts, grads = {}, {}
    for wanted in ((True, True), (True, False), (False, True)):
        inputs = [x.detach().requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=True)]
        with kernels.use("triton"):
            logp, entropy = kernels.token_logprobs(*inputs, targets, entropy=True)
        products.clear()
        (logp.sum() + entropy.square().sum()).backward()
        counts[wanted], grads[wanted] = len(products), [x.grad for x in inputs]
    # tiles of 64 in steps of 32: 5 rows of them times 2 columns, 300 rows (or 256 and 44), 100 entries, a width of 128
    logits, of_hidden, of_weight = 5 * 2 * 4, 5 * 2 * 4, 2 * 2 * 10
    assert counts[True, False] == logits + of_hidden
    assert counts[False, True] == logits + of_weight
    assert counts[True, True] == logits * (1 if together else 2) + of_hidden + of_weight
    assert grads[True, False][1] is None and torch.equal(grads[True, False][0], grads[True, True][0])
    assert grads[False, True][0] is None and torch.equal(grads[False, True][1], grads[True, True][1])
