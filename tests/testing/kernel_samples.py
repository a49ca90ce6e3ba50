"""Triton kernels to compile in tests: a plain one, a matrix product, one that spills, and some that must be refused."""

import triton
import triton.language as tl

from foveate.kernels.targets import TritonTarget


@triton.jit
def copy_kernel(source, target, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def scale_kernel(source, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(source + index)
    tl.store(target + index, value / tl.sum(value))


@triton.jit
def product_kernel(left, right, target, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        a = tl.load(left + rows[:, None] * depth + start + inner[None, :])
        b = tl.load(right + (start + inner)[:, None] * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(target + rows[:, None] * N + columns[None, :], total)


PRODUCT = {"left": "*bf16", "right": "*bf16", "target": "*fp32", "depth": "i32"}
ROW = {"source": "*fp32", "target": "*fp32"}
COPY = {**ROW, "size": "i32"}


def product(name: str, m: int, n: int, k: int, **options) -> TritonTarget:
    sizes = {"M": m, "N": n, "K": k}
    return TritonTarget(name, product_kernel, PRODUCT, sizes, ("depth",), matrix=True, **options)


TARGETS = [
    TritonTarget("copy", copy_kernel, COPY, {"BLOCK": 1024}, ("size",)),
    TritonTarget("copy_without_matrix", copy_kernel, COPY, {"BLOCK": 1024}, ("size",), matrix=True),
    product("product", 128, 128, 64),
    TritonTarget("row_that_spills", scale_kernel, ROW, {"BLOCK": 1 << 13}, num_warps=1),
    product("product_too_large", 128, 128, 128, num_warps=8, num_stages=5),
    TritonTarget("block_of_odd_size", copy_kernel, COPY, {"BLOCK": 1000}, ("size",)),
    TritonTarget("argument_forgotten", copy_kernel, {"source": "*fp32", "size": "i32"}, {"BLOCK": 1024}),
]
