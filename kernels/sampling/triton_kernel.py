"""`sample_from_hidden` without truncation, in Triton: the logits of a tile live in registers and are never written.

One program multiplies a block of rows of `hidden` by VOCAB_TILE rows of the LM head and leaves a few numbers a row: the
best score, its id and logit, and what log-softmax, entropy and kept mass need of the tile. A second kernel adds up the
tiles, always in the same order. Every number depends on its row and its tile alone, so that neither the batch nor the
order in which programs run changes a bit.

Philox gives the noise of four ids at once, and a thread of a matrix instruction holds columns c, c + 1, c + 8, c + 9 of
sixteen: the LM head's rows are read in the order that makes these four neighbours (`_id_of_column`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from foveate.kernels.targets import TritonTarget

VOCAB_TILE = 128  # ids a program scores at once; fixed, as the order of the sums is
REDUCE_ROWS, REDUCE_TILES = 8, 128
# Of a (tile, row): best score, its logit, peak, total, moment; with masks also peak and total of what is allowed,
# total and peak of what is lost.
NUM_FIELDS, NUM_MASKED_FIELDS = 5, 9


class _Shape(NamedTuple):
    """Rows of a program and hidden dimensions at once; for every batch the same, as a product's bits depend on them."""

    block: int
    depth: int
    num_warps: int
    num_stages: int


# float32 has no matrix instruction of full precision. None spills on sm_80, sm_90, sm_100.
_MATRIX, _FLOAT32 = _Shape(64, 64, 8, 3), _Shape(32, 32, 8, 2)


@triton.jit
def _log1p(x):
    """Kahan's way: the rounding of 1 + x is made good by the quotient. x > -1, of any shape."""
    one = 1.0 + x
    exact = one == 1.0
    return tl.where(exact, x, tl.log(one) * tl.div_rn(x, tl.where(exact, 1.0, one - 1.0)))


