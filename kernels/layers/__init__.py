"""The parts of a decoder layer outside attention and sampling: `rms_norm`, `rope_store_kv`, `linear`, `elementwise`.

    rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight over the last dimension

normalised in float32 and rounded to the dtype of x before the weight, as transformers' models do. A row gives the
same bits alone and in any batch, and so does its gradient; "cpp" and "cuda" are written to give the same ones.
Source: Zhang & Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from foveate.kernels.dispatch import choose, choose_among, require
from foveate.kernels.layers import operators, reference
from foveate.kernels.layers.reference import rotate
from foveate.kernels.library import is_observed

__all__ = ["elementwise", "linear", "rms_norm", "rope_store_kv", "rotate"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None) -> torch.Tensor:
    """x: float [..., D]. weight: float [D], of the same dtype and device. Returns [..., D], of that dtype.

    Differentiable in x and weight, once and in reverse mode; gradients are summed in float32. backend: None chooses.
    Raises ValueError if shapes, dtypes or devices do not fit.
    """
    fits = x.dim() > 0 and weight.shape == x.shape[-1:] and weight.dtype == x.dtype and weight.device == x.device
    if not fits or x.shape[-1] == 0:
        require(x.dim() > 0 and x.shape[-1] > 0, "[..., D] with D >= 1", list(x.shape), "x")
        require(False, f"[{x.shape[-1]}] {x.dtype} on {x.device}", _kind(weight), "weight")
    chosen = choose("layers", backend, x.device, x.dtype)
    if chosen == "reference":
        return reference.rms_norm(x, weight, eps)
    rows = _as_rows(x)
    # Where nothing records, the operator's wrappers would cost more than a short row.
    plain = not torch.is_grad_enabled() and not is_observed(rows, weight)
    return (operators.forward if plain else operators.rms_norm)(rows, weight, eps, chosen)[0].view(x.shape)


def rope_store_kv(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Rotary embedding of queries and keys; rotated keys, and values, go to pool slot `slots[r]` of row r, in place.

    queries: float [T, heads, head_dim], keys, values: [T, kv_heads, head_dim]; any strides with a contiguous last
    dimension. cos, sin: [T, head_dim], contiguous, sin negated in the first half: see `rotate`. key_pool, value_pool:
    [pages, page_size, kv_heads, head_dim], contiguous. All of one dtype and device. slots: int64 [T], page * page_size
    + offset, each at most once. Returns the rotated queries, [T, heads, head_dim]. Without gradients. A row's bits
    depend on nothing but the row. Raises ValueError, on every backend, where shapes, strides, dtypes, devices or (on a
    CPU) slots do not fit.
    Source: Su et al., arXiv 2104.09864, the halves of a head being turned, as in transformers.
    """
    require(queries.dim() == 3 and queries.shape[2] % 2 == 0, "[T, heads, head_dim], even", list(queries.shape),
            "queries")  # fmt: skip
    backends = ("cuda", "cpp", "reference")
    chosen = choose_among(backends, "rope_store_kv", "layers", backend, queries.device, queries.dtype)
    run = reference.rope_store_kv if chosen == "reference" else operators.rope_store_kv
    return run(queries, keys, values, cos, sin, key_pool, value_pool, slots)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, row_block: int | None = None
) -> torch.Tensor:
    """x @ weight^T + bias, by torch's matrix product on every backend.

    x: float [M, K]. weight: float [N, K]. bias: float [N] or None. Returns float [M, N]. row_block: how a row rounds
    may depend on M; with blocks of so many rows, the last filled with zeros, a row of a CPU tensor gives the same bits
    in every batch, at a given number of threads. At least 16: below that the rows of one product round differently.
    """
    if row_block is None:
        return reference.linear(x, weight, bias)
    require(row_block >= 16, "at least 16 rows", row_block, "row_block")
    return reference.linear_in_blocks(x, weight, bias, row_block)


def elementwise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function of each element, with the same bits wherever in x it stands, at a given number of threads.

    x: float [M, D] on the CPU. Returns what `function` does, [M, D]. Torch computes the elements that do not fill a
    vector register by other code than the rest, which for silu or gelu rounds differently.
    """
    return reference.elementwise(function, x)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[A, B, D] with a contiguous last dimension; a copy only where no view of x is one."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    while x.dim() < 3:
        x = x.unsqueeze(-2)
    return x if x.dim() == 3 else x.flatten(0, -3)


def _kind(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
