"""The kernels behind `foveate.kernels.policy_loss.triton_loss`: what a token, a sequence and a batch add to the loss.

The names of columns and sums are those of METRICS and of `triton_loss`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveate.kernels.policy_loss.reference.loss import MAX_LOG_RATIO

LIMIT: tl.constexpr = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _exp(x):
    """e^x to an ulp, within the normal numbers: the instruction rounds x log2(e), which costs |x| ulp."""
    x = _clamp(x, -87.0, 88.0)
    power = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = x - power * 0.693359375 + power * 2.12194440e-4  # ln 2 in two parts: the first product is exact
    series = 1.0 + rest * (1.0 / 7.0)
    series = 1.0 + rest * (1.0 / 6.0) * series
    series = 1.0 + rest * (1.0 / 5.0) * series
    series = 1.0 + rest * (1.0 / 4.0) * series
    series = 1.0 + rest * (1.0 / 3.0) * series
    series = 1.0 + rest * 0.5 * series
    series = 1.0 + rest * series
    exponent = tl.where(power == power, power, 0.0).to(tl.int32) + 127
    return series * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp_minus_line(x):
    """e^x - 1 - x, to a few ulp: below 1 in magnitude by its series."""
    tail = 1.0 + x * (1.0 / 12.0)
    tail = 1.0 + x * (1.0 / 11.0) * tail
    tail = 1.0 + x * (1.0 / 10.0) * tail
    tail = 1.0 + x * (1.0 / 9.0) * tail
    tail = 1.0 + x * (1.0 / 8.0) * tail
    tail = 1.0 + x * (1.0 / 7.0) * tail
    tail = 1.0 + x * (1.0 / 6.0) * tail
    tail = 1.0 + x * (1.0 / 5.0) * tail
    tail = 1.0 + x * (1.0 / 4.0) * tail
    tail = 1.0 + x * (1.0 / 3.0) * tail
    near = 0.5 * x * x * tail
    return tl.where((x < 1.0) & (x > -1.0), near, _exp(x) - 1.0 - x)


@triton.jit
def _token_factor(mismatch, low, high, CORRECTION: tl.constexpr):
    """The correction that a token has by itself; 1 where the sequence has it."""
    if CORRECTION == "tis":
        factor = _clamp(_exp(_clamp(mismatch, -LIMIT, LIMIT)), 0.0, high)
    elif CORRECTION == "mis":
        weight = _exp(_clamp(mismatch, -LIMIT, LIMIT))
        factor = tl.where((weight < low) | (weight > high), 0.0, weight)
    else:
        factor = tl.full(mismatch.shape, 1.0, tl.float32)
    return factor


@triton.jit
def _largest(values):
    """The largest of numbers >= 0, NaN if one of them is: `tl.max` leaves NaN out."""
    total = tl.sum(values, axis=0)
    return tl.where(total == total, tl.max(values, axis=0), total)


@triton.jit
def run_kernel(sequence_ids, starts, ends, count, num_sequences, BLOCK: tl.constexpr):
    """Where each sequence's tokens begin and end; both stay 0 for one without tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < count
    id = tl.load(sequence_ids + token, mask=there, other=-1)
    before = tl.load(sequence_ids + token - 1, mask=there & (token > 0), other=-1)
    after = tl.load(sequence_ids + token + 1, mask=token + 1 < count, other=-1)
    valid = there & (id >= 0) & (id < num_sequences)
    tl.store(starts + id, token, mask=valid & (id != before))
    tl.store(ends + id, token + 1, mask=valid & (id != after))


