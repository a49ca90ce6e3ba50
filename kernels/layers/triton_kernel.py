"""`rms_norm` in Triton: one program a row; the tile holds the whole row, so that it is read once.

The tile and the warps depend on the row alone, so that a batch changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from foveate import _C
from foveate.kernels.dispatch import require
from foveate.kernels.targets import TritonTarget

GRADIENT_ROWS = _C.RMS_NORM_GRADIENT_ROWS
GRADIENT_COLUMNS = 128
MAX_DIM = 16384


@triton.jit
def rms_norm_kernel(
    x, weight, out, scale, inner, outer_stride, inner_stride, dim, eps, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < dim
    start = row // inner * outer_stride + row % inner * inner_stride
    value = tl.load(x + start + column, mask=inside, other=0.0)
    single = value.to(tl.float32)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(single * single, axis=0), dim.to(tl.float32)) + eps))
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = (single * factor).to(value.dtype).to(tl.float32)
    tl.store(out + row * dim + column, (normed * gain).to(value.dtype), mask=inside)
    tl.store(scale + row, factor)


@triton.jit
def rms_norm_backward_kernel(grad, x, weight, scale, grad_x, dim, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < dim
    value = tl.load(x + row * dim + column, mask=inside, other=0.0)
    factor = tl.load(scale + row)
    normed = value.to(tl.float32) * factor
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    product = tl.load(grad + row * dim + column, mask=inside, other=0.0).to(tl.float32) * gain
    mean = tl.div_rn(tl.sum(product * normed, axis=0), dim.to(tl.float32))
    tl.store(grad_x + row * dim + column, (factor * tl.fma(-normed, mean, product)).to(value.dtype), mask=inside)


@triton.jit
def rms_norm_weight_kernel(grad, x, scale, grad_weight, rows, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    slab = tl.program_id(0).to(tl.int64)
    row = slab * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < dim)
    value = tl.load(x + row * dim + column, mask=inside, other=0.0)
    factor = tl.load(scale + row, mask=row < rows, other=0.0)
    normed = value.to(tl.float32) * factor
    product = tl.load(grad + row * dim + column, mask=inside, other=0.0).to(tl.float32) * normed
    total = tl.sum(product, axis=0)[None, :]
    tl.store(grad_weight + slab * dim + column, total, mask=column < dim)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, scale: torch.Tensor) -> None:
    """x: [A, B, D]. out: [A, B, D], contiguous. scale: float32 [A, B]."""
    outer, inner, dim = x.shape
    if x.numel() == 0:
        return
    tile = _tile(dim)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(outer * inner,)](
            x, weight, out, scale, inner, x.stride(0), x.stride(1), dim, eps, TILE=tile, num_warps=_num_warps(tile)
        )


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    grad_x: torch.Tensor,
    grad_weight: torch.Tensor,
) -> None:
    """grad, x, grad_x: [N, D], contiguous. scale: float32 [N]. grad_weight: float32 [ceil(N / GRADIENT_ROWS), D]."""
    rows, dim = x.shape
    if x.numel() == 0:
        return
    tile = _tile(dim)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(rows,)](grad, x, weight, scale, grad_x, dim, TILE=tile, num_warps=_num_warps(tile))
        if len(grad_weight) == 0:
            return
        grid = (len(grad_weight), triton.cdiv(dim, GRADIENT_COLUMNS))
        rms_norm_weight_kernel[grid](
            grad, x, scale, grad_weight, rows, dim, ROWS=GRADIENT_ROWS, COLUMNS=GRADIENT_COLUMNS
        )


def _tile(dim: int) -> int:
    """ValueError for a row that would not fit the registers of one program."""
    require(dim <= MAX_DIM, f"[..., D] with D <= {MAX_DIM} in Triton", dim, "x")
    return triton.next_power_of_2(dim)


def _num_warps(tile: int) -> int:
    return min(max(tile // 512, 1), 8)


def _targets() -> list[TritonTarget]:
    targets = []
    for dtype in ("fp32", "fp16", "bf16"):
        pointers = {"x": f"*{dtype}", "weight": f"*{dtype}"}
        for tile in (128, 2048, 4096, MAX_DIM):
            forward = {**pointers, "out": f"*{dtype}", "scale": "*fp32", "inner": "i32", "outer_stride": "i32"}
            forward |= {"inner_stride": "i32", "dim": "i32", "eps": "fp32"}
            backward = {"grad": f"*{dtype}", **pointers, "scale": "*fp32", "grad_x": f"*{dtype}", "dim": "i32"}
            shape: dict[str, Any] = dict(constants={"TILE": tile}, num_warps=_num_warps(tile))
            divisible = ("outer_stride", "inner_stride", "dim")
            targets += [
                TritonTarget(f"rms_norm_{dtype}_{tile}", rms_norm_kernel, forward, divisible=divisible, **shape),
                TritonTarget(f"rms_norm_backward_{dtype}_{tile}", rms_norm_backward_kernel, backward,
                             divisible=("dim",), **shape),
            ]  # fmt: skip
        weight = {"grad": f"*{dtype}", "x": f"*{dtype}", "scale": "*fp32", "grad_weight": "*fp32"}
        weight |= {"rows": "i32", "dim": "i32"}
        constants = {"ROWS": GRADIENT_ROWS, "COLUMNS": GRADIENT_COLUMNS}
        targets.append(TritonTarget(f"rms_norm_weight_{dtype}", rms_norm_weight_kernel, weight, constants, ("dim",)))
    return targets


TARGETS = _targets()
