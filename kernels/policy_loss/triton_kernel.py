"""`linear_logprobs` in Triton: a tile of logits lives in registers and is never written.

Forward: a program multiplies a block of rows of `hidden` by the SPLIT rows of the LM head that are its split, tile by
tile, and leaves per row the largest z, sum e^(z - peak) and sum (z - peak) e^(z - peak), and z of the target where the
split has it. A second kernel adds up the splits, always in the same order. Every number depends on its row alone, not
on how many there are.

Backward: a kernel computes a tile again and writes the gradient of its logits, in the inputs' dtype, for a chunk of
ids at a time: CHUNK_BYTES, however many tokens and ids there are. torch's own products make of it the chunk's part of
the gradients, summed in float32: the rows of d_lm_head once and for all, and a term of d_hidden. Nothing is atomic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from foveate.kernels.policy_loss import triton_logits, triton_loss
from foveate.kernels.policy_loss.arguments import IGNORE
from foveate.kernels.policy_loss.triton_products import multiply, operands, scale_of, times
from foveate.kernels.policy_loss.triton_tiles import (
    logit_gradients_kernel,
    logprob_partials_kernel,
    logprob_reduce_kernel,
)
from foveate.kernels.targets import TritonTarget

CHUNK_BYTES = 1 << 29  # of logits' gradients held at a time
SPLIT = 2048  # ids of a partial: fixed, as the order of the sums is
GROUP = 16  # blocks of rows that run side by side, and share the LM head's tiles in the L2 cache
REDUCE_ROWS, REDUCE_SPLITS = 16, 64
NUM_FIELDS = 3  # of a partial: peak, total, moment


class _Shape(NamedTuple):
    """Rows, ids and hidden dimensions of a product at once. For every number of rows the same: bits depend on them."""

    block: int
    tile: int
    depth: int
    num_warps: int
    num_stages: int


with_gradients = triton_logits.with_gradients  # forward and backward of a loss in one pass

# float32 has no matrix instruction of full precision. None spills on sm_80, sm_90, sm_100.
_MATRIX, _FLOAT32 = _Shape(128, 128, 64, 8, 3), _Shape(32, 128, 32, 8, 2)


def forward(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    softcap: float | None,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob of the target, log-sum-exp, entropy; each float32 [N]. No autograd.

    All vectors are contiguous.
    hidden: [N, D], lm_head: [V, D], of float32, float16 or bfloat16; of two dtypes they are multiplied in float32.
    bias: float [V] or None. targets: int64 [N]. temperatures: float32 [N]. allowed: int32 [1 or N, ceil(V / 32)], the
    bits of `foveate.kernels.sampling.masks.pack`, or None.
    """
    hidden, lm_head = (_aligned(x) for x in operands(hidden, lm_head))
    (rows, _), vocab = hidden.shape, len(lm_head)
    logprobs, logsumexp, entropy = (torch.empty_like(temperatures) for _ in range(3))
    if rows == 0:
        return logprobs, logsumexp, entropy
    shape = _shape(hidden.dtype)
    num_splits, num_blocks = triton.cdiv(vocab, SPLIT), triton.cdiv(rows, shape.block)
    partials = hidden.new_empty((NUM_FIELDS, num_splits, rows), dtype=torch.float32)
    picked = torch.empty_like(temperatures)
    with torch.cuda.device_of(hidden):
        logprob_partials_kernel[(num_splits * num_blocks,)](
            hidden, lm_head, bias, targets, temperatures, allowed, partials, picked,
            rows, vocab, hidden.stride(0), lm_head.stride(0), _row_stride(allowed), num_splits, num_blocks,
            softcap or 0.0, **_constants(hidden, shape, bias, softcap, allowed), SPLIT=SPLIT,
        )  # fmt: skip
        logprob_reduce_kernel[(triton.cdiv(rows, REDUCE_ROWS),)](
            partials, picked, targets, logprobs, logsumexp, entropy, rows, num_splits,
            ROWS=REDUCE_ROWS, SPLITS=REDUCE_SPLITS, num_warps=4,
        )  # fmt: skip
    return logprobs, logsumexp, entropy


