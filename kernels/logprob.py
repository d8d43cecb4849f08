"""log π(target) and the entropy of each token, from hidden states and the unembedding, without an N×V tensor of logits.

With z = h·Wᵀ/τ over the vocabulary, p = softmax(z) and the upstream gradients g (of the log-prob) and e (of the entropy):

    log π(t) = z_t - lse(z)          H = -Σ p log p          ∂/∂z_v = g·(1[v=t] - p_v) - e·p_v·(log p_v + H)

Forward: one kernel multiplies tiles of h and W and keeps, of each span of the vocabulary, a running maximum, Σ e^z and
Σ e^z·z (online softmax: Milakov and Gimelshein 2018); a second merges the spans in a fixed order. Backward: the logits
are recomputed block by block and turned into ∂/∂z, which two more products turn into the gradients. Every sum runs in
float32 until its end, and nothing is added atomically: the same bits every run.

Tokens with target -100 are dropped first: `_order` lists the others, and a program that starts beyond their number, which
only the GPU knows, returns at once. Nothing waits for the GPU and nothing is copied.

Why no logits forward and 16-bit ∂/∂z backward (16-bit inputs; per token and vocabulary entry; F = 2D operations)?

                                         operations          bytes of logits            D = 768        D = 1024
    matmul into float32, row kernels     F + 3F = 4F         8 + 14                     6144 ops       8192 ops   22 bytes
    this file, N·D ≤ 2²⁵                 F + 3F = 4F         0 + 6 + sums 8·D/width     6144 ops       8192 ops   6…10 bytes
    this file, larger                    F + 4F = 5F         0 + 8 + sums               7680 ops      10240 ops   8…10 bytes
    no ∂/∂z at all                       F + 4F = 5F         0                          a D-wide float32 sum per row: at
                                                                                        128 rows 384 KiB, an SM has 256
    ∂/∂z in registers, sums in memory    F + 3F = 4F         16·D·(1/128)               96…128 bytes, and unordered atomics

An H100's ratio of 16-bit operations to bytes is about 300, so 22 bytes cost what 6600 operations do: as much as all of
the products at D = 768. V changes none of this. `width` is the columns of a block of ∂/∂z, 80 MiB / (2N).

Memory beyond inputs, outputs and some words a token (order, log-sum-exp): at most `LIMIT` = 240 MiB whatever N and V: a
block of ∂/∂z (80 MiB), float32 sums (128 MiB), partial products (32 MiB); forward 64 MiB. A band of rows whose D-wide
float32 sums exceed 128 MiB is split, and then no block can serve both gradients: they are computed in two visits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import IGNORE

MIB = 2**20
BLOCK_BYTES, SUM_BYTES, PART_BYTES, SPAN_BYTES = 80 * MIB, 128 * MIB, 32 * MIB, 64 * MIB
LIMIT = BLOCK_BYTES + SUM_BYTES + PART_BYTES
TILE = 128  # rows and columns of every product's tile
SPAN = 1024  # vocabulary entries one forward program walks through
GROUP = 32  # row tiles that share their columns in the cache
BAND = 65536  # rows in a launch, at most
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOW = tl.constexpr(-1e38)  # stands for -inf, which times 0 would be NaN


def launch(dtype: torch.dtype) -> dict:
    """How the products are launched: 16-bit operands in steps of 64, float32 in steps of 32 (the same bytes)."""
    hip = torch.version.hip is not None
    wide = dtype == torch.float32
    return {
        "BLOCK_K": 32 if wide else 64,
        "PRECISION": "ieee" if hip or not wide else "tf32x3",
        "num_warps": 8,
        "num_stages": 2 if hip else 3,
    }


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bfloat16 as raw bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _place(rows, row, count, T, stride_b, stride_t):
    """Where in `hidden` the row-th token that counts begins; any valid place beyond them."""
    token = tl.load(rows + row, mask=row < count, other=0)
    return (token // T) * stride_b + (token % T) * stride_t


@triton.jit
def _grouped(row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tiles in an order in which neighbours in time share rows or columns."""
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    inner = program % (GROUP * column_tiles)
    return first + inner % rows, inner // rows


