"""What the library computes of policy losses in Triton: products of matrices, summed in float32."""

from __future__ import annotations

import math

import torch
from torch.torch_version import TorchVersion

# Before, torch added a product of half precision to no float32 matrix.
ADDS_TO_FLOAT32 = TorchVersion(torch.__version__) >= "2.11"


def operands(hidden: torch.Tensor, lm_head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one dtype: what is multiplied."""
    return (hidden, lm_head) if hidden.dtype == lm_head.dtype else (hidden.float(), lm_head.float())


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b in float32, summed in float32; of float32 operands as precise as torch is set to multiply them."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(
    total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """total + a @ b factor, in the place of `total`, whose None is 0, as is 1 that of factor."""
    half = a.is_cuda and a.dtype != torch.float32
    if total is None or factor is not None or (half and not ADDS_TO_FLOAT32):
        product = times(multiply(a, b), factor)
        return product if total is None else total.add_(product)
    if half:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.float(), b.float())


def scale_of(vocab: int, temperatures: torch.Tensor, *grads: torch.Tensor) -> torch.Tensor:
    """float32 [1], a power of two: a logit's gradient times it is below 2^15, near which float16 is finest.

    |d z_j| <= |g_logprob| + |g_logsumexp| + |g_entropy| |p_j (log p_j + entropy)|, of which the last is below
    1 + log V.
    """
    bound = grads[0].abs() + grads[1].abs() + grads[2].abs() * (1 + math.log(vocab))
    largest = (bound / temperatures).amax(0, keepdim=True)
    exponent = torch.frexp(largest).exponent
    return torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, 15 - exponent, 0).clamp(-100, 100))


def times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """In its place; None is 1."""
    return x if factor is None else x.mul_(factor)
