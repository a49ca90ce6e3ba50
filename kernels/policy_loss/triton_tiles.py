"""The Triton kernels of `linear_logprobs`: tiles of logits that live in registers and are never written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(num_blocks, num_columns, GROUP: tl.constexpr):
    """(block, column) of this program: column by column within a group of blocks."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    size = tl.minimum(num_blocks - group * GROUP, GROUP)
    within = program % (GROUP * num_columns)
    return group * GROUP + within % size, within // size


@triton.jit
def _product(
    hidden, lm_head, row, id, rows, vocab, hidden_stride, head_stride, end,
    BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK, TILE]: hidden @ lm_head^T over the dimensions below `end`, a multiple of DEPTH."""
    depth = tl.arange(0, DEPTH)
    left = hidden + row.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    right = lm_head + id.to(tl.int64)[None, :] * head_stride + depth[:, None]
    row_there, id_there = (row < rows)[:, None], (id < vocab)[None, :]
    total = tl.zeros((BLOCK, TILE), tl.float32)
    for _ in range(0, end, DEPTH):
        a = tl.load(left, mask=row_there, other=0.0)
        b = tl.load(right, mask=id_there, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH
    return total


@triton.jit
def _tanh(x):
    """Within 2 ulp: a least-squares polynomial below 9/16, where (1 - e^-2x) / (1 + e^-2x) cancels."""
    square = x * x
    series = -0.00633384
    series = series * square + 0.02112646
    series = series * square - 0.05386913
    series = series * square + 0.13332785
    series = series * square - 0.33333325
    small = tl.exp(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - small, 1.0 + small)
    return tl.where(tl.abs(x) < 0.5625, x + x * square * series, tl.where(x < 0, -far, far))


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> four of [ROWS, COLUMNS / 4], side by side: only one at a time takes further registers."""
    left, right = _halves(x, ROWS, COLUMNS)
    a, b = _halves(left, ROWS, COLUMNS // 2)
    c, d = _halves(right, ROWS, COLUMNS // 2)
    return a, b, c, d


@triton.jit
def _scaled(
    logits, first, bias, allowed, row, rows, vocab, inverse, softcap, allowed_stride,
    WIDTH: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of WIDTH ids from `first` on, a multiple of 32: their numbers; z, -inf for an id that is not there or not
    allowed; whether it is; the slope of z in the logits before the cap."""
    column = tl.arange(0, WIDTH)
    id = first + column
    if BIASED:
        logits += tl.load(bias + id, mask=id < vocab, other=0.0).to(tl.float32)[None, :]
    slope = inverse[:, None]
    if CAPPED:
        bent = _tanh(tl.div_rn(logits, tl.zeros_like(logits) + softcap))
        logits = softcap * bent
        slope = slope * (1.0 - bent * bent)
    z = logits * inverse[:, None]
    there = (id < vocab)[None, :]
    if MASKED:
        word = first // 32 + tl.arange(0, WIDTH // 32)
        place = allowed + row.to(tl.int64)[:, None] * allowed_stride + word[None, :]
        bits = tl.load(place, mask=(row < rows)[:, None] & (word * 32 < vocab)[None, :], other=0)
        bits = tl.reshape(tl.broadcast_to(bits[:, :, None], (row.shape[0], WIDTH // 32, 32)), (row.shape[0], WIDTH))
        there = there & (((bits >> (column % 32)[None, :]) & 1) != 0)
    return id, tl.where(there, z, float("-inf")), there, slope


@triton.jit
def _absorb(
    logits, first, peak, total, moment, chosen, bias, allowed, row, target, rows, vocab, inverse, softcap,
    allowed_stride, WIDTH: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """peak = max z, total = sum e^(z - peak), moment = sum (z - peak) e^(z - peak) and z of the target, with these."""
    id, z, _, _ = _scaled(
        logits, first, bias, allowed, row, rows, vocab, inverse, softcap, allowed_stride, WIDTH, BIASED, CAPPED, MASKED
    )
    chosen += tl.sum(tl.where(id[None, :] == target[:, None], z, 0.0), axis=1)
    higher = tl.maximum(peak, tl.max(z, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    centred = z - base[:, None]
    mass = tl.exp(centred)
    below = tl.maximum(peak - base, -200.0)  # e^-200 is 0, and 0 times it is no NaN
    factor = tl.exp(peak - base)
    moment = (moment + below * total) * factor + tl.sum(tl.maximum(centred, -200.0) * mass, axis=1)
    return higher, total * factor + tl.sum(mass, axis=1), moment, chosen


@triton.jit(do_not_specialize=["rows", "vocab", "allowed_stride", "num_splits", "num_blocks"])
def logprob_partials_kernel(
    hidden, lm_head, bias, targets, temperatures, allowed, partials, picked,
    rows, vocab, hidden_stride, head_stride, allowed_stride, num_splits, num_blocks, softcap,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    block, split = _place(num_blocks, num_splits, GROUP)
    row = block * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    target = tl.load(targets + row, mask=there, other=-1).to(tl.int32)
    end = tl.where(tl.max(target, axis=0) >= 0, DIM, 0)  # a block without targets multiplies nothing
    inverse = tl.div_rn(1.0, tl.load(temperatures + row, mask=there, other=1.0))
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, moment, chosen = (
        tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32),
    )  # fmt: skip
    for first in tl.range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab), TILE, disable_licm=True):
        id = first + tl.arange(0, TILE)
        logits = _product(hidden, lm_head, row, id, rows, vocab, hidden_stride, head_stride, end, BLOCK, TILE, DEPTH)
        parts = _quarters(logits, BLOCK, TILE)
        for part in tl.static_range(4):
            peak, total, moment, chosen = _absorb(
                parts[part], first + part * (TILE // 4), peak, total, moment, chosen, bias, allowed, row, target, rows,
                vocab, inverse, softcap, allowed_stride, TILE // 4, BIASED, CAPPED, MASKED,
            )  # fmt: skip
    out = partials + split.to(tl.int64) * rows + row
    field = num_splits.to(tl.int64) * rows
    tl.store(out, peak, mask=there)
    tl.store(out + field, total, mask=there)
    tl.store(out + 2 * field, moment, mask=there)
    tl.store(picked + row, chosen, mask=there & (target >= 0) & (target // SPLIT == split))


@triton.jit(do_not_specialize=["rows", "num_splits"])
def logprob_reduce_kernel(
    partials, picked, targets, logprobs, logsumexp, entropy, rows, num_splits,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    split = tl.arange(0, SPLITS)
    field = num_splits.to(tl.int64) * rows
    negative = float("-inf")
    peak = tl.full((ROWS,), negative, tl.float32)
    for start in range(0, num_splits, SPLITS):
        place = (start + split).to(tl.int64)[:, None] * rows + row[None, :]
        mask = (start + split < num_splits)[:, None] & there[None, :]
        peak = tl.maximum(peak, tl.max(tl.load(partials + place, mask=mask, other=negative), axis=0))
    base = tl.where(peak == negative, 0.0, peak)
    total, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_splits, SPLITS):
        place = (start + split).to(tl.int64)[:, None] * rows + row[None, :]
        mask = (start + split < num_splits)[:, None] & there[None, :]
        below = tl.load(partials + place, mask=mask, other=negative) - base[None, :]
        factor = tl.exp(below)
        part = tl.load(partials + field + place, mask=mask, other=0.0)
        total += tl.sum(part * factor, axis=0)
        slope = tl.load(partials + 2 * field + place, mask=mask, other=0.0)
        moment += tl.sum((slope + tl.maximum(below, -200.0) * part) * factor, axis=0)

    kept = tl.load(targets + row, mask=there, other=-1) >= 0
    log_total = tl.where(peak == negative, float("nan"), tl.log(total))  # nothing was allowed
    z = tl.load(picked + row, mask=there & kept, other=0.0)
    tl.store(logprobs + row, tl.where(kept, z - peak - log_total, 0.0), mask=there)
    tl.store(logsumexp + row, tl.where(kept, peak + log_total, 0.0), mask=there)
    tl.store(entropy + row, tl.where(kept, log_total - tl.div_rn(moment, total), 0.0), mask=there)


@triton.jit
def _row_slopes(row, there, target, temperatures, logsumexp, entropy, g_logprob, g_logsumexp, g_entropy):
    """Of each row: whether it counts, what its gradient is made of, its log-sum-exp and 1 / temperature.

    d logprob / d z_j = [j = target] - p_j, d logsumexp / d z_j = p_j, d entropy / d z_j = -p_j (log p_j + entropy)
    """
    counts = there & (target >= 0)
    of_target = tl.load(g_logprob + row, mask=counts, other=0.0)
    of_mass = tl.load(g_logsumexp + row, mask=counts, other=0.0) - of_target
    of_entropy = tl.load(g_entropy + row, mask=counts, other=0.0)
    of_mass -= of_entropy * tl.load(entropy + row, mask=counts, other=0.0)
    log_total = tl.load(logsumexp + row, mask=counts, other=float("inf"))  # p = 0 in a row that does not count
    inverse = tl.div_rn(1.0, tl.load(temperatures + row, mask=there, other=1.0))
    return counts, of_target, of_mass, of_entropy, log_total, inverse


@triton.jit
def _gradient(
    logits, first, counts, of_target, of_mass, of_entropy, log_total, inverse, bias, allowed, scale, row, target, rows,
    vocab, softcap, allowed_stride,
    WIDTH: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """By the logits of WIDTH ids from `first` on."""
    id, z, open, slope = _scaled(
        logits, first, bias, allowed, row, rows, vocab, inverse, softcap, allowed_stride, WIDTH, BIASED, CAPPED, MASKED
    )
    if SCALED:
        slope = slope * tl.load(scale)
    log_p = z - log_total[:, None]
    d = tl.exp(log_p) * (of_mass[:, None] - of_entropy[:, None] * tl.maximum(log_p, -200.0))
    d = (d + tl.where(id[None, :] == target[:, None], of_target[:, None], 0.0)) * slope
    d = tl.where(counts[:, None], d, 0.0)  # whatever `hidden` holds in a row that is ignored
    if MASKED:
        d = tl.where(open, d, 0.0)  # a target that is not allowed
    return d


@triton.jit(do_not_specialize=["rows", "vocab", "first_id", "allowed_stride", "num_tiles", "num_blocks"])
def logit_gradients_kernel(
    hidden, lm_head, bias, targets, temperatures, allowed, logsumexp, entropy, g_logprob, g_logsumexp, g_entropy,
    scale, out, rows, vocab, first_id, hidden_stride, head_stride, allowed_stride, out_stride, num_tiles, num_blocks,
    softcap,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    block, tile = _place(num_blocks, num_tiles, GROUP)
    row, column = block * BLOCK + tl.arange(0, BLOCK), tile * TILE
    there = row < rows
    target = tl.load(targets + row, mask=there, other=-1).to(tl.int32)
    end = tl.where(tl.max(target, axis=0) >= 0, DIM, 0)
    id = first_id + column + tl.arange(0, TILE)
    logits = _product(hidden, lm_head, row, id, rows, vocab, hidden_stride, head_stride, end, BLOCK, TILE, DEPTH)
    counts, of_target, of_mass, of_entropy, log_total, inverse = _row_slopes(
        row, there, target, temperatures, logsumexp, entropy, g_logprob, g_logsumexp, g_entropy
    )
    parts = _quarters(logits, BLOCK, TILE)
    for part in tl.static_range(4):
        first = column + part * (TILE // 4)
        d = _gradient(
            parts[part], first_id + first, counts, of_target, of_mass, of_entropy, log_total, inverse, bias, allowed,
            scale, row, target, rows, vocab, softcap, allowed_stride, TILE // 4, BIASED, CAPPED, MASKED, SCALED,
        )  # fmt: skip
        place = out + row.to(tl.int64)[:, None] * out_stride + (first + tl.arange(0, TILE // 4))[None, :]
        tl.store(place, d.to(out.dtype.element_ty), mask=there[:, None])
