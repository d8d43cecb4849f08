"""log π(target) and the entropy of each token, from hidden states and the unembedding, without an N×V tensor.

With z = h·Wᵀ/τ over the vocabulary, p = softmax(z), and g and e the gradients from above of log-prob and entropy:

    log π(t) = z_t - lse(z)        H = -Σ p log p        ∂/∂z_v = g·(1[v=t] - p_v) - e·p_v·(log p_v + H)

Forward: one kernel multiplies tiles of h and W and keeps, of each span of the vocabulary, a running maximum, Σ e^z and
Σ e^z·z (online softmax: Milakov and Gimelshein 2018); a second merges the spans in a fixed order. Backward: the logits
are recomputed block by block and turned into slopes ∂/∂z, which two more products turn into the gradients. Every sum
runs in float32 to its end, and nothing is added atomically: the same bits every run.

Tokens with target -100 are dropped before any arithmetic: `_order` lists the others, and a program that starts beyond
their number, which only the GPU knows, returns at once. Nothing waits for the GPU and no input is copied.

Why are logits never written, and slopes written in 16 bits? Counted for 16-bit inputs, forward and backward, per token
and vocabulary entry, with F = 2D operations for a product (V changes none of it; N tokens, `width` = 80 MiB / 2N):

                                                    D = 768                   D = 1024
    products into float32, kernels over rows        4F = 6144, 22 bytes       4F = 8192, 22 bytes
    this file while N·D <= 2²⁵                      4F = 6144, 6 + 8D/width   4F = 8192, 6 + 8D/width
    this file beyond (a second visit)               5F = 7680, 8 + 8D/width   5F = 10240, 8 + 8D/width
    slopes never written, products in registers     5F, but a tile of 128 rows then needs 512·D bytes: 384 KiB, of 256
    slopes never written, sums added in memory      4F, 8D·(1/128 + 1/128) = 96 and 128 bytes, in no fixed order

8D/width is the float32 sums of the gradient of h, read and written once a block: 0.6 bytes at N = 4096, D = 768 and 6.4
at N = 32768, D = 1024. Where 300 operations cost what a byte does (an H100's data sheet), 22 bytes are 6600 operations.

Memory beyond inputs, outputs and some words a token (their order, log-sum-exp, entropy) is at most LIMIT = 256 MiB
whatever N and V are: see `plan`. That is why there is a second visit: N rows of float32 sums may not fit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import IGNORE

MIB = 2**20
BLOCK_BYTES, SUM_BYTES, PART_BYTES, SPAN_BYTES = 80 * MIB, 128 * MIB, 24 * MIB, 64 * MIB
LIMIT = BLOCK_BYTES + SUM_BYTES + 2 * PART_BYTES  # twice: the parts, and at most as much again while they are added
ROWS = 128  # every buffer has whole tiles of rows, so that stores need no mask
BAND = 65536  # rows in a launch, at most
SPAN = 1024  # vocabulary entries one forward program walks through
MERGE = 16  # rows a program of the small kernels takes
GROUP = tl.constexpr(32)  # row tiles that share their columns in the cache
LOG2E, LN2 = 1.4426950408889634, tl.constexpr(0.6931471805599453)
LOW = tl.constexpr(-1e38)  # stands for -inf, which times 0 would be NaN


def generation(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU; 0 for AMD and for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else 0


def launch(hidden: Tensor, weight: Tensor) -> dict:
    """How the products are launched: the tile, its step along D, whether D needs masks, and Triton's options.

    Widths that are multiples of 128, laid out as usual, take tiles of 128×128 without masks. Others take 64×64, and so
    does float32 on generations whose registers do not hold the larger tile beside the three parts of a float32 product.
    """
    of = generation(hidden.device)
    wide = hidden.dtype == torch.float32
    steps = *hidden.stride()[:2], weight.stride(0), hidden.data_ptr(), weight.data_ptr()
    even = hidden.shape[-1] % 128 == 0 and hidden.stride(-1) == weight.stride(-1) == 1
    even = even and all(x % 16 == 0 for x in steps)
    large = even and not (wide and of not in (9, 10))
    return {
        "TILE": 128 if large else 64,
        "BLOCK_K": (32 if wide else 64) if even else 16,
        "EVEN": even,
        "PRECISION": "tf32x3" if wide and of else "ieee",
        "UPCAST": triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16,
        "num_warps": 8 if large or wide else 4,
        "num_stages": 3 if of else 2,
    }


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bfloat16 as raw bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _place(rows, row, count, T, stride_b, stride_t):
    """Where in `hidden` the row-th token that counts begins. Rows beyond repeat the last, and are dropped later."""
    token = tl.load(rows + tl.minimum(row, count - 1))
    return (token // T).to(tl.int64) * stride_b + (token % T).to(tl.int64) * stride_t


@triton.jit
def _grouped(row_tiles, column_tiles):
    """Tiles in an order in which neighbours in time share rows or columns."""
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    inner = program % (GROUP * column_tiles)
    return first + inner % rows, inner // rows


@triton.jit
def _logits(
    hidden, place, weight, column, V, D, stride_d, stride_wv, stride_wd,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden · weightᵀ for the tokens at `place` and the vocabulary entries `column`: a float32 tile."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    # offsets stay and the base moves, which keeps registers free; a column beyond V repeats the last, for the caller
    # to mask
    w = tl.minimum(column, V - 1).to(tl.int64)[None, :] * stride_wv + k[:, None] * stride_wd
    h = hidden + place[:, None] + k[None, :] * stride_d
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN:
            a, b = tl.load(h), tl.load(weight + w)
        else:
            a = tl.load(h, mask=(start + k < D)[None, :], other=0.0)
            b = tl.load(weight + w, mask=(start + k < D)[:, None], other=0.0)
        acc = _dot(a, b, acc, PRECISION, UPCAST)
        h += tl.cast(BLOCK_K, tl.int64) * stride_d
        weight += tl.cast(BLOCK_K, tl.int64) * stride_wd
    return acc


@triton.jit
def _forward(
    hidden, weight, rows, count, spans, first, band, V, D, T,
    stride_b, stride_t, stride_d, stride_wv, stride_wd, scale, SPAN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of each row and span, with x = z/ln 2: the largest x, Σ 2^(x-max) and Σ 2^(x-max)·(x-max)."""
    tile, span = _grouped(tl.cdiv(band, TILE), tl.cdiv(V, SPAN))
    count = tl.load(count)
    if first + tile * TILE >= count:
        return
    local = tile * TILE + tl.arange(0, TILE)
    place = _place(rows, first + local, count, T, stride_b, stride_t)
    top = tl.full([TILE], LOW, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    moment = tl.zeros([TILE], tl.float32)
    for start in range(span * SPAN, tl.minimum((span + 1) * SPAN, V), TILE):
        column = start + tl.arange(0, TILE)
        x = scale * _logits(
            hidden, place, weight, column, V, D, stride_d, stride_wv, stride_wd,
            TILE, BLOCK_K, EVEN, PRECISION, UPCAST,
        )  # fmt: skip
        x = tl.where(column[None, :] < V, x, LOW)
        new = tl.maximum(top, tl.max(x, 1))
        x -= new[:, None]
        p = tl.exp2(x)
        keep = tl.exp2(top - new)
        moment = keep * (moment + total * (top - new)) + tl.sum(p * x, 1)
        total = keep * total + tl.sum(p, 1)
        top = new
    at = spans + span * 3 * band + local
    tl.store(at, top)
    tl.store(at + band, total)
    tl.store(at + 2 * band, moment)


@triton.jit
def _merge(
    hidden, weight, targets, rows, count, spans, logprobs, entropy, lse, first, band, number, D, T,
    stride_b, stride_t, stride_d, stride_wv, stride_wd, scale, MERGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The spans of each row in their order, and the target's x -> log-prob and entropy in nats, log-sum-exp in bits."""
    count = tl.load(count)
    local = tl.program_id(0) * MERGE + tl.arange(0, MERGE)
    if first + tl.program_id(0) * MERGE >= count:
        return
    top = tl.full([MERGE], LOW, tl.float32)
    total = tl.zeros([MERGE], tl.float32)
    moment = tl.zeros([MERGE], tl.float32)
    for span in range(number):
        at = spans + span * 3 * band + local
        other, other_total, other_moment = tl.load(at), tl.load(at + band), tl.load(at + 2 * band)
        new = tl.maximum(top, other)
        keep, more = tl.exp2(top - new), tl.exp2(other - new)
        moment = keep * (moment + total * (top - new)) + more * (other_moment + other_total * (other - new))
        total = keep * total + more * other_total
        top = new
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    h = hidden + _place(rows, first + local, count, T, stride_b, stride_t)[:, None] + k[None, :] * stride_d
    target = tl.load(targets + tl.minimum(first + local, count - 1))
    w = weight + target[:, None] * stride_wv + k[None, :] * stride_wd
    x = tl.zeros([MERGE], tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (start + k < D)[None, :]
        x += tl.sum(tl.load(h, mask=inside, other=0.0).to(tl.float32) * tl.load(w, mask=inside, other=0.0), 1)
        h += tl.cast(BLOCK_D, tl.int64) * stride_d
        w += tl.cast(BLOCK_D, tl.int64) * stride_wd
    token = tl.load(rows + tl.minimum(first + local, count - 1))
    inside = first + local < count
    bits = tl.log2(total)
    # differences first, so that large logits cost no digits; the target's x was summed in another order than the
    # spans', and where p is almost 1 its rounding must not make a log-prob positive
    tl.store(logprobs + token, tl.minimum((x * scale - top - bits) * LN2, 0.0), mask=inside)
    tl.store(entropy + token, (bits - moment / total) * LN2, mask=inside)
    tl.store(lse + token, top + bits, mask=inside)


@triton.jit
def _slopes(
    hidden, weight, rows, count, lse, entropy, grad, grad_entropy, unit, out, first, band, begin, columns, width,
    V, D, T, stride_b, stride_t, stride_d, stride_wv, stride_wd, scale,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """∂/∂z · unit, all but the 1[v=t] term, for a band of rows and `columns` entries from `begin` on; 0 around them."""
    tile, column = _grouped(tl.cdiv(band, TILE), tl.cdiv(columns, TILE))
    count = tl.load(count)
    if first + tile * TILE >= count:
        return
    local = tile * TILE + tl.arange(0, TILE)
    place = _place(rows, first + local, count, T, stride_b, stride_t)
    offset = column * TILE + tl.arange(0, TILE)
    x = scale * _logits(
        hidden, place, weight, begin + offset, V, D, stride_d, stride_wv, stride_wd,
        TILE, BLOCK_K, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    token = tl.load(rows + tl.minimum(first + local, count - 1))
    x -= tl.load(lse + token)[:, None]  # log2 p
    e = tl.load(unit) * tl.load(grad_entropy + token)
    slope = tl.load(unit) * tl.load(grad + token) + e * tl.load(entropy + token)
    x = -tl.exp2(x) * (slope[:, None] + (e * LN2)[:, None] * x)
    x = tl.where((first + local < count)[:, None] & (offset < columns)[None, :], x, 0.0)
    tl.store(out + local.to(tl.int64)[:, None] * width + offset[None, :], x.to(out.dtype.element_ty))


@triton.jit
def _target_slopes(
    targets, rows, count, logprobs, entropy, grad, grad_entropy, unit, out, first, begin, columns, width,
    MERGE: tl.constexpr,
):  # fmt: skip
    """∂/∂z · unit of the targets among these columns, whole, in the places where `_slopes` left out a term."""
    local = tl.program_id(0) * MERGE + tl.arange(0, MERGE)
    inside = first + local < tl.load(count)
    token = tl.load(rows + first + local, mask=inside, other=0)
    offset = tl.load(targets + first + local, mask=inside, other=-1) - begin
    logp = tl.load(logprobs + token)
    g, e = tl.load(grad + token), tl.load(grad_entropy + token)
    slope = tl.load(unit) * (g - tl.exp(logp) * (g + e * (logp + tl.load(entropy + token))))
    inside = inside & (offset >= 0) & (offset < columns)
    tl.store(out + local.to(tl.int64) * width + offset, slope.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient(
    slopes, weight, count, sums, first, band, begin, columns, width, V, D, stride_wv, stride_wd, fresh,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums (+)= slopes · weight over these columns."""
    tile, column = _grouped(tl.cdiv(band, TILE), tl.cdiv(D, TILE))
    if first + tile * TILE >= tl.load(count):
        return
    local = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (column * TILE + tl.arange(0, TILE)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    s = slopes + local[:, None] * width + k[None, :]
    at = sums + local[:, None] * D + column[None, :]
    inside = (column < D)[None, :]
    acc = tl.load(at, mask=inside & ~fresh, other=0.0)
    for start in range(0, columns, BLOCK_K):
        # the slopes of entries beyond the last are 0
        entry = tl.minimum(begin + start + k, V - 1).to(tl.int64)
        w = weight + entry[:, None] * stride_wv + column[None, :] * stride_wd
        if EVEN:
            b = tl.load(w)
        else:
            b = tl.load(w, mask=(column < D)[None, :], other=0.0)
        acc = _dot(tl.load(s), b, acc, PRECISION, UPCAST)
        s += BLOCK_K
    tl.store(at, acc, mask=inside)


@triton.jit
def _scatter(sums, rows, count, factor, out, first, D, BLOCK_D: tl.constexpr):
    """The float32 sums of a row, times `factor`, to its token."""
    local = tl.program_id(0).to(tl.int64)
    if first + local >= tl.load(count):
        return
    token = tl.load(rows + first + local).to(tl.int64)
    for start in range(0, D, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        x = tl.load(sums + local * D + k, mask=k < D, other=0.0) * tl.load(factor)
        tl.store(out + token * D + k, x.to(out.dtype.element_ty), mask=k < D)


@triton.jit
def _weight_gradient(
    slopes, hidden, rows, count, factor, out, first, band, columns, width, D, T, stride_b, stride_t, stride_d, fresh,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[part] = factor · slopesᵀ · hidden over this part of the band's rows; unless fresh, added to what is there."""
    tile, column = _grouped(tl.cdiv(columns, TILE), tl.cdiv(D, TILE))
    part, parts = tl.program_id(1), tl.num_programs(1)
    entry = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (column * TILE + tl.arange(0, TILE)).to(tl.int64)
    count = tl.load(count)
    here = tl.minimum(tl.maximum(count - first, 0), band)
    length = tl.cdiv(tl.cdiv(here, parts), BLOCK_K) * BLOCK_K
    inside = (entry < columns)[:, None] & (column < D)[None, :]
    at = out + (part.to(tl.int64) * columns + entry)[:, None] * D + column[None, :]
    acc = tl.load(at, mask=inside & ~fresh, other=0.0).to(tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, here), BLOCK_K):
        # the slopes of rows beyond the last are 0
        local = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a = tl.load(slopes + local[None, :] * width + entry[:, None])
        h = hidden + _place(rows, first + local, count, T, stride_b, stride_t)[:, None] + column[None, :] * stride_d
        if EVEN:
            b = tl.load(h)
        else:
            b = tl.load(h, mask=(column < D)[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    acc *= tl.load(factor)
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


def _order(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that count, in their order, then the rest; the targets so ordered; how many count, on the device."""
    flat = targets.flatten()
    rows = (flat == IGNORE).byte().argsort(stable=True)
    return rows.int(), flat[rows], (flat != IGNORE).sum()  # 32 bits: dividing 64 takes a subroutine


def _fit(budget: int, each: int) -> int:
    """How many rows (or columns) of `each` bytes fit, in whole tiles; one tile at the least."""
    return max(1, budget // (each * ROWS)) * ROWS


class Plan(NamedTuple):
    """How the backward is cut up so that its buffers stay within `LIMIT`."""

    band: int  # rows of a block of slopes
    width: int  # its columns
    parts: int  # partial sums over the rows of a band for the gradient of `weight`
    together: bool  # one visit to a block serves both gradients, because the float32 sums of all rows fit

    def bytes(self, size: int, d: int) -> int:
        """Of the buffers, with slopes of `size` bytes."""
        sums = self.band if self.together else max(self.band, self.width)
        partial = (self.parts + 1) * self.width if self.parts > 1 else 0
        return self.band * self.width * size + (sums + partial) * d * 4


def plan(n: int, v: int, d: int, size: int, tile: int) -> Plan:
    """For n tokens, v vocabulary entries, width d, and elements of `size` bytes."""
    band = min(triton.cdiv(n, ROWS) * ROWS, _fit(SUM_BYTES, 4 * d), BAND)
    width = min(triton.cdiv(v, ROWS) * ROWS, _fit(BLOCK_BYTES, size * band))
    if band < n:
        return Plan(band, min(width, _fit(SUM_BYTES, 4 * d)), 1, False)
    # enough programs to fill a large GPU even where the block is narrow and its sums over rows are long
    tiles = triton.cdiv(width, tile) * triton.cdiv(d, tile)
    return Plan(band, width, max(1, min(512 // tiles, n // 2048, PART_BYTES // (4 * width * d))), True)


@torch.library.custom_op("kernels::token_logprobs", mutates_args=())
def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, T, D], weight [V, D], targets [B, T] -> log-probs, entropy (nats), log-sum-exp (bits): float32."""
    (b, t, d), v, n = hidden.shape, len(weight), targets.numel()
    out = tuple(torch.zeros(b, t, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if n == 0:
        return out
    valid = (targets == IGNORE) | ((targets >= 0) & (targets < v))
    torch._assert_async(valid.all(), "kernels: a target is not in [0, V) and not -100")
    rows, ordered, count = _order(targets)
    shape = *hidden.stride(), *weight.stride(), LOG2E / temperature
    options = launch(hidden, weight)
    # on Hopper two programs then share an SM, and one's exponentials run beside the other's products
    cap = (
        {"maxnreg": 128} if generation(hidden.device) == 9 and hidden.dtype != torch.float32 and options["EVEN"] else {}
    )
    number = triton.cdiv(v, SPAN)
    band = min(triton.cdiv(n, ROWS) * ROWS, _fit(SPAN_BYTES, 12 * number), BAND)
    spans = hidden.new_empty(3 * number * band, dtype=torch.float32)
    for first in range(0, n, band):
        _forward[(band // options["TILE"] * number,)](
            hidden, weight, rows, count, spans, first, band, v, d, t, *shape, SPAN=SPAN, **options, **cap
        )
        _merge[(band // MERGE,)](
            hidden,
            weight,
            ordered,
            rows,
            count,
            spans,
            *out,
            first,
            band,
            number,
            d,
            t,
            *shape,
            MERGE=MERGE,
            BLOCK_D=128,
        )
    return out


@token_logprobs.register_fake
def _(hidden, weight, targets, temperature):
    return tuple(torch.empty(targets.shape, dtype=torch.float32, device=hidden.device) for _ in range(3))


@torch.library.custom_op("kernels::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    grad: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor,
    logprobs: Tensor, entropy: Tensor, lse: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients for `hidden` and `weight` in their dtype."""
    (b, t, d), v, n = hidden.shape, len(weight), targets.numel()
    out_hidden = torch.zeros(b, t, d, dtype=hidden.dtype, device=hidden.device)
    out_weight = torch.zeros(v, d, dtype=weight.dtype, device=weight.device)
    if n == 0:
        return out_hidden, out_weight
    grads = grad.contiguous(), grad_entropy.contiguous()
    rows, ordered, count = _order(targets)
    strides, options = (*hidden.stride(), *weight.stride()), launch(hidden, weight)
    # float16 has few exponents: a power of two brings the largest slope near 2^13 (|p (log p + H)| < 22 for V < 2^31)
    size = grad.abs().amax() + 22 * grad_entropy.abs().amax()
    unit = torch.where(size > 0, torch.exp2(13 - size.log2().ceil()), 1.0)
    factor, one = 1 / (unit * temperature), torch.ones_like(unit)

    tile = options["TILE"]
    band, width, parts, together = plan(n, v, d, hidden.element_size(), tile)
    slopes = hidden.new_empty(band * width)
    sums = hidden.new_empty((band if together else max(band, width)) * d, dtype=torch.float32)
    partial = hidden.new_empty(parts * width * d, dtype=torch.float32) if parts > 1 else sums

    def fill(first: int, begin: int, columns: int) -> None:
        _slopes[(band // tile * triton.cdiv(columns, tile),)](
            hidden, weight, rows, count, lse, entropy, *grads, unit, slopes, first, band, begin, columns, width,
            v, d, t, *strides, LOG2E / temperature, **options,
        )  # fmt: skip
        _target_slopes[(band // MERGE,)](
            ordered, rows, count, logprobs, entropy, *grads, unit, slopes, first, begin, columns, width, MERGE=MERGE
        )

    def add_hidden(first: int, begin: int, columns: int) -> None:
        _hidden_gradient[(band // tile * triton.cdiv(d, tile),)](
            slopes, weight, count, sums, first, band, begin, columns, width, v, d, *strides[3:], begin == 0, **options
        )
        if begin + columns == v:
            _scatter[(band,)](sums, rows, count, factor, out_hidden, first, d, BLOCK_D=1024)

    def add_weight(first: int, begin: int, columns: int) -> None:
        here = out_weight[begin : begin + columns]
        direct = together and parts == 1
        _weight_gradient[(triton.cdiv(columns, tile) * triton.cdiv(d, tile), parts)](
            slopes, hidden, rows, count, factor if direct else one, here if direct else partial, first, band, columns,
            width, d, t, *strides[:3], first == 0, **options,
        )  # fmt: skip
        if not direct and first + band >= n:
            total = partial[: parts * columns * d].view(parts, columns, d)
            total = total.sum(0) if parts > 1 else total[0]
            here.copy_(total.mul_(factor))

    bands = range(0, n, band)
    blocks = [(begin, min(width, v - begin)) for begin in range(0, v, width)]
    for first in bands:
        for block in blocks:
            fill(first, *block)
            add_hidden(first, *block)
            if together:
                add_weight(first, *block)
    if not together:
        for block in blocks:
            for first in bands:
                fill(first, *block)
                add_weight(first, *block)
    return out_hidden, out_weight


@token_logprobs_backward.register_fake
def _(grad, grad_entropy, hidden, weight, targets, logprobs, entropy, lse, temperature):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors, *output)


def _first(ctx, grad, grad_entropy, _):
    return *token_logprobs_backward(grad, grad_entropy, *ctx.saved_tensors, ctx.temperature), None, None


def _second(ctx, *_):
    raise RuntimeError("kernels: the Triton log-probs have no second derivative; use kernels.use('torch') for it")


token_logprobs.register_autograd(_first, setup_context=_setup)
token_logprobs_backward.register_autograd(_second)
