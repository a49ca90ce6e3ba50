"""Log-probs and gradients in one pass, in Triton: the logits of some tokens are written once, and read twice.

The library multiplies a part of the tokens by the LM head, in float32. `row_partials_kernel`, a program a row and SPLIT
ids, and the reduction of `linear_logprobs` make log-prob, log-sum-exp and entropy of it; when the loss has said what
these are worth, `row_gradients_kernel` writes the gradients of the logits in the inputs' dtype. Those of a block of
parts are multiplied at once, so that the gradient of the LM head, which has to be read and written with each product,
is so seldom. Logits and their gradients take CHUNK_BYTES, however many tokens there are. Nothing is atomic.

A block is as many tokens as fit, a multiple of STEP and at least STEP, whatever there is to do: which tokens are
multiplied at once does not depend on how many follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from foveate.kernels.policy_loss.arguments import IGNORE
from foveate.kernels.policy_loss.triton_products import add_product, multiply, operands, scale_of, times
from foveate.kernels.policy_loss.triton_tiles import (
    _absorb,
    _gradient,
    _row_slopes,
    logprob_reduce_kernel,
)
from foveate.kernels.targets import TritonTarget

CHUNK_BYTES = 1 << 31  # of logits and their gradients held at a time
STEP = 512  # tokens: of a block a multiple, whose parts begin at multiples of 16
PARTS = 4  # of a block of bfloat16: of so much there are logits in float32 beside the gradients
TILE, SPLIT = 2048, 16384  # ids of a program at once, and of a partial: fixed, as the order of the sums is
REDUCE_ROWS, REDUCE_SPLITS = 16, 64
NUM_FIELDS = 3  # of a partial: peak, total, moment
WIDTH_MULTIPLE = 16  # of a row of logits, so that each begins at 16 bytes


@triton.jit(do_not_specialize=["rows", "vocab", "allowed_stride", "num_splits"])
def row_partials_kernel(
    logits, bias, targets, temperatures, allowed, partials, picked,
    rows, vocab, logits_stride, allowed_stride, num_splits, softcap,
    TILE: tl.constexpr, SPLIT: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % num_splits
    row = program // num_splits + tl.arange(0, 1)
    target = tl.load(targets + row).to(tl.int32)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, vocab)
    end = tl.where(tl.load(targets + program // num_splits) >= 0, end, start)  # a row without target is not read
    inverse = tl.div_rn(1.0, tl.load(temperatures + row))
    peak = tl.full((1,), float("-inf"), tl.float32)
    total, moment, chosen = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for first in range(start, end, TILE):
        id = first + tl.arange(0, TILE)
        place = logits + row.to(tl.int64)[:, None] * logits_stride + id[None, :]
        tile = tl.load(place, mask=(id < logits_stride)[None, :], other=0.0)
        peak, total, moment, chosen = _absorb(
            tile, first, peak, total, moment, chosen, bias, allowed, row, target, rows, vocab, inverse, softcap,
            allowed_stride, TILE, BIASED, CAPPED, MASKED,
        )  # fmt: skip
    out = partials + split.to(tl.int64) * rows + row
    field = num_splits.to(tl.int64) * rows
    tl.store(out, peak)
    tl.store(out + field, total)
    tl.store(out + 2 * field, moment)
    tl.store(picked + row, chosen, mask=(target >= 0) & (target // SPLIT == split))


@triton.jit(do_not_specialize=["rows", "vocab", "allowed_stride", "num_tiles"])
def row_gradients_kernel(
    logits, bias, targets, temperatures, allowed, logsumexp, entropy, g_logprob, g_logsumexp, g_entropy, scale, out,
    rows, vocab, logits_stride, allowed_stride, out_stride, num_tiles, softcap,
    TILE: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`out` may be `logits`: a program reads its tile before it writes it. Both are as wide as their stride."""
    program = tl.program_id(0)
    row = program // num_tiles + tl.arange(0, 1)
    first = program % num_tiles * TILE
    target = tl.load(targets + row).to(tl.int32)
    counts, of_target, of_mass, of_entropy, log_total, inverse = _row_slopes(
        row, row < rows, target, temperatures, logsumexp, entropy, g_logprob, g_logsumexp, g_entropy
    )
    id = first + tl.arange(0, TILE)
    there = (id < logits_stride)[None, :]  # by 16 bytes at once, which a bound by `vocab` would not allow
    place = row.to(tl.int64)[:, None]
    tile = tl.load(logits + place * logits_stride + id[None, :], mask=there & counts[:, None], other=0.0)
    d = _gradient(
        tile, first, counts, of_target, of_mass, of_entropy, log_total, inverse, bias, allowed, scale, row, target,
        rows, vocab, softcap, allowed_stride, TILE, BIASED, CAPPED, MASKED, SCALED,
    )  # fmt: skip
    tl.store(out + place * out_stride + id[None, :], d.to(out.dtype.element_ty), mask=there)


