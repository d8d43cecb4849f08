"""log π(target) and the entropy of each token, from hidden states and the unembedding, without an N×V tensor.

With z = h·Wᵀ/τ over the vocabulary, p = softmax(z), and g and e the gradients from above of log-prob and entropy:

    log π(t) = z_t - lse(z)        H = -Σ p log p        ∂/∂z_v = g·(1[v=t] - p_v) - e·p_v·(log p_v + H)

Forward: one kernel multiplies tiles of h and W and keeps, of each span of the vocabulary, a running maximum, Σ e^z and
Σ e^z·z (online softmax: Milakov and Gimelshein 2018); a second joins the spans in a fixed order. Backward: the logits
are recomputed block by block and turned into slopes ∂/∂z, which two more products turn into the gradients. Every sum
runs in float32 to its end, and nothing is added atomically: the same bits every run.

Tokens with target -100 are dropped before any arithmetic: `_order` lists the others, and a program that starts beyond
their number, which only the GPU knows, returns at once. Nothing waits for the GPU and no input is copied.

Why are logits never written, and slopes written in 16 bits? Counted for 16-bit inputs, forward and backward, per token
and vocabulary entry, with F = 2D operations for a product (V changes none of it; N tokens in blocks of `plan`):

                                                    D = 768                   D = 1024
    products into float32, kernels over rows        4F = 6144, 22 bytes       4F = 8192, 22 bytes
    this file while N·D <= 2²⁵                      4F = 6144, 6 bytes + S    4F = 8192, 6 bytes + S
    this file beyond (a second visit)               5F = 7680, 8 bytes + S    5F = 10240, 8 bytes + S
    slopes never written, products in registers     5F, but a tile of 128 rows then needs 512·D bytes: 384 KiB, of 256
    slopes never written, sums added in memory      4F, 8D·(1/128 + 1/128) = 96 and 128 bytes, in no fixed order

S = 8D/width + 8D·(bands - 1)/N is the float32 sums of both gradients, written and read once a block: 0.6 bytes at
N = 4096, D = 768 and 2.4 at N = 32768, D = 1024. Where 300 operations cost what a byte does (an H100's data sheet),
22 bytes are 6600 operations.

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
BLOCK_BYTES, HIDDEN_BYTES, WEIGHT_BYTES, SPAN_BYTES = 80 * MIB, 128 * MIB, 48 * MIB, 64 * MIB
LIMIT = BLOCK_BYTES + HIDDEN_BYTES + WEIGHT_BYTES
WHOLE = 256  # every tile divides it, and it every buffer, so that stores need no mask
BAND = 8192  # rows of a block of slopes, at most
MERGE, DEPTH = tl.constexpr(16), tl.constexpr(128)  # rows a program of `_merge` takes, and its step along D
LOG2E, LN2 = 1.4426950408889634, tl.constexpr(0.6931471805599453)
LOW = tl.constexpr(-1e38)  # stands for -inf, which times 0 would be NaN
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Head(NamedTuple):
    """What every kernel takes: tensors, sizes and strides, and how its products are tiled."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    rows: Tensor  # the tokens in their order, those that count first
    count: Tensor  # how many count
    V: int
    D: int
    T: int
    stride_b: int
    stride_t: int
    stride_d: int
    stride_wv: int
    stride_wd: int
    scale: float  # from logits to powers of two: 1 / (τ ln 2)
    PRECISION: tl.constexpr
    EVEN: tl.constexpr  # a power of two that divides D: no tile or step that divides it needs a mask along D
    ROWS: tl.constexpr  # of this kernel's tile
    COLUMNS: tl.constexpr
    STEP: tl.constexpr  # of the dimension that is summed over
    GROUP: tl.constexpr  # row tiles that share their columns in the cache
    SPAN: tl.constexpr  # vocabulary entries one forward program walks through