def backward(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    softcap: float | None,
    allowed: torch.Tensor | None,
    logsumexp: torch.Tensor,
    entropy: torch.Tensor,
    g_logprob: torch.Tensor,
    g_logsumexp: torch.Tensor,
    g_entropy: torch.Tensor,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, lm_head and bias, in their dtypes; None where not needed.

    The first seven as in `forward`; logsumexp, entropy: of it. g_*: gradients with respect to its results, [N].
    """
    dtypes = hidden.dtype, lm_head.dtype
    hidden, lm_head = operands(hidden, lm_head)
    if need_head:  # a row that is ignored may hold NaN, which 0 times it would keep
        hidden = hidden.masked_fill((targets == IGNORE)[:, None], 0.0)
    (rows, _), vocab = hidden.shape, len(lm_head)
    grads = [g.float().contiguous() for g in (g_logprob, g_logsumexp, g_entropy)]
    if rows == 0:
        d_head = torch.zeros_like(lm_head, dtype=dtypes[1]) if need_head else None
        d_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        return torch.empty_like(hidden, dtype=dtypes[0]) if need_hidden else None, d_head, d_bias
    d_hidden = None
    d_head = torch.empty_like(lm_head, dtype=dtypes[1]) if need_head else None
    d_bias = torch.empty_like(bias) if bias is not None and need_bias else None
    given = (_aligned(hidden), _aligned(lm_head), bias, targets, temperatures, allowed, logsumexp, entropy, *grads)
    scale = scale_of(vocab, temperatures, *grads) if hidden.dtype == torch.float16 else None
    unscale = None if scale is None else scale.reciprocal()
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        for ids, d_logits in _chunks(given, softcap, scale):
            if need_hidden:
                term = multiply(d_logits, lm_head[ids])
                d_hidden = term if d_hidden is None else d_hidden.add_(term)
            if d_head is not None:
                d_head[ids] = times(multiply(d_logits.T, hidden), unscale)
            if d_bias is not None:
                d_bias[ids] = times(d_logits.sum(0, dtype=torch.float32), unscale)
    return None if d_hidden is None else times(d_hidden, unscale).to(dtypes[0]), d_head, d_bias


def _chunks(given, softcap: float | None, scale: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """(ids, gradients of their logits [N, ids]); each is overwritten by the next."""
    hidden, lm_head, bias, allowed = given[0], given[1], given[2], given[5]
    (rows, _), vocab = hidden.shape, len(lm_head)
    shape = _shape(hidden.dtype)
    width = CHUNK_BYTES // (hidden.element_size() * rows) // shape.tile * shape.tile
    width = min(max(width, shape.tile), triton.cdiv(vocab, shape.tile) * shape.tile)
    out = hidden.new_empty((rows, width))
    num_blocks = triton.cdiv(rows, shape.block)
    for first in range(0, vocab, width):
        count = min(width, vocab - first)
        num_tiles = triton.cdiv(count, shape.tile)
        logit_gradients_kernel[(num_blocks * num_tiles,)](
            *given, scale, out, rows, vocab, first, hidden.stride(0), lm_head.stride(0), _row_stride(allowed),
            width, num_tiles, num_blocks, softcap or 0.0,
            **_constants(hidden, shape, bias, softcap, allowed), SCALED=scale is not None,
        )  # fmt: skip
        yield slice(first, first + count), out[:, :count]


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """As the kernels read it, 16 bytes at a time and DEPTH dimensions at once: itself, or a copy with zeros behind."""
    padding = -x.shape[1] % _shape(x.dtype).depth
    good = x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return x if good and not padding else torch.nn.functional.pad(x, (0, padding)).contiguous()


def _shape(dtype: torch.dtype) -> _Shape:
    return _FLOAT32 if dtype == torch.float32 else _MATRIX


def _row_stride(allowed: torch.Tensor | None) -> int:
    return allowed.stride(0) if allowed is not None and len(allowed) > 1 else 0


def _constants(hidden: torch.Tensor, shape: _Shape, bias: Any, softcap: Any, allowed: Any) -> dict[str, Any]:
    return {
        "DIM": hidden.shape[1], "BLOCK": shape.block, "TILE": shape.tile, "DEPTH": shape.depth, "GROUP": GROUP,
        "BIASED": bias is not None, "CAPPED": softcap is not None, "MASKED": allowed is not None,
        "num_warps": shape.num_warps, "num_stages": shape.num_stages,
    }  # fmt: skip


def _targets() -> list[TritonTarget]:
    """Without options, and with all at once, which is the largest kernel."""
    reduce = dict.fromkeys(("partials", "picked", "logprobs", "logsumexp", "entropy"), "*fp32")
    reduce |= {"targets": "*i64", "rows": "i32", "num_splits": "i32"}
    targets = [
        TritonTarget("reduce", logprob_reduce_kernel, reduce, {"ROWS": REDUCE_ROWS, "SPLITS": REDUCE_SPLITS}),
    ]
    for dtype, dim, full in (
        ("bf16", 2048, False), ("bf16", 2048, True), ("fp16", 2048, True), ("fp32", 2048, True),
    ):  # fmt: skip
        targets += _product_targets(dtype, dim, full)
    return targets


def _product_targets(dtype: str, dim: int, full: bool) -> list[TritonTarget]:
    shape = _FLOAT32 if dtype == "fp32" else _MATRIX
    scaled = dtype == "fp16"
    sizes = ("rows", "vocab", "hidden_stride", "head_stride", "allowed_stride", "num_blocks")
    common = {"hidden": f"*{dtype}", "lm_head": f"*{dtype}", "targets": "*i64", "temperatures": "*fp32"}
    common |= {"softcap": "fp32"} | dict.fromkeys(sizes, "i32")
    constants: dict[str, Any] = {"DIM": dim, "BLOCK": shape.block, "TILE": shape.tile, "DEPTH": shape.depth}
    constants |= {"GROUP": GROUP, "BIASED": full, "CAPPED": full, "MASKED": full}
    if full:
        common |= {"bias": f"*{dtype}", "allowed": "*i32"}
    else:
        constants |= {"bias": None, "allowed": None}
    strides = ("hidden_stride", "head_stride")
    partials = {"partials": "*fp32", "picked": "*fp32", "num_splits": "i32"}
    gradients = dict.fromkeys(("logsumexp", "entropy", "g_logprob", "g_logsumexp", "g_entropy"), "*fp32")
    gradients |= {"out": f"*{dtype}"} | dict.fromkeys(("first_id", "out_stride", "num_tiles"), "i32")
    gradients |= {"scale": "*fp32"} if scaled else {}
    fixed: dict[str, Any] = {"SCALED": scaled} | ({} if scaled else {"scale": None})
    return [
        TritonTarget(
            f"{name}_{dtype}_{dim}{'_full' if full else ''}", kernel, common | own, constants | more,
            divisible,
            num_warps=shape.num_warps, num_stages=shape.num_stages, matrix=dtype != "fp32",
        )
        for name, kernel, own, more, divisible in (
            ("logprob_partials", logprob_partials_kernel, partials, {"SPLIT": SPLIT}, strides),
            ("logit_gradients", logit_gradients_kernel, gradients, fixed, (*strides, "out_stride")),
        )
    ]  # fmt: skip


TARGETS = [*_targets(), *triton_logits.TARGETS, *triton_loss.TARGETS]