def with_gradients(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    softcap: float | None,
    allowed: torch.Tensor | None,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    slopes: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Fills log-probs and entropies, float32 [N], and returns the gradients of hidden, lm_head and bias in float32.

    The first seven as `triton_kernel.forward` takes them. slopes: called when those of a further part are filled; the
    derivatives of what is minimised by log-probs and by entropies (None: 0), float32 [N], of which those of the part
    are read.
    """
    hidden, lm_head = operands(hidden, lm_head)
    hidden = hidden.masked_fill((targets == IGNORE)[:, None], 0.0)  # NaN there would stay, times 0
    d_hidden = torch.empty_like(hidden, dtype=torch.float32) if need_hidden else None
    d_head = torch.zeros_like(lm_head, dtype=torch.float32) if need_head and not len(hidden) else None
    d_bias = torch.zeros_like(lm_head[:, 0], dtype=torch.float32) if need_bias else None
    buffers = _Buffers.of(hidden, len(lm_head))
    nothing = torch.zeros_like(logprobs)
    options = _Options(bias, softcap, allowed)
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        for block, parts in buffers.blocks(len(hidden)):
            for part in parts:
                logits, d_logits = buffers.of_part(block, part)
                multiply(hidden[part], lm_head.T, out=logits)
                vectors = targets[part], temperatures[part]
                logsumexp = _log_softmax(logits, *vectors, options.of(part), logprobs[part], entropy[part])
                by_logprob, by_entropy = slopes()
                grads = [
                    x[part].contiguous() for x in (by_logprob, nothing, nothing if by_entropy is None else by_entropy)
                ]
                scale = scale_of(len(lm_head), vectors[1], *grads) if hidden.dtype == torch.float16 else None
                _write_gradients(logits, *vectors, options.of(part), logsumexp, entropy[part], grads, scale, d_logits)
            unscale = None if scale is None else scale.reciprocal()  # a block of float16 is one part
            d_logits = buffers.of_block(block)
            if d_hidden is not None:
                d_hidden[block] = times(multiply(d_logits, lm_head), unscale)
            if need_head:
                d_head = add_product(d_head, d_logits.T, hidden[block], unscale)
            if d_bias is not None:
                d_bias += times(d_logits.sum(0, dtype=torch.float32), unscale)
    return d_hidden, d_head, d_bias


class _Options(NamedTuple):
    bias: torch.Tensor | None
    softcap: float | None
    allowed: torch.Tensor | None

    def of(self, rows: slice) -> _Options:
        each = self.allowed is not None and len(self.allowed) > 1
        return self._replace(allowed=self.allowed[rows]) if each else self  # type: ignore[index]

    @property
    def row_stride(self) -> int:
        return self.allowed.stride(0) if self.allowed is not None and len(self.allowed) > 1 else 0

    @property
    def constants(self) -> dict[str, Any]:
        given = self.bias is not None, self.softcap is not None, self.allowed is not None
        return {"TILE": TILE, "num_warps": 4, **dict(zip(("BIASED", "CAPPED", "MASKED"), given, strict=True))}


class _Buffers(NamedTuple):
    """logits: float32 [tokens of a part, width], 0 beyond `vocab`. gradients: [tokens of a block, width], in the dtype
    of the inputs; of float32 they take the logits' place.
    """

    logits: torch.Tensor
    gradients: torch.Tensor
    vocab: int
    block: int
    part: int

    @classmethod
    def of(cls, hidden: torch.Tensor, vocab: int) -> _Buffers:
        width = triton.cdiv(vocab, WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        size = hidden.element_size()
        parts = PARTS if hidden.dtype == torch.bfloat16 else 1
        bytes_of_token = width * (4 if size == 4 else size + 4 // parts)
        block = max(1, CHUNK_BYTES // (bytes_of_token * STEP)) * STEP
        part = block // parts
        logits = hidden.new_empty((min(part, len(hidden)), width), dtype=torch.float32)
        logits[:, vocab:] = 0
        gradients = logits if size == 4 else hidden.new_empty((min(block, len(hidden)), width))
        return cls(logits, gradients, vocab, block, part)

    def blocks(self, tokens: int) -> Iterator[tuple[slice, list[slice]]]:
        """Slices of the tokens, and of each of them its parts."""
        for start in range(0, tokens, self.block):
            end = min(start + self.block, tokens)
            yield slice(start, end), [slice(s, min(s + self.part, end)) for s in range(start, end, self.part)]

    def of_block(self, block: slice) -> torch.Tensor:
        return self.gradients[: block.stop - block.start, : self.vocab]

    def of_part(self, block: slice, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits[: part.stop - part.start, : self.vocab]
        return logits, self.gradients[part.start - block.start : part.stop - block.start, : self.vocab]


def _log_softmax(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    options: _Options,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
) -> torch.Tensor:
    """Fills log-probs and entropies of rows, and returns their log-sum-exp."""
    rows, vocab = logits.shape
    num_splits = triton.cdiv(vocab, SPLIT)
    partials = temperatures.new_empty((NUM_FIELDS, num_splits, rows))
    picked, logsumexp = torch.empty_like(temperatures), torch.empty_like(temperatures)
    row_partials_kernel[(rows * num_splits,)](
        logits, options.bias, targets, temperatures, options.allowed, partials, picked,
        rows, vocab, logits.stride(0), options.row_stride, num_splits, options.softcap or 0.0,
        SPLIT=SPLIT, **options.constants,
    )  # fmt: skip
    logprob_reduce_kernel[(triton.cdiv(rows, REDUCE_ROWS),)](
        partials, picked, targets, logprobs, logsumexp, entropy, rows, num_splits,
        ROWS=REDUCE_ROWS, SPLITS=REDUCE_SPLITS, num_warps=4,
    )  # fmt: skip
    return logsumexp


def _write_gradients(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    options: _Options,
    logsumexp: torch.Tensor,
    entropy: torch.Tensor,
    grads: list[torch.Tensor],
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, vocab = logits.shape
    num_tiles = triton.cdiv(vocab, TILE)
    row_gradients_kernel[(rows * num_tiles,)](
        logits, options.bias, targets, temperatures, options.allowed, logsumexp, entropy, *grads, scale, out,
        rows, vocab, logits.stride(0), options.row_stride, out.stride(0), num_tiles, options.softcap or 0.0,
        SCALED=scale is not None, **options.constants,
    )  # fmt: skip


def _targets() -> list[TritonTarget]:
    """Without options, and with all at once."""
    return [
        t for dtype, full in (("bf16", False), ("bf16", True), ("fp16", True), ("fp32", True)) for t in _of(dtype, full)
    ]


def _of(dtype: str, full: bool) -> list[TritonTarget]:
    sizes = ("rows", "vocab", "logits_stride", "allowed_stride")
    common = {"logits": "*fp32", "targets": "*i64", "temperatures": "*fp32", "softcap": "fp32"}
    common |= dict.fromkeys(sizes, "i32")
    constants: dict[str, Any] = {"TILE": TILE, "BIASED": full, "CAPPED": full, "MASKED": full}
    if full:
        common |= {"bias": f"*{dtype}", "allowed": "*i32"}
    else:
        constants |= {"bias": None, "allowed": None}
    partials = {"partials": "*fp32", "picked": "*fp32", "num_splits": "i32"}
    gradients = dict.fromkeys(("logsumexp", "entropy", "g_logprob", "g_logsumexp", "g_entropy"), "*fp32")
    gradients |= {"out": f"*{dtype}", "out_stride": "i32", "num_tiles": "i32"}
    scaled = dtype == "fp16"
    gradients |= {"scale": "*fp32"} if scaled else {}
    fixed: dict[str, Any] = {"SCALED": scaled} | ({} if scaled else {"scale": None})
    name = f"{dtype}{'_full' if full else ''}"
    return [
        TritonTarget(
            f"row_partials_{name}", row_partials_kernel, common | partials, constants | {"SPLIT": SPLIT},
            ("logits_stride",), num_warps=4,
        ),
        TritonTarget(
            f"row_gradients_{name}", row_gradients_kernel, common | gradients, constants | fixed,
            ("logits_stride", "out_stride"), num_warps=4,
        ),
    ]  # fmt: skip


TARGETS = _targets()