def generation(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU; 0 for AMD and for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else 0


def tilings(of: int, wide: bool, even: bool) -> dict[str, dict]:
    """How each product is tiled, and Triton's options: for a generation, float32 or not, without masks along D or with.

    Masks take small tiles, and so does float32 on generations whose registers do not hold the larger beside the three
    parts of a float32 product. A gradient's step must divide the tile of the slopes that it walks along.
    """
    large = even and not (wide and of not in (9, 10))
    side, step = 128 if large else 64, (32 if wide else 64) if even else 16
    usual = {"ROWS": side, "COLUMNS": side, "STEP": step, "GROUP": 32, "SPAN": 1024}
    usual |= {"num_warps": 8 if large or wide else 4, "num_stages": 3 if of else 2}
    # on Hopper two forward programs then share an SM, and one's exponentials run beside the other's products
    cap = {"maxnreg": 128} if of == 9 and even and not wide else {}
    return {"forward": usual | cap, "slopes": usual, "hidden": usual, "weight": usual}


def launch(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> dict[str, tuple[Head, dict]]:
    """What each product's kernel takes first, and Triton's options."""
    of, wide, d = generation(hidden.device), hidden.dtype == torch.float32, hidden.shape[-1]
    steps = *hidden.stride()[:2], weight.stride(0), hidden.data_ptr(), weight.data_ptr()
    even = d > 0 and d % 128 == 0 and hidden.stride(-1) == weight.stride(-1) == 1 and all(x % 16 == 0 for x in steps)
    ignored = targets.flatten() == IGNORE
    rows = ignored.byte().argsort(stable=True).int()  # 32 bits: dividing 64 takes a subroutine
    common = hidden, weight, rows, (~ignored).sum(dtype=torch.int32), *weight.shape, targets.shape[1]
    common += *hidden.stride(), *weight.stride(), LOG2E / temperature
    constants = {"PRECISION": "tf32x3" if wide and of else "ieee", "EVEN": min(d & -d, WHOLE) if even else 1}
    heads = {}
    for product, tiling in tilings(of, wide, even).items():
        own = {name: tl.constexpr(x) for name, x in (constants | tiling).items() if name in Head._fields}
        heads[product] = Head(*common, **own), {name: x for name, x in tiling.items() if name not in own}
    return heads


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # it multiplies bfloat16 as raw bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _place(head, row, count):
    """Where in `hidden` the row-th token that counts begins. Rows beyond repeat the last, and are dropped later."""
    token = tl.load(head.rows + tl.minimum(row, count - 1))
    return (token // head.T).to(tl.int64) * head.stride_b + (token % head.T).to(tl.int64) * head.stride_t


@triton.jit
def _grouped(head, column_tiles):
    """This program's tile, in an order in which neighbours in time share rows or columns."""
    program, row_tiles = tl.program_id(0), tl.num_programs(0) // column_tiles
    first = program // (head.GROUP * column_tiles) * head.GROUP
    rows = tl.minimum(row_tiles - first, head.GROUP)
    inner = program % (head.GROUP * column_tiles)
    return first + inner % rows, inner // rows


@triton.jit
def _logits(head, place, column):
    """x = z/ln 2 of the tokens at `place` and the vocabulary entries `column`: a float32 tile."""
    k = tl.arange(0, head.STEP).to(tl.int64)
    # offsets stay and the base moves, which saves registers; columns beyond V repeat the last, for the caller to mask
    w = tl.minimum(column, head.V - 1).to(tl.int64)[None, :] * head.stride_wv + k[:, None] * head.stride_wd
    h = head.hidden + place[:, None] + k[None, :] * head.stride_d
    weight = head.weight
    acc = tl.zeros([head.ROWS, head.COLUMNS], tl.float32)
    for start in range(0, head.D, head.STEP):
        inside = start + k < head.D
        a = tl.load(h) if head.EVEN % head.STEP == 0 else tl.load(h, mask=inside[None, :], other=0.0)
        b = tl.load(weight + w) if head.EVEN % head.STEP == 0 else tl.load(weight + w, mask=inside[:, None], other=0.0)
        acc = _dot(a, b, acc, head.PRECISION)
        h += tl.cast(head.STEP, tl.int64) * head.stride_d
        weight += tl.cast(head.STEP, tl.int64) * head.stride_wd
    return head.scale * acc


@triton.jit
def _forward(head, spans, first, band):
    """Of each row and span: the largest x, Σ 2^(x-max) and Σ 2^(x-max)·(x-max)."""
    tile, span = _grouped(head, tl.cdiv(head.V, head.SPAN))
    count = tl.load(head.count)
    if first + tile * head.ROWS >= count:
        return
    place = _place(head, first + tile * head.ROWS + tl.arange(0, head.ROWS), count)
    top = tl.full([head.ROWS], LOW, tl.float32)
    total = tl.zeros([head.ROWS], tl.float32)
    moment = tl.zeros([head.ROWS], tl.float32)
    for start in range(span * head.SPAN, tl.minimum((span + 1) * head.SPAN, head.V), head.COLUMNS):
        column = start + tl.arange(0, head.COLUMNS)
        x = _logits(head, place, column)
        x = tl.where(column[None, :] < head.V, x, LOW)
        new = tl.maximum(top, tl.max(x, 1))
        x -= new[:, None]
        p = tl.exp2(x)
        keep = tl.exp2(top - new)
        moment = keep * (moment + total * (top - new)) + tl.sum(p * x, 1)
        total = keep * total + tl.sum(p, 1)
        top = new
    # the rows again, and above the scale before the mask: otherwise 128 registers do not suffice
    at = spans + span * 3 * band + tile * head.ROWS + tl.arange(0, head.ROWS)
    tl.store(at, top)
    tl.store(at + band, total)
    tl.store(at + 2 * band, moment)


@triton.jit
def _merge(head, targets, spans, logprobs, entropy, lse, first, band, number):
    """The spans of each row in their order, and the target's x -> log-prob and entropy in nats, log-sum-exp in bits."""
    count = tl.load(head.count)
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
    k = tl.arange(0, DEPTH).to(tl.int64)
    token = tl.load(head.rows + tl.minimum(first + local, count - 1))
    h = head.hidden + _place(head, first + local, count)[:, None] + k[None, :] * head.stride_d
    w = head.weight + tl.load(targets + token)[:, None] * head.stride_wv + k[None, :] * head.stride_wd
    x = tl.zeros([MERGE], tl.float32)
    for start in range(0, head.D, DEPTH):
        inside = (start + k < head.D)[None, :]
        x += tl.sum(tl.load(h, mask=inside, other=0.0).to(tl.float32) * tl.load(w, mask=inside, other=0.0), 1)
        h += tl.cast(DEPTH, tl.int64) * head.stride_d
        w += tl.cast(DEPTH, tl.int64) * head.stride_wd
    inside = first + local < count
    bits = tl.log2(total)
    # differences first, so that large logits cost no digits; the target's x was summed in another order than the
    # spans', and where p is almost 1 its rounding must not make a log-prob positive
    logp = tl.minimum((x * head.scale - top - bits) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(logprobs + token, logp, mask=inside)
    tl.store(entropy + token, (bits - moment / total) * LN2, mask=inside)
    tl.store(lse + token, top + bits, mask=inside)


@triton.jit
def _slopes(head, targets, logprobs, entropy, lse, grad, grad_entropy, unit, out, first, begin, width):
    """∂/∂z · unit for a band of rows from `first` and `width` entries from `begin` on; 0 beyond the last of both."""
    tile, column = _grouped(head, tl.cdiv(tl.minimum(width, head.V - begin), head.COLUMNS))
    count = tl.load(head.count)
    if first + tile * head.ROWS >= count:
        return
    local = tile * head.ROWS + tl.arange(0, head.ROWS)
    offset = column * head.COLUMNS + tl.arange(0, head.COLUMNS)
    x = _logits(head, _place(head, first + local, count), begin + offset)
    token = tl.load(head.rows + tl.minimum(first + local, count - 1))
    x -= tl.load(lse + token)[:, None]  # log2 p
    h = tl.load(entropy + token)
    g, e = tl.load(unit) * tl.load(grad + token), tl.load(unit) * tl.load(grad_entropy + token)
    x = -tl.exp2(x) * ((g + e * h)[:, None] + (e * LN2)[:, None] * x)
    x = tl.where((first + local < count)[:, None] & (begin + offset < head.V)[None, :], x, 0.0)
    tl.store(out + local[:, None] * width + offset[None, :], x.to(out.dtype.element_ty))
    # over it, whole, the slope of the target: its log p is known to more digits than x, which matters where p is almost
    # 1; afterwards, because the tile's registers are then free
    tl.debug_barrier()
    target = tl.load(targets + token) - begin - column * head.COLUMNS
    logp = tl.load(logprobs + token)
    hit = g - tl.exp(logp) * (g + e * (logp + h))
    inside = (first + local < count) & (target >= 0) & (target < head.COLUMNS)
    tl.store(out + local * width + column * head.COLUMNS + target, hit.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(head, slopes, factor, band, first, begin, width, sums, out, OF_WEIGHT: tl.constexpr):
    """Slopes · weight or slopesᵀ · hidden: added to `sums`; after the last block stored in `out`, times `factor`."""
    tile, column = _grouped(head, tl.cdiv(head.D, head.COLUMNS))
    count = tl.load(head.count)
    tokens, entries = tl.minimum(count - first, band), tl.minimum(head.V - begin, width)
    if OF_WEIGHT:
        length, depth, fresh, last = entries, tokens, first == 0, first + band >= count
    else:
        length, depth, fresh, last = tokens, entries, begin == 0, begin + width >= head.V
    if (tile * head.ROWS >= length) | ((tokens <= 0) & (first > 0)):
        return
    local = tile * head.ROWS + tl.arange(0, head.ROWS)
    column = (column * head.COLUMNS + tl.arange(0, head.COLUMNS)).to(tl.int64)
    inside = (local < length)[:, None] & (column < head.D)[None, :]
    at = sums + local[:, None] * head.D + column[None, :]
    acc = tl.load(at, mask=inside & (not fresh), other=0.0)
    for start in range(0, depth, head.STEP):
        k = start + tl.arange(0, head.STEP)  # beyond the last token or entry the slopes are 0
        if OF_WEIGHT:
            a = tl.load(slopes + k[None, :] * width + local[:, None])
            x = head.hidden + _place(head, first + k, count)[:, None] + column[None, :] * head.stride_d
        else:
            a = tl.load(slopes + local[:, None] * width + k[None, :])
            entry = tl.minimum(begin + k, head.V - 1).to(tl.int64)
            x = head.weight + entry[:, None] * head.stride_wv + column[None, :] * head.stride_wd
        b = tl.load(x) if head.EVEN % head.COLUMNS == 0 else tl.load(x, mask=(column < head.D)[None, :], other=0.0)
        acc = _dot(a, b, acc, head.PRECISION)
    if last:
        to = begin + local if OF_WEIGHT else tl.load(head.rows + first + local, mask=local < length, other=0)
        place = out + to.to(tl.int64)[:, None] * head.D + column[None, :]
        tl.store(place, (acc * tl.load(factor)).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(at, acc, mask=inside)


def _whole(x: int) -> int:
    """Rounded up to whole tiles."""
    return triton.cdiv(x, WHOLE) * WHOLE


def _fit(budget: int, each: int) -> int:
    """How many rows (or columns) of `each` bytes fit, in whole tiles; one tile at the least."""
    return max(1, budget // (each * WHOLE)) * WHOLE


def plan(n: int, v: int, d: int, size: int) -> tuple[int, int, int, int]:
    """Rows and columns of a block of slopes of `size` bytes, and rows of float32 sums for each gradient, within LIMIT.

    Where the sums for `hidden` hold all n rows, one visit to a block serves both gradients. Otherwise it is visited
    again, and the sums for `weight` take the others' place (0 rows, as where one band holds all rows).
    """
    rows = _fit(HIDDEN_BYTES, 4 * d)
    band = _whole(triton.cdiv(n, triton.cdiv(n, min(BAND, rows))))
    bands = triton.cdiv(n, band)
    group = min(bands, rows // band) * band
    width = min(_whole(v), _fit(BLOCK_BYTES, size * band))
    if group < n:
        return band, min(width, group), group, 0
    if bands == 1:
        return band, width, group, 0
    width = min(width, _fit(WEIGHT_BYTES, 4 * d))
    return band, width, group, width


@torch.library.custom_op("kernels::token_logprobs", mutates_args=())
def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, T, D], weight [V, D], targets [B, T] -> log-probs, entropy (nats), log-sum-exp (bits): float32."""
    v, n = len(weight), targets.numel()
    out = tuple(torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if n == 0:
        return out
    valid = (targets == IGNORE) | ((targets >= 0) & (targets < v))
    torch._assert_async(valid.all(), "kernels: a target is not in [0, V) and not -100")
    if v == 0:
        return out
    head, options = launch(hidden, weight, targets, temperature)["forward"]
    number = triton.cdiv(v, head.SPAN.value)
    band = min(_whole(n), _fit(SPAN_BYTES, 12 * number))
    spans = hidden.new_empty(3 * number * band, dtype=torch.float32)
    for first in range(0, n, band):
        _forward[(band // head.ROWS.value * number,)](head, spans, first, band, **options)
        _merge[(band // MERGE.value,)](head, targets.contiguous(), spans, *out, first, band, number)
    return out


@token_logprobs.register_fake
def _(hidden, weight, targets, temperature):
    return tuple(torch.empty(targets.shape, dtype=torch.float32, device=hidden.device) for _ in range(3))


@torch.library.custom_op("kernels::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    grad: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor,
    logprobs: Tensor, entropy: Tensor, lse: Tensor, temperature: float, of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients for `hidden` and `weight` in their dtype; [0] in place of one that is not wanted."""
    d, v, n = hidden.shape[-1], len(weight), targets.numel()
    out_hidden = torch.zeros(hidden.shape if of_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    out_weight = torch.zeros(weight.shape if of_weight else 0, dtype=weight.dtype, device=weight.device)
    if 0 in (n, v, d):
        return out_hidden, out_weight
    heads = launch(hidden, weight, targets, temperature)
    saved = targets.contiguous(), logprobs, entropy, lse, grad.contiguous(), grad_entropy.contiguous()
    # float16 has few exponents: a power of two brings the largest slope near 2^13 (|p (log p + H)| < 22 for V < 2^31)
    size = grad.abs().amax() + 22 * grad_entropy.abs().amax()
    unit = torch.where(size > 0, torch.exp2(13 - size.log2().ceil()), 1.0)
    factor = 1 / (unit * temperature)

    band, width, group, extra = plan(n, v, d, hidden.element_size())
    slopes = hidden.new_empty(band * width)
    sums = hidden.new_empty(group, d, dtype=torch.float32)
    weight_sums = hidden.new_empty(extra, d, dtype=torch.float32) if extra else sums
    together = of_hidden and of_weight and group >= n

    def run(kernel, product: str, rows: int, columns: int, *arguments, **constants) -> None:
        head, options = heads[product]
        grid = triton.cdiv(rows, head.ROWS.value) * triton.cdiv(columns, head.COLUMNS.value)
        kernel[(grid,)](head, *arguments, **constants, **options)

    def visit(start: int, end: int, to_hidden: bool, to_weight: bool) -> None:
        """The blocks of these rows: slopes, and what they add to the gradients."""
        for begin in range(0, v, width):
            entries = min(width, v - begin)
            for first in range(start, end, band):
                run(_slopes, "slopes", band, entries, *saved, unit, slopes, first, begin, width)
                block = slopes, factor, band, first, begin, width
                if to_hidden:
                    run(_gradient, "hidden", band, d, *block, sums[first - start :], out_hidden, OF_WEIGHT=False)
                if to_weight:
                    run(_gradient, "weight", entries, d, *block, weight_sums, out_weight, OF_WEIGHT=True)

    if of_hidden:
        for start in range(0, n, group):
            visit(start, min(start + group, n), True, together)
    if of_weight and not together:
        visit(0, n, False, True)
    return out_hidden, out_weight


@token_logprobs_backward.register_fake
def _(grad, grad_entropy, hidden, weight, targets, logprobs, entropy, lse, temperature, of_hidden, of_weight):
    return hidden.new_empty(hidden.shape if of_hidden else 0), weight.new_empty(weight.shape if of_weight else 0)


def _setup(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors, *output)


def _first(ctx, grad, grad_entropy, _):
    wanted = ctx.needs_input_grad[:2]
    grads = token_logprobs_backward(grad, grad_entropy, *ctx.saved_tensors, ctx.temperature, *wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None


def _second(ctx, *_):
    raise RuntimeError("kernels: the Triton log-probs have no second derivative; use kernels.use('torch') for it")


token_logprobs.register_autograd(_first, setup_context=_setup)
token_logprobs_backward.register_autograd(_second)