@triton.jit
def _logits(
    hidden, place, weight, column, V, D, stride_d, stride_wv, stride_wd,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden · weightᵀ for the tokens at `place` and the vocabulary entries `column`: a float32 tile."""
    k = tl.arange(0, BLOCK_K)
    # a column beyond V repeats the last one; the caller masks it
    w = weight + tl.minimum(column, V - 1).to(tl.int64)[None, :] * stride_wv + k[:, None] * stride_wd
    h = hidden + place[:, None] + k[None, :] * stride_d
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + k < D
        a = tl.load(h, mask=inside[None, :], other=0.0)
        b = tl.load(w, mask=inside[:, None], other=0.0)
        acc = _dot(a, b, acc, PRECISION, UPCAST)
        h += BLOCK_K * stride_d
        w += BLOCK_K * stride_wd
    return acc


@triton.jit
def _forward(
    hidden, weight, targets, rows, count, spans, chosen, first, band, V, D, T,
    stride_b, stride_t, stride_d, stride_wv, stride_wd, scale,
    SPAN: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of each row and span: the largest x, Σ 2^(x-max) and Σ 2^(x-max)·(x-max), where x = z/ln 2; and the target's x."""
    tile, span = _grouped(tl.cdiv(band, TILE), tl.cdiv(V, SPAN), GROUP)
    count = tl.load(count)
    if first + tile * TILE >= count:
        return
    local = tile * TILE + tl.arange(0, TILE)
    row = first + local
    place = _place(rows, row, count, T, stride_b, stride_t)
    target = tl.load(targets + row, mask=row < count, other=-1)
    top = tl.full([TILE], LOW, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    moment = tl.zeros([TILE], tl.float32)
    hit = tl.zeros([TILE], tl.float32)
    for start in range(span * SPAN, tl.minimum((span + 1) * SPAN, V), TILE):
        column = start + tl.arange(0, TILE)
        x = scale * _logits(
            hidden, place, weight, column, V, D, stride_d, stride_wv, stride_wd, TILE, BLOCK_K, PRECISION, UPCAST
        )
        hit += tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
        x = tl.where(column[None, :] < V, x, LOW)
        new = tl.maximum(top, tl.max(x, 1))
        x -= new[:, None]
        p = tl.exp2(x)
        keep = tl.exp2(top - new)
        moment = keep * (moment + total * (top - new)) + tl.sum(p * x, 1)
        total = keep * total + tl.sum(p, 1)
        top = new
    at = spans + span * 3 * band + local
    tl.store(at, top, mask=row < count)
    tl.store(at + band, total, mask=row < count)
    tl.store(at + 2 * band, moment, mask=row < count)
    tl.store(chosen + local, hit, mask=(row < count) & (target // SPAN == span))


@triton.jit
def _merge(spans, chosen, rows, count, logprobs, entropy, lse, first, band, number, TILE: tl.constexpr):
    """The spans of each row in their order -> log-prob, entropy (nats) and log-sum-exp (in bits, for the backward)."""
    count = tl.load(count)
    local = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (local < band) & (first + local < count)
    top = tl.full([TILE], LOW, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    moment = tl.zeros([TILE], tl.float32)
    for span in range(number):
        at = spans + span * 3 * band + local
        other = tl.load(at, mask=inside, other=0.0)
        new = tl.maximum(top, other)
        keep, more = tl.exp2(top - new), tl.exp2(other - new)
        other_total = tl.load(at + band, mask=inside, other=1.0)
        other_moment = tl.load(at + 2 * band, mask=inside, other=0.0)
        moment = keep * (moment + total * (top - new)) + more * (other_moment + other_total * (other - new))
        total = keep * total + more * other_total
        top = new
    token = tl.load(rows + first + local, mask=inside, other=0)
    bits = tl.log2(total)
    # differences first, so that large logits cost no digits
    tl.store(logprobs + token, (tl.load(chosen + local, mask=inside, other=0.0) - top - bits) * LN2, mask=inside)
    tl.store(entropy + token, (bits - moment / total) * LN2, mask=inside)
    tl.store(lse + token, top + bits, mask=inside)


@triton.jit
def _slopes(
    hidden, weight, targets, rows, count, lse, entropy, grad, grad_entropy, unit, out, first, band, begin,
    width, stride_s, V, D, T,
    stride_b, stride_t, stride_d, stride_wv, stride_wd, scale,
    GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂/∂z · unit for a band of rows and `width` columns from `begin` on, in the dtype of `hidden`."""
    tile, column = _grouped(tl.cdiv(band, TILE), tl.cdiv(width, TILE), GROUP)
    count = tl.load(count)
    if first + tile * TILE >= count:
        return
    local = tile * TILE + tl.arange(0, TILE)
    row = first + local
    place = _place(rows, row, count, T, stride_b, stride_t)
    offset = column * TILE + tl.arange(0, TILE)
    column = begin + offset
    x = scale * _logits(
        hidden, place, weight, column, V, D, stride_d, stride_wv, stride_wd, TILE, BLOCK_K, PRECISION, UPCAST
    )
    token = tl.load(rows + row, mask=row < count, other=0)
    target = tl.load(targets + row, mask=row < count, other=-1)
    unit = tl.load(unit)
    g = unit * tl.load(grad + token)
    e = unit * tl.load(grad_entropy + token)
    x -= tl.load(lse + token)[:, None]  # log2 p
    slope = (g + e * tl.load(entropy + token))[:, None] + (e * LN2)[:, None] * x
    d = tl.where(column[None, :] == target[:, None], g[:, None], 0.0) - tl.exp2(x) * slope
    inside = (row < count)[:, None] & (offset < width)[None, :]
    tl.store(out + local.to(tl.int64)[:, None] * stride_s + offset[None, :], d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient(
    slopes, weight, rows, count, factor, sums, out, first, band, begin, width, stride_s, D, stride_wv, stride_wd,
    fresh, last,
    GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums += slopes · weight over these columns; after the last of them, the sums go to their tokens in `out`."""
    tile, column = _grouped(tl.cdiv(band, TILE), tl.cdiv(D, TILE), GROUP)
    count = tl.load(count)
    if first + tile * TILE >= count:
        return
    local = tile * TILE + tl.arange(0, TILE)
    column = column * TILE + tl.arange(0, TILE)
    inside = (first + local < count)[:, None] & (column < D)[None, :]
    k = tl.arange(0, BLOCK_K)
    s = slopes + tl.minimum(local, band - 1).to(tl.int64)[:, None] * stride_s + k[None, :]
    w = weight + (begin + k).to(tl.int64)[:, None] * stride_wv + column.to(tl.int64)[None, :] * stride_wd
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, width, BLOCK_K):
        here = start + k < width
        a = tl.load(s, mask=here[None, :], other=0.0)
        b = tl.load(w, mask=here[:, None] & (column < D)[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION, UPCAST)
        s += BLOCK_K
        w += BLOCK_K * stride_wv
    at = sums + local.to(tl.int64)[:, None] * D + column[None, :]
    acc += tl.load(at, mask=inside & ~fresh, other=0.0)
    tl.store(at, acc, mask=inside & ~last)
    token = tl.load(rows + first + local, mask=first + local < count, other=0)
    acc = (acc * tl.load(factor)).to(out.dtype.element_ty)
    tl.store(out + token[:, None] * D + column[None, :], acc, mask=inside & last)


@triton.jit
def _weight_gradient(
    slopes, hidden, rows, count, factor, out, first, band, width, stride_s, D, T, stride_b, stride_t, stride_d, fresh,
    GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[part] (+)= slopesᵀ · hidden over this part of the band's rows: `width` vocabulary entries by D."""
    tile, column = _grouped(tl.cdiv(width, TILE), tl.cdiv(D, TILE), GROUP)
    part, parts = tl.program_id(1), tl.num_programs(1)
    entry = tile * TILE + tl.arange(0, TILE)
    column = column * TILE + tl.arange(0, TILE)
    count = tl.minimum(tl.maximum(tl.load(count) - first, 0), band)
    length = tl.cdiv(tl.cdiv(count, parts), BLOCK_K) * BLOCK_K
    end = tl.minimum((part + 1) * length, count)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(part * length, end, BLOCK_K):
        local = start + tl.arange(0, BLOCK_K)
        place = _place(rows, first + local, first + end, T, stride_b, stride_t)
        s = slopes + local.to(tl.int64)[None, :] * stride_s + entry[:, None]
        a = tl.load(s, mask=(entry < width)[:, None] & (local < end)[None, :], other=0.0)
        h = hidden + place[:, None] + column.to(tl.int64)[None, :] * stride_d
        b = tl.load(h, mask=(local < end)[:, None] & (column < D)[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    inside = (entry < width)[:, None] & (column < D)[None, :]
    at = out + part.to(tl.int64) * width * D + entry.to(tl.int64)[:, None] * D + column[None, :]
    acc = acc * tl.load(factor) + tl.load(at, mask=inside & ~fresh, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


def _order(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that count, in their order, then the rest; the targets in that order; how many count (on the device)."""
    counts = targets.flatten() != IGNORE
    rows = counts.logical_not().byte().argsort(stable=True)
    return rows, targets.flatten()[rows], counts.sum()


def _tiles(budget: int, each: int) -> int:
    """How many rows (or columns) of `each` bytes fit: whole tiles, so that none lies in two bands; one at the least."""
    return max(1, budget // (each * TILE)) * TILE


def _arguments(hidden: Tensor, weight: Tensor) -> tuple[tuple, dict]:
    """Strides and launch options that the kernels share."""
    upcast = triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16
    return (*hidden.stride(), *weight.stride()), launch(hidden.dtype) | {"TILE": TILE, "UPCAST": upcast}


@torch.library.custom_op("kernels::token_logprobs", mutates_args=())
def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, T, D], weight [V, D], targets [B, T] -> log-probs, entropy (nats), log-sum-exp (bits), [B, T] float32."""
    (b, t, d), v = hidden.shape, len(weight)
    out = tuple(torch.zeros(b, t, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if targets.numel() == 0:
        return out
    valid = (targets == IGNORE) | ((targets >= 0) & (targets < v))
    torch._assert_async(valid.all(), "kernels: a target is not in [0, V) and not -100")
    rows, ordered, count = _order(targets)
    strides, options = _arguments(hidden, weight)
    number = triton.cdiv(v, SPAN)
    band = min(b * t, _tiles(SPAN_BYTES, 12 * number), BAND)
    spans = hidden.new_empty(3 * number * band, dtype=torch.float32)
    chosen = hidden.new_empty(band, dtype=torch.float32)
    for first in range(0, b * t, band):
        _forward[(triton.cdiv(band, TILE) * number,)](
            hidden, weight, ordered, rows, count, spans, chosen, first, band, v, d, t, *strides,
            LOG2E.value / temperature, SPAN=SPAN, GROUP=GROUP, **options,
        )  # fmt: skip
        _merge[(triton.cdiv(band, TILE),)](spans, chosen, rows, count, *out, first, band, number, TILE=TILE)
    return out


@token_logprobs.register_fake
def _(hidden, weight, targets, temperature):
    return tuple(targets.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("kernels::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    grad: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: Tensor, lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients for `hidden` and `weight` in their dtype."""
    (b, t, d), v, n = hidden.shape, len(weight), targets.numel()
    out_hidden = torch.zeros(b, t, d, dtype=hidden.dtype, device=hidden.device)
    if n == 0:
        return out_hidden, torch.zeros(v, d, dtype=weight.dtype, device=weight.device)
    out_weight = torch.empty(v, d, dtype=weight.dtype, device=weight.device)
    grad, grad_entropy = grad.contiguous(), grad_entropy.contiguous()
    rows, ordered, count = _order(targets)
    strides, options = _arguments(hidden, weight)
    options["GROUP"] = GROUP
    # float16 has few exponents: a power of two brings the largest slope near 2^13 (|p (log p + H)| < 22 for V < 2^31)
    size = grad.abs().amax() + 22 * grad_entropy.abs().amax()
    unit = torch.where(size > 0, torch.exp2(13 - size.log2().ceil()), 1.0)
    factor = 1 / (unit * temperature)

    band = min(n, _tiles(SUM_BYTES, 4 * d), BAND)
    width = _tiles(BLOCK_BYTES, hidden.element_size() * band)
    one_visit = band == n
    if not one_visit:
        width = min(width, _tiles(SUM_BYTES, 4 * d))
    width = min(width, triton.cdiv(v, TILE) * TILE)  # a multiple of TILE, so that rows of the block stay aligned
    tiles = triton.cdiv(width, TILE) * triton.cdiv(d, TILE)
    # enough programs to fill a large GPU even where the block is narrow and its sums over rows are long
    parts = max(1, min(512 // tiles, n // 2048, PART_BYTES // (4 * width * d))) if one_visit else 1
    slopes = hidden.new_empty(band * width)
    sums = hidden.new_empty((band if one_visit else max(band, width)) * d, dtype=torch.float32)
    partial = hidden.new_empty(parts * width * d if parts > 1 else 0, dtype=torch.float32)

    def fill(first: int, begin: int) -> int:
        columns = min(width, v - begin)
        _slopes[(triton.cdiv(band, TILE) * triton.cdiv(columns, TILE),)](
            hidden, weight, ordered, rows, count, lse, entropy, grad, grad_entropy, unit, slopes, first, band, begin,
            columns, width, v, d, t, *strides, LOG2E.value / temperature, **options,
        )  # fmt: skip
        return columns

    def add_hidden(first: int, begin: int, columns: int) -> None:
        _hidden_gradient[(triton.cdiv(band, TILE) * triton.cdiv(d, TILE),)](
            slopes, weight, rows, count, factor, sums, out_hidden, first, band, begin, columns, width, d,
            *strides[3:],
            begin == 0, begin + columns == v, **options,
        )  # fmt: skip

    def add_weight(first: int, begin: int, columns: int) -> None:
        into = out_weight[begin:] if one_visit and parts == 1 else partial if one_visit else sums
        _weight_gradient[(triton.cdiv(columns, TILE) * triton.cdiv(d, TILE), parts)](
            slopes, hidden, rows, count, factor, into, first, band, columns, width, d, t, *strides[:3],
            first == 0, **options,
        )  # fmt: skip
        if into is not sums and parts > 1:
            out_weight[begin : begin + columns] = partial[: parts * columns * d].view(parts, columns, d).sum(0)
        elif into is sums and first + band >= n:
            out_weight[begin : begin + columns] = sums[: columns * d].view(columns, d)

    for first in range(0, n, band):
        for begin in range(0, v, width):
            columns = fill(first, begin)
            add_hidden(first, begin, columns)
            if one_visit:
                add_weight(first, begin, columns)
    if not one_visit:
        for begin in range(0, v, width):
            for first in range(0, n, band):
                add_weight(first, begin, fill(first, begin))
    return out_hidden, out_weight


@token_logprobs_backward.register_fake
def _(grad, grad_entropy, hidden, weight, targets, entropy, lse, temperature):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _first(ctx, grad, grad_entropy, _):
    return *token_logprobs_backward(grad, grad_entropy, *ctx.saved_tensors, ctx.temperature), None, None


def _second(ctx, *_):
    raise RuntimeError("kernels: the Triton log-probs have no second derivative; use kernels.use('torch') for it")


token_logprobs.register_autograd(_first, setup_context=_setup)
token_logprobs_backward.register_autograd(_second)
