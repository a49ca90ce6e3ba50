"""`torch.ops.foveate.rms_norm`, its backward and `rope_store_kv`: one operator for all compiled backends."""

from __future__ import annotations

import torch

from foveate import _C
from foveate.kernels.dispatch import stream_of
from foveate.kernels.library import is_observed, operator


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator runs; called by itself where nothing records or traces, it costs a third."""
    out, scale = _fake_forward(x, weight, eps, backend)
    if backend == "triton":
        from foveate.kernels.layers import triton_kernel

        triton_kernel.rms_norm(x, weight, eps, out, scale)
    else:
        _C.rms_norm(x, weight, eps, out, scale, stream_of(x))
    return out, scale


def _fake_forward(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, with_weight: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    slabs = -(-len(x) // _C.RMS_NORM_GRADIENT_ROWS) if with_weight else 0
    grad_x, partials = torch.empty_like(x), x.new_empty((slabs, x.shape[1]), dtype=torch.float32)
    if backend == "triton":
        from foveate.kernels.layers import triton_kernel

        triton_kernel.rms_norm_backward(grad, x, weight, scale, grad_x, partials)
    else:
        _C.rms_norm_backward(grad, x, weight, scale, grad_x, partials, stream_of(x))
    return grad_x, partials.sum(0).to(weight.dtype)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, with_weight: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def rope_store_kv(queries, keys, values, cos, sin, key_pool, value_pool, slots) -> torch.Tensor:
    """See `foveate.kernels.layers.rope_store_kv`."""
    arguments = (queries, keys, values, cos, sin, key_pool, value_pool, slots)
    if not is_observed(*arguments):
        return _rotate_and_store(*arguments)
    with torch.no_grad():
        return _rope_store_kv(*arguments)


def _rotate_and_store(queries, keys, values, cos, sin, key_pool, value_pool, slots) -> torch.Tensor:
    out = queries.new_empty(queries.shape)
    _C.rope_store_kv(queries, keys, values, cos, sin, key_pool, value_pool, slots, out, stream_of(out))
    return out


def _save(ctx, inputs, output) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad: torch.Tensor, _) -> tuple[torch.Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    rows = [tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (grad, x)]
    with_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight = rms_norm_backward(*rows, weight, scale.view(-1), with_weight, ctx.backend)
    return grad_x.view(x.shape), grad_weight if with_weight else None, None, None


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("rms_norm has first derivatives only; backend='reference' has all of them")


# x: [A, B, D], any strides with a contiguous last dimension -> out [A, B, D], contiguous, and 1 / rms, float32 [A, B].
rms_norm = operator(
    "rms_norm(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    save=_save,
    backward=_autograd,
)
# grad, x: [N, D], contiguous; scale: float32 [N] -> gradients of x and weight (zeros unless with_weight).
rms_norm_backward = operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, bool with_weight, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    backward=_no_second_derivative,
)
# As `foveate.kernels.layers.rope_store_kv` -> the rotated queries.
_rope_store_kv = operator(
    "rope_store_kv(Tensor queries, Tensor keys, Tensor values, Tensor cos, Tensor sin, Tensor(a!) key_pool,"
    " Tensor(b!) value_pool, Tensor slots) -> Tensor",
    _rotate_and_store,
    lambda queries, *_: queries.new_empty(queries.shape),
)