@triton.jit
def _gumbel(word):
    """The noise of a word of Philox (`foveate.kernels.sampling`), in fp32."""
    complement = word ^ 0xFFFFFFFF
    near = _log1p(-(complement.to(tl.float32) + 0.5) * 2.3283064365386963e-10)  # 2^-32
    far = tl.log((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    return -tl.log(-tl.where(complement < 0x80000000, near, far))


@triton.jit
def _id_of_column(column):
    """Column 16 j + 8 f + 2 q + e of a tile holds id 16 j + 4 q + 2 f + e."""
    return column // 16 * 16 + column % 8 // 2 * 4 + column % 16 // 8 * 2 + column % 2


@triton.jit
def _lanes(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> four of [ROWS, COLUMNS / 4]: entry j of lane l belongs to id 4 j + l."""
    split = tl.permute(tl.reshape(tile, (ROWS, COLUMNS // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    even, odd = tl.split(tl.reshape(split, (ROWS, COLUMNS // 4, 2, 2)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    return zero, one, two, three


@triton.jit
def _scaled(logit, divisor, outside, TEMPERED: tl.constexpr):
    z = tl.div_rn(logit, tl.broadcast_to(divisor, logit.shape)) if TEMPERED else logit
    return tl.where(outside, float("-inf"), z)


@triton.jit
def _score(z, word, greedy, is_open):
    """z + noise, z itself for a greedy row, -inf for an id that cannot be drawn."""
    return tl.where(is_open & (z > float("-inf")), tl.where(greedy, z, z + _gumbel(word)), float("-inf"))


@triton.jit
def _peak(a, b, c, d):
    return tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), axis=1)


@triton.jit
def _mass(a, b, c, d, peak):
    """Sum over a row of e^(z - peak), 0 where all is -inf."""
    base = tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    return tl.sum(tl.exp(a - base) + tl.exp(b - base) + tl.exp(c - base) + tl.exp(d - base), axis=1)


@triton.jit
def _moment(z, base):
    centred = tl.maximum(z - base, -200.0)
    return centred * tl.exp(z - base)


@triton.jit
def _best(score, z, id, best_score, best_z, best_id):
    """The better of two, of equals the one that was there."""
    wins = score > best_score
    return tl.where(wins, score, best_score), tl.where(wins, z, best_z), tl.where(wins, id, best_id)


@triton.jit
def _product(
    hidden, lm_head, row, tile, rows, vocab, hidden_stride, head_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK, TILE]: logits, columns in the order of `_id_of_column`."""
    depth = tl.arange(0, DEPTH)
    id = _id_of_column(tl.arange(0, TILE))
    left = hidden + row.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    right = lm_head + tile.to(tl.int64) * TILE * head_stride + id[None, :] * head_stride + depth[:, None]
    row_there, id_there = (row < rows)[:, None], (tile * TILE + id < vocab)[None, :]
    total = tl.zeros((BLOCK, TILE), tl.float32)
    for start in range(0, DIM, DEPTH):
        if DIM % DEPTH == 0:
            a = tl.load(left + start, mask=row_there, other=0.0)
            b = tl.load(right + start, mask=id_there, other=0.0)
        else:
            inside = start + depth < DIM
            a = tl.load(left + start, mask=row_there & inside[None, :], other=0.0)
            b = tl.load(right + start, mask=id_there & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def sample_tiles_kernel(
    hidden, lm_head, bias, temperature, seeds, steps, allowed, partials, best_ids,
    rows, vocab, hidden_stride, head_stride, allowed_stride, num_tiles, num_blocks,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    TEMPERED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for work in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        tile = work // num_blocks  # the blocks of one tile run side by side, and share its weights in the L2 cache
        row = work % num_blocks * BLOCK + tl.arange(0, BLOCK)
        there = row < rows
        logits = _product(hidden, lm_head, row, tile, rows, vocab, hidden_stride, head_stride, DIM, BLOCK, TILE, DEPTH)
        if BIASED:
            id = tile * TILE + _id_of_column(tl.arange(0, TILE))
            logits += tl.load(bias + id, mask=id < vocab, other=0.0).to(tl.float32)[None, :]

        t = tl.load(temperature + row, mask=there, other=1.0)[:, None]
        greedy = t == 0.0
        divisor = tl.where(greedy, 1.0, t)
        quad = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        id = 4 * quad[None, :]
        a, b, c, d = _lanes(logits, BLOCK, TILE)
        a = _scaled(a, divisor, id >= vocab, TEMPERED)
        b = _scaled(b, divisor, id + 1 >= vocab, TEMPERED)
        c = _scaled(c, divisor, id + 2 >= vocab, TEMPERED)
        d = _scaled(d, divisor, id + 3 >= vocab, TEMPERED)

        bits = tl.full((BLOCK, TILE // 4), 15, tl.int32)
        if MASKED:
            word = row.to(tl.int64)[:, None] * allowed_stride + (quad // 8)[None, :]
            mask = tl.load(allowed + word, mask=there[:, None] & (id < vocab), other=0)
            bits = (mask >> (quad % 8 * 4)[None, :]) & 15

        seed = tl.load(seeds + row, mask=there, other=0)[:, None]
        step = tl.load(steps + row, mask=there, other=0).to(tl.uint32, bitcast=False)[:, None]
        counter = tl.broadcast_to(quad.to(tl.uint32)[None, :], (BLOCK, TILE // 4))
        zero = tl.zeros((BLOCK, TILE // 4), tl.uint32)
        w, x, y, z = tl.philox(seed, counter, step + zero, zero, zero)
        score, logit, best = _score(a, w, greedy, (bits & 1) != 0), a, id + tl.zeros((BLOCK, TILE // 4), tl.int32)
        score, logit, best = _best(_score(b, x, greedy, (bits & 2) != 0), b, id + 1, score, logit, best)
        score, logit, best = _best(_score(c, y, greedy, (bits & 4) != 0), c, id + 2, score, logit, best)
        score, logit, best = _best(_score(d, z, greedy, (bits & 8) != 0), d, id + 3, score, logit, best)
        top = tl.max(score, axis=1)
        first = tl.min(tl.where(score == top[:, None], best, 0x7FFFFFFF), axis=1)

        peak = _peak(a, b, c, d)
        base = tl.where(peak == float("-inf"), 0.0, peak)[:, None]
        out = partials + tile.to(tl.int64) * rows + row
        field = num_tiles.to(tl.int64) * rows
        tl.store(best_ids + tile.to(tl.int64) * rows + row, first, mask=there)
        tl.store(out, top, mask=there)
        chosen = tl.where(best == first[:, None], logit, float("-inf"))
        tl.store(out + field, tl.max(chosen, axis=1), mask=there)
        tl.store(out + 2 * field, peak, mask=there)
        tl.store(out + 3 * field, _mass(a, b, c, d, peak), mask=there)
        moment = _moment(a, base) + _moment(b, base) + _moment(c, base) + _moment(d, base)
        tl.store(out + 4 * field, tl.sum(moment, axis=1), mask=there)
        if MASKED:
            e, f = tl.where((bits & 1) != 0, a, float("-inf")), tl.where((bits & 2) != 0, b, float("-inf"))
            g, h = tl.where((bits & 4) != 0, c, float("-inf")), tl.where((bits & 8) != 0, d, float("-inf"))
            allowed_peak = _peak(e, f, g, h)
            tl.store(out + 5 * field, allowed_peak, mask=there)
            tl.store(out + 6 * field, _mass(e, f, g, h, allowed_peak), mask=there)
            e, f = tl.where((bits & 1) != 0, float("-inf"), a), tl.where((bits & 2) != 0, float("-inf"), b)
            g, h = tl.where((bits & 4) != 0, float("-inf"), c), tl.where((bits & 8) != 0, float("-inf"), d)
            tl.store(out + 7 * field, _mass(e, f, g, h, peak), mask=there)
            tl.store(out + 8 * field, _peak(e, f, g, h), mask=there)


@triton.jit
def sample_reduce_kernel(
    partials, best_ids, token_ids, values, rows,
    NUM_TILES: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    tile = tl.arange(0, TILES)
    field = rows.to(tl.int64) * NUM_TILES
    negative = float("-inf")
    best, id, logit = (
        tl.full((ROWS,), negative, tl.float32),
        tl.full((ROWS,), 0x7FFFFFFF, tl.int32),
        tl.full((ROWS,), negative, tl.float32),
    )
    peak, allowed_peak, lost_peak = best, best, best
    for start in range(0, NUM_TILES, TILES):
        place = (start + tile)[:, None] * rows + row[None, :]
        mask = (start + tile < NUM_TILES)[:, None] & there[None, :]
        score = tl.load(partials + place, mask=mask, other=negative)
        ids = tl.load(best_ids + place, mask=mask, other=0x7FFFFFFF)
        top = tl.max(score, axis=0)
        first = tl.min(tl.where(score == top[None, :], ids, 0x7FFFFFFF), axis=0)
        z = tl.load(partials + field + place, mask=mask, other=negative)
        chosen = tl.max(tl.where(ids == first[None, :], z, negative), axis=0)
        best, logit, id = _best(top, chosen, first, best, logit, id)  # earlier tiles have the lower ids
        peak = tl.maximum(peak, tl.max(tl.load(partials + 2 * field + place, mask=mask, other=negative), axis=0))
        if MASKED:
            part = tl.load(partials + 5 * field + place, mask=mask, other=negative)
            allowed_peak = tl.maximum(allowed_peak, tl.max(part, axis=0))
            part = tl.load(partials + 8 * field + place, mask=mask, other=negative)
            lost_peak = tl.maximum(lost_peak, tl.max(part, axis=0))

    base = tl.where(peak == negative, 0.0, peak)[None, :]
    allowed_base = tl.where(allowed_peak == negative, 0.0, allowed_peak)[None, :]
    total, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    kept, lost = total, total
    for start in range(0, NUM_TILES, TILES):
        place = (start + tile)[:, None] * rows + row[None, :]
        mask = (start + tile < NUM_TILES)[:, None] & there[None, :]
        part_peak = tl.load(partials + 2 * field + place, mask=mask, other=negative)
        below = tl.maximum(part_peak - base, -200.0)
        factor = tl.exp(part_peak - base)
        part = tl.load(partials + 3 * field + place, mask=mask, other=0.0)
        total += tl.sum(part * factor, axis=0)
        slope = tl.load(partials + 4 * field + place, mask=mask, other=0.0)
        moment += tl.sum((slope + below * part) * factor, axis=0)
        if MASKED:
            lost += tl.sum(tl.load(partials + 7 * field + place, mask=mask, other=0.0) * factor, axis=0)
            part_peak = tl.load(partials + 5 * field + place, mask=mask, other=negative)
            part = tl.load(partials + 6 * field + place, mask=mask, other=0.0)
            kept += tl.sum(part * tl.exp(part_peak - allowed_base), axis=0)

    log_total = tl.log(total)
    valid = (tl.abs(peak) < float("inf")) & (total == total) & (best > negative)
    log_kept = tl.zeros((ROWS,), tl.float32)
    if MASKED:
        share = tl.div_rn(lost, total)
        left = allowed_peak - peak + (tl.log(kept) - log_total)
        log_kept = tl.where(share > 0.5, left, _log1p(-tl.minimum(share, 0.5)))
        # A loss that rounds to nothing is still a loss.
        log_kept = tl.where(lost_peak > negative, tl.minimum(log_kept, -1.1754943508222875e-38), 0.0)
    nan = float("nan")
    tl.store(token_ids + row, tl.where(valid, id, -1).to(tl.int64), mask=there)
    tl.store(values + row, tl.where(valid, logit - peak - log_total, nan), mask=there)
    tl.store(values + rows + row, tl.where(valid, log_kept, nan), mask=there)
    tl.store(values + 2 * rows + row, tl.where(valid, log_total - tl.div_rn(moment, total), nan), mask=there)


def sample_from_hidden(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    allowed: torch.Tensor | None,
    token_ids: torch.Tensor,
    values: torch.Tensor,
    tempered: bool = True,
) -> None:
    """hidden: [N, D], lm_head: [V, D], contiguous in D. bias: [V] or None. temperature: float32 [N]; tempered: False if
    all are 0 or 1. seeds, steps: int64 [N]. allowed: int32 [1 or N, ceil(V / 32)] or None. token_ids: int64 [N],
    values: float32 [3, N], written."""
    (rows, dim), vocab = hidden.shape, len(lm_head)
    if rows == 0:
        return
    shape = _FLOAT32 if hidden.dtype == torch.float32 else _MATRIX
    num_tiles, num_blocks = triton.cdiv(vocab, VOCAB_TILE), triton.cdiv(rows, shape.block)
    num_fields = NUM_FIELDS if allowed is None else NUM_MASKED_FIELDS
    partials = hidden.new_empty((num_fields, num_tiles, rows), dtype=torch.float32)
    best_ids = hidden.new_empty((num_tiles, rows), dtype=torch.int32)
    work = num_tiles * num_blocks
    with torch.cuda.device_of(hidden):
        sample_tiles_kernel[(min(work, _num_programs(hidden.device)),)](
            hidden, lm_head, bias, temperature, seeds, steps, allowed, partials, best_ids,
            rows, vocab, hidden.stride(0), lm_head.stride(0),
            allowed.stride(0) if allowed is not None and len(allowed) > 1 else 0, num_tiles, num_blocks,
            DIM=dim, BLOCK=shape.block, TILE=VOCAB_TILE, DEPTH=shape.depth,
            TEMPERED=tempered, BIASED=bias is not None, MASKED=allowed is not None,
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
        sample_reduce_kernel[(triton.cdiv(rows, REDUCE_ROWS),)](
            partials, best_ids, token_ids, values, rows,
            NUM_TILES=num_tiles, ROWS=REDUCE_ROWS, TILES=REDUCE_TILES, MASKED=allowed is not None, num_warps=4,
        )  # fmt: skip


def _num_programs(device: torch.device) -> int:
    """As many as run at once; in the interpreter there is no such thing."""
    if device.type != "cuda":
        return 1 << 30
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _targets() -> list[TritonTarget]:
    """Masked is the larger kernel; the dimension counts only by whether DEPTH divides it."""
    targets = []
    for dtype, dim, masked in (
        ("bf16", 2048, False), ("bf16", 2048, True), ("bf16", 1000, True), ("fp16", 2048, True), ("fp32", 2048, True),
    ):  # fmt: skip
        shape = _FLOAT32 if dtype == "fp32" else _MATRIX
        signature = {"hidden": f"*{dtype}", "lm_head": f"*{dtype}", "temperature": "*fp32", "seeds": "*i64"}
        signature |= {"steps": "*i64", "partials": "*fp32", "best_ids": "*i32"}
        sizes = ("rows", "vocab", "hidden_stride", "head_stride", "allowed_stride", "num_tiles", "num_blocks")
        signature |= dict.fromkeys(sizes, "i32")
        constants: dict[str, Any] = {"DIM": dim, "BLOCK": shape.block, "TILE": VOCAB_TILE, "DEPTH": shape.depth}
        constants |= {"TEMPERED": True, "BIASED": False, "MASKED": masked, "bias": None}
        if masked:
            signature["allowed"] = "*i32"
        else:
            constants["allowed"] = None
        name = f"sample_tiles_{dtype}_{dim}{'_masked' if masked else ''}"
        options: dict[str, Any] = dict(num_warps=shape.num_warps, num_stages=shape.num_stages, matrix=dtype != "fp32")
        divisible = ("hidden_stride", "head_stride")
        targets.append(TritonTarget(name, sample_tiles_kernel, signature, constants, divisible, **options))
    signature = {"partials": "*fp32", "best_ids": "*i32", "token_ids": "*i64", "values": "*fp32", "rows": "i32"}
    constants = {"NUM_TILES": 1187, "ROWS": REDUCE_ROWS, "TILES": REDUCE_TILES, "MASKED": True}
    targets.append(TritonTarget("sample_reduce_masked", sample_reduce_kernel, signature, constants))
    return targets


TARGETS = _targets()
