"""The last hidden states to the log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from foveate.kernels.dispatch import choose_among, require
from foveate.kernels.policy_loss.arguments import IGNORE, kind_of
from foveate.kernels.sampling import masks

# The backends that multiply hidden states with an LM head: modules with `forward`, `backward`, `with_gradients`.
_PRODUCTS = {
    "reference": "foveate.kernels.policy_loss.reference.logprobs",
    "triton": "foveate.kernels.policy_loss.triton_kernel",
}
Slopes = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
PACK_ELEMENTS = 1 << 22  # entries of `allowed` that are packed at a time


class LinearLogprobs(NamedTuple):
    """One entry a token, each float32 [N] (float64 if `hidden` or `lm_head` is), each differentiable.

    logprobs: z[target] - logsumexp. logsumexp: log sum_v exp(z_v). entropy: of softmax(z), in nats.
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor


def linear_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    allowed: torch.Tensor | None = None,
    backend: str | None = None,
) -> LinearLogprobs:
    """Log-softmax of z = cap(hidden @ lm_head^T + bias) / temperature at the targets, its log-sum-exp and entropy.

    cap(x) = softcap tanh(x / softcap), the identity for None. Products and sums accumulate in float32 (float64 if
    `hidden` or `lm_head` is), whatever the inputs' dtype and autocast. A target of -100 gives zeros and no gradient,
    whatever its row of `hidden` holds. Gradients reach hidden, lm_head and bias through all three results, once (no
    second derivative).

    On a GPU, "triton" multiplies `hidden` and `lm_head` on tensor cores if both are float16 or both bfloat16; float32,
    or two dtypes, in full float32 without tensor cores, many times slower. What torch multiplies in float32 (all of
    "reference"; of "triton" the gradients where it computes in full float32) is as precise as
    `torch.set_float32_matmul_precision` has it: full unless set.

    hidden: float [N, D]. lm_head: float [V, D]. targets: int64 [N], in [0, V) or -100. temperature: > 0, or float
    [N]. bias: float [V]. allowed: bool [V] or [N, V]; the softmax runs over the allowed ids alone, a target outside
    them has log-probability -inf, a row that allows none gives NaN. Memory: logits of a chunk of tokens ("reference")
    or gradients of a chunk of ids ("triton"), independent of N V; the reference holds a head in half precision once
    more in float32. backend: "triton" or "reference"; None chooses. Deterministic as torch's products are. Raises
    ValueError on shapes, dtypes and values.
    """
    module, given = _checked(hidden, lm_head, targets, temperature, bias, softcap, allowed, backend)
    return LinearLogprobs(*_LinearLogprobs.apply(module, *given))