@triton.jit
def sequence_kernel(
    logprobs, old, rollout, sequence_ids, active, advantages, starts, ends, sums,
    correction_low, correction_high, rejection_low, rejection_high, off_policy_limit,
    HAS_OLD: tl.constexpr, CORRECTION: tl.constexpr, REJECTION: tl.constexpr, OFF_POLICY: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    start, end = tl.load(starts + sequence), tl.load(ends + sequence)
    column = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    length, ratio, mismatch_sum, k3, gap, factors = zero, zero, zero, zero, zero, zero
    for first in range(start, end, BLOCK):
        token = first + column
        there = token < end
        broken = there & (tl.load(sequence_ids + token, mask=there, other=0) != sequence)
        kept = there & (tl.load(active + token, mask=there, other=0) != 0)
        logprob = tl.load(logprobs + token, mask=kept, other=0.0)
        before = tl.load(old + token, mask=kept, other=0.0) if HAS_OLD else logprob
        length += tl.where(broken, float("nan"), tl.where(kept, 1.0, 0.0))
        ratio += logprob - before
        if HAS_ROLLOUT:
            drawn = tl.load(rollout + token, mask=kept, other=0.0)
            mismatch = before - drawn
            mismatch_sum += mismatch
            gap += drawn - logprob
            k3 += _exp_minus_line(_clamp(mismatch, -LIMIT, LIMIT))
            factors += tl.where(kept, _token_factor(mismatch, correction_low, correction_high, CORRECTION), 0.0)
    count = tl.sum(length, axis=0)
    divisor = tl.where(count < 1.0, 1.0, count)  # NaN stays NaN
    factor = divisor * 0.0 + 1.0
    mean_factor = factor
    if HAS_ROLLOUT:
        product = _exp(_clamp(tl.sum(mismatch_sum, axis=0), -LIMIT, LIMIT))
        if CORRECTION == "tis_sequence":
            factor = _clamp(product, 0.0, correction_high)
        if CORRECTION == "mis_sequence":
            factor = tl.where((product < correction_low) | (product > correction_high), 0.0, product)
        if REJECTION is not None:
            if REJECTION == "geometric":
                statistic = _exp(_clamp(tl.div_rn(tl.sum(mismatch_sum, axis=0), divisor), -LIMIT, LIMIT))
            else:
                statistic = tl.div_rn(tl.sum(k3, axis=0), divisor)
            outside = (statistic < rejection_low) | (statistic > rejection_high)
            factor = tl.where(outside, 0.0, factor + 0.0 * statistic)
        if OFF_POLICY:
            mean_gap = tl.div_rn(tl.sum(gap, axis=0), divisor)
            outside = (tl.load(advantages + sequence) < 0.0) & (mean_gap > off_policy_limit)
            factor = tl.where(outside, 0.0, factor + 0.0 * mean_gap)
        mean_factor = tl.where(factor == 0.0, 0.0, factor * tl.div_rn(tl.sum(factors, axis=0), divisor))
    out = sums + sequence * NUM_SUMS
    tl.store(out, count)
    tl.store(out + 1, tl.div_rn(tl.sum(ratio, axis=0), divisor))
    tl.store(out + 2, factor)
    tl.store(out + 3, mean_factor)


@triton.jit
def _policy_term(
    ratio, logprob, advantage, floor, ceiling, dual_clip, delta, tau_pos, tau_neg, SURROGATE: tl.constexpr
):
    """-> loss, its derivative by log ratio (by the log-prob for cispo), and where each bound binds."""
    low, high = ratio < floor, ratio > ceiling
    dual = low & high  # nowhere
    clipped = _clamp(ratio, floor, ceiling)
    if SURROGATE == "clip":
        negative, positive = advantage < 0.0, advantage > 0.0
        over = ratio > delta
        first, second = -advantage * tl.where(over, delta, ratio), -advantage * clipped
        loss = tl.where(first > second, first, second)
        stopped = tl.where(first > second, over, low | high)
        limit = -advantage * dual_clip
        bound = negative & (loss > limit)
        loss = tl.where(bound, limit, loss)
        slope = tl.where(stopped | bound, 0.0, -advantage * ratio)
        low, high, dual = negative & low, positive & high, bound | (negative & over)
    elif SURROGATE == "sapo":
        tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
        gate = tl.div_rn(1.0, 1.0 + _exp(-tau * (ratio - 1.0)))
        loss = -tl.div_rn(gate * 4.0, tau) * advantage
        slope = -4.0 * gate * (1.0 - gate) * ratio * advantage
    else:
        slope = -clipped * advantage
        loss = slope * logprob
    return loss, slope, low, high, dual


@triton.jit
def loss_kernel(
    logprobs, entropy, old, rollout, ref, sequence_ids, active, advantages, starts, ends, sums, scale,
    d_logprobs, d_entropy, partials, count, num_sequences,
    floor, ceiling, dual_clip, delta, tau_pos, tau_neg, entropy_coef, kl_coef, correction_low, correction_high,
    SURROGATE: tl.constexpr, RATIO: tl.constexpr, KL_KIND: tl.constexpr, KL_STRAIGHT: tl.constexpr,
    KL_WEIGHTED: tl.constexpr, CORRECTION: tl.constexpr, BY_SEQUENCE: tl.constexpr, HAS_SUMS: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_ROLLOUT: tl.constexpr, HAS_REF: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    NUM_SUMS: tl.constexpr, NUM_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = program * BLOCK + tl.arange(0, BLOCK)
    there = token < count
    kept = there & (tl.load(active + token, mask=there, other=0) != 0)
    id = tl.load(sequence_ids + token, mask=kept, other=0)
    valid = kept & (id >= 0) & (id < num_sequences)
    logprob = tl.load(logprobs + token, mask=kept, other=0.0)
    nats = tl.load(entropy + token, mask=kept, other=0.0)
    before = tl.load(old + token, mask=kept, other=0.0) if HAS_OLD else logprob
    advantage = tl.load(advantages + id, mask=valid, other=float("nan"))
    difference = logprob - before
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    factor, mean_factor = weight, weight
    if HAS_SUMS:
        place = sums + id * NUM_SUMS
        run = (token >= tl.load(starts + id, mask=valid, other=0)) & (token < tl.load(ends + id, mask=valid, other=0))
        weight = tl.where(run, weight, float("nan"))
        if BY_SEQUENCE:
            length = tl.load(place, mask=valid, other=1.0)
            weight = tl.div_rn(weight, tl.where(length < 1.0, 1.0, length))
        if RATIO != "token":
            difference = tl.load(place + 1, mask=valid, other=float("nan"))
        factor = tl.load(place + 2, mask=valid, other=1.0)
        mean_factor = tl.load(place + 3, mask=valid, other=1.0)
    free = (difference >= -LIMIT) & (difference <= LIMIT)
    ratio = _exp(_clamp(difference, -LIMIT, LIMIT))
    policy, slope, low, high, dual = _policy_term(
        ratio, logprob, advantage, floor, ceiling, dual_clip, delta, tau_pos, tau_neg, SURROGATE
    )  # fmt: skip
    if SURROGATE != "cispo":
        slope = tl.where(free | (difference != difference), slope, 0.0)
    mismatch = tl.zeros((BLOCK,), tl.float32)
    if HAS_ROLLOUT:
        mismatch = before - tl.load(rollout + token, mask=kept, other=0.0)
        own = _token_factor(mismatch, correction_low, correction_high, CORRECTION)
        factor = tl.where((factor == 0.0) | (own == 0.0), 0.0, factor * own)
        mismatch = _clamp(mismatch, -LIMIT, LIMIT)
    policy = tl.where(factor == 0.0, 0.0, policy * factor)
    share = mean_factor if RATIO == "sequence" else factor
    slope = tl.where(share == 0.0, 0.0, slope * share)
    kl = tl.zeros((BLOCK,), tl.float32)
    if HAS_REF:
        distance = logprob - tl.load(ref + token, mask=kept, other=0.0)
        inside = (distance >= -LIMIT) & (distance <= LIMIT)
        d = _clamp(distance, -LIMIT, LIMIT)
        curve = _exp_minus_line(-d)
        if KL_KIND == "k1":
            kl, kl_slope = d, tl.full((BLOCK,), 1.0, tl.float32)
        elif KL_KIND == "k2":
            kl, kl_slope = 0.5 * d * d, d
        else:
            kl, kl_slope = curve, d - curve
        kl_slope = d if KL_STRAIGHT else tl.where(inside | (d != d), kl_slope, 0.0)
        if KL_WEIGHTED:
            kl_slope = kl_slope * ratio + tl.where(free | (difference != difference), kl * ratio, 0.0)
            kl = kl * ratio
        slope += kl_coef * kl_slope
    by_weight = weight * tl.load(scale)
    tl.store(d_logprobs + token, tl.where(kept, slope * by_weight, 0.0), mask=there)
    if HAS_ENTROPY:
        tl.store(d_entropy + token, tl.where(kept, -entropy_coef * by_weight, 0.0), mask=there)
    value = weight * (policy + kl_coef * kl - entropy_coef * nats)
    raw = _exp(mismatch)
    size = tl.abs(mismatch)
    out = partials + program * NUM_COLUMNS
    tl.store(out + 0, tl.sum(tl.where(kept, 1.0, 0.0), axis=0))
    tl.store(out + 1, tl.sum(tl.where(kept & low, 1.0, 0.0), axis=0))
    tl.store(out + 2, tl.sum(tl.where(kept & high, 1.0, 0.0), axis=0))
    tl.store(out + 3, tl.sum(tl.where(kept & dual, 1.0, 0.0), axis=0))
    tl.store(out + 4, tl.sum(tl.where(kept & (factor == 0.0), 1.0, 0.0), axis=0))
    tl.store(out + 5, tl.sum(tl.where(kept, ratio, 0.0), axis=0))
    tl.store(out + 6, tl.sum(tl.where(kept, nats, 0.0), axis=0))
    tl.store(out + 7, tl.sum(tl.where(kept, kl, 0.0), axis=0))
    tl.store(out + 8, tl.sum(tl.where(kept, factor, 0.0), axis=0))
    tl.store(out + 9, tl.sum(tl.where(kept, -mismatch, 0.0), axis=0))
    tl.store(out + 10, tl.sum(tl.where(kept, _exp_minus_line(mismatch), 0.0), axis=0))
    tl.store(out + 11, tl.sum(tl.where(kept, size, 0.0), axis=0))
    tl.store(out + 12, tl.sum(tl.where(kept, raw, 0.0), axis=0))
    tl.store(out + 13, tl.sum(tl.where(kept, raw * raw, 0.0), axis=0))
    tl.store(out + 14, _largest(tl.where(kept, ratio, 0.0)))
    tl.store(out + 15, _largest(tl.where(kept, size, 0.0)))
    tl.store(out + 16, tl.sum(tl.where(kept, value, 0.0), axis=0))


@triton.jit
def total_kernel(
    partials, denominator, loss, metrics, rows,
    NUM_COLUMNS: tl.constexpr, NUM_MAXIMA: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column, row = tl.arange(0, TILE), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, TILE), tl.float64)
    largest = tl.zeros((ROWS, TILE), tl.float64)
    for first in range(0, rows, ROWS):
        inside = (first + row < rows)[:, None] & (column < NUM_COLUMNS)[None, :]
        places = (first + row)[:, None] * NUM_COLUMNS + column[None, :]
        value = tl.load(partials + places, mask=inside, other=0.0).to(tl.float64)
        total += value
        largest = tl.where(value > largest, value, largest)
    sums = tl.sum(total, axis=0)
    last: tl.constexpr = NUM_COLUMNS - 1
    maximum = (column >= last - NUM_MAXIMA) & (column < last)
    maximum = maximum & (sums == sums)  # NaN is in the sum, but left out of the largest
    tl.store(metrics + column, tl.where(maximum, tl.max(largest, axis=0), sums), mask=column < last)
    whole = tl.sum(tl.where(column == last, sums, 0.0), axis=0)
    tl.store(loss, (whole / tl.load(denominator)).to(tl.float32))