class LogitChunks:
    """Log-probs and entropies of `linear_logprobs`, [N], that come chunk by chunk, and gradients in the same pass.

    Made from its arguments, with its errors. logprobs, entropy: 0 until their chunk is computed, without gradient.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        lm_head: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float | torch.Tensor = 1.0,
        bias: torch.Tensor | None = None,
        softcap: float | None = None,
        allowed: torch.Tensor | None = None,
        backend: str | None = None,
    ):
        self._module, self._given = _checked(hidden, lm_head, targets, temperature, bias, softcap, allowed, backend)
        self._needed = [x is not None and x.requires_grad for x in (hidden, lm_head, bias)]
        # Each of its own memory: where a vector begins is part of what Triton compiles for.
        self.logprobs, self.entropy = (torch.zeros_like(self._given[4]) for _ in range(2))

    def gradients(self, slopes: Slopes) -> Gradients:
        """Of hidden, lm_head and bias, in the dtype of log-probs; None for what requires no gradient.

        slopes: called when log-probs and entropies of a chunk have come; derivatives of what is minimised by both (by
        entropies None: 0), [N]. Those of tokens whose log-probs have not come are not read.
        """
        with torch.no_grad():
            return self._module.with_gradients(*self._given, self.logprobs, self.entropy, slopes, *self._needed)


def _checked(hidden, lm_head, targets, temperature, bias, softcap, allowed, backend) -> tuple[ModuleType, tuple]:
    """The module of the backend, and what its functions take."""
    check_inputs(hidden, lm_head, targets, bias, softcap, allowed)
    chosen = products_backend(backend, hidden, lm_head)
    temperatures = temperatures_of(temperature, hidden, lm_head).contiguous()
    dense = None if bias is None else bias.contiguous()
    given = (hidden, lm_head, dense, targets.contiguous(), temperatures, softcap, allowed_of(allowed, chosen))
    return products(chosen), given


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module, hidden, lm_head, bias, targets, temperatures, softcap, allowed):
        results = module.forward(hidden, lm_head, bias, targets, temperatures, softcap, allowed)
        ctx.save_for_backward(hidden, lm_head, bias, targets, temperatures, allowed, *results[1:])
        ctx.module, ctx.softcap = module, softcap
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        hidden, lm_head, bias, targets, temperatures, allowed, logsumexp, entropy = ctx.saved_tensors
        given = (hidden, lm_head, bias, targets, temperatures, ctx.softcap, allowed, logsumexp, entropy)
        needed = ctx.needs_input_grad[1:4]
        return None, *ctx.module.backward(*given, *grads, *needed), None, None, None, None


def products_backend(backend: str | None, hidden: torch.Tensor, lm_head: torch.Tensor) -> str:
    """ "triton" or "reference": the one asked for, or the best there. ValueError as `dispatch.choose_among`."""
    dtype = torch.promote_types(hidden.dtype, lm_head.dtype)
    return choose_among(tuple(_PRODUCTS), "linear_logprobs", "policy_loss", backend, hidden.device, dtype)


def products(backend: str) -> ModuleType:
    """The module that has `forward`, `backward` and `with_gradients` of a backend, each of one signature."""
    return import_module(_PRODUCTS[backend])


def allowed_of(allowed: torch.Tensor | None, backend: str) -> torch.Tensor | None:
    """As the backend takes it: bool [V] or [N, V]; for "triton" int32 [1 or N, ceil(V / 32)], `masks.pack`'s bits."""
    if allowed is None or backend != "triton":
        return allowed
    rows = allowed if allowed.dim() == 2 else allowed[None]
    words = rows.new_empty((len(rows), masks.num_words(rows.shape[1])), dtype=torch.int32)
    step = max(1, PACK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        words[start : start + step] = masks.pack(rows[start : start + step])
    return words


def check_inputs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    allowed: torch.Tensor | None,
) -> None:
    """ValueError unless shapes, dtypes and values are those of `linear_logprobs`."""
    for matrix, argument in ((hidden, "hidden"), (lm_head, "lm_head")):
        require(matrix.dim() == 2 and matrix.is_floating_point(), "a float matrix", kind_of(matrix), argument)
    count, (vocab, width) = hidden.shape[0], lm_head.shape
    require(vocab > 0 and width > 0, "float [V, D] with V, D > 0", kind_of(lm_head), "lm_head")
    require(hidden.shape[1] == width, f"[N, {width}]", kind_of(hidden), "hidden")
    require(targets.dtype == torch.int64 and targets.shape == (count,), f"int64 [{count}]", kind_of(targets), "targets")
    if bias is not None:
        require(bias.is_floating_point() and bias.shape == (vocab,), f"float [{vocab}]", kind_of(bias), "bias")
    require(softcap is None or softcap > 0, "a number > 0 or None", softcap, "softcap")
    if allowed is not None:
        good = allowed.dtype == torch.bool and tuple(allowed.shape) in ((vocab,), (count, vocab))
        require(good, f"bool [{vocab}] or [{count}, {vocab}]", kind_of(allowed), "allowed")
    for tensor, argument in ((lm_head, "lm_head"), (targets, "targets"), (bias, "bias"), (allowed, "allowed")):
        same = tensor is None or tensor.device == hidden.device
        require(same, f"a tensor on {hidden.device}", None if tensor is None else str(tensor.device), argument)
    valid = ((targets >= 0) & (targets < vocab)) | (targets == IGNORE)
    if not bool(valid.all()):
        raise ValueError(f"expected ids in [0, {vocab}) or {IGNORE}, got {int(targets[~valid][0])} (targets)")


def temperatures_of(temperature: float | torch.Tensor, hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """Float [N], in the dtype that is computed in. ValueError unless it is > 0, or float [N] of such."""
    double = torch.float64 in (hidden.dtype, lm_head.dtype)
    dtype, count = torch.float64 if double else torch.float32, hidden.shape[0]
    if isinstance(temperature, torch.Tensor):
        good = temperature.is_floating_point() and temperature.shape == (count,)
        require(good, f"a number or float [{count}]", kind_of(temperature), "temperature")
        values = temperature.to(hidden.device, dtype)
    else:
        require(temperature > 0, "a number > 0", temperature, "temperature")
        return torch.full((count,), float(temperature), dtype=dtype, device=hidden.device)
    require(bool((values > 0).all()), "values > 0", temperature, "temperature")
    return values
