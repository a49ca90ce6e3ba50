"""The last hidden states to the log-probabilities of given tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from foveate.kernels.dispatch import choose, require
from foveate.kernels.policy_loss import reference
from foveate.kernels.policy_loss.arguments import kind_of

IGNORE = -100


class LinearLogprobs(NamedTuple):
    """One entry a token, each float32 [N] (float64 if `hidden` is), each differentiable.

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
    `hidden` is), whatever the inputs' dtype and autocast. A target of -100 gives zeros and no gradient. Gradients
    reach hidden, lm_head and bias through all three results, once (no second derivative).

    hidden: float [N, D]. lm_head: float [V, D]. targets: int64 [N], in [0, V) or -100. temperature: > 0, or float
    [N]. bias: float [V]. allowed: bool [V] or [N, V]; the softmax runs over the allowed ids alone, a target outside
    them has log-probability -inf, a row that allows none gives NaN. Memory: O(V) of logits for a chunk of tokens; a
    head in half precision is held once more in float32. Raises ValueError on shapes, dtypes and values.
    """
    choose("policy_loss", backend, hidden.device)
    for matrix, argument in ((hidden, "hidden"), (lm_head, "lm_head")):
        require(matrix.dim() == 2 and matrix.is_floating_point(), "a float matrix", kind_of(matrix), argument)
    count, (vocab, width) = hidden.shape[0], lm_head.shape
    require(hidden.shape[1] == width, f"[N, {width}]", kind_of(hidden), "hidden")
    require(targets.dtype == torch.int64 and targets.shape == (count,), f"int64 [{count}]", kind_of(targets), "targets")
    if bias is not None:
        require(bias.is_floating_point() and bias.shape == (vocab,), f"float [{vocab}]", kind_of(bias), "bias")
    require(softcap is None or softcap > 0, "a number > 0 or None", softcap, "softcap")
    if allowed is not None:
        good = allowed.dtype == torch.bool and tuple(allowed.shape) in ((vocab,), (count, vocab))
        require(good, f"bool [{vocab}] or [{count}, {vocab}]", kind_of(allowed), "allowed")
    temperatures = _temperatures(temperature, hidden)
    _check_targets(targets, vocab)
    return LinearLogprobs(
        *reference.linear_logprobs(hidden, lm_head, bias, targets, temperatures, softcap, allowed, IGNORE)
    )


def _temperatures(temperature: float | torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Float [N], in the dtype that is computed in."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count = hidden.shape[0]
    if isinstance(temperature, torch.Tensor):
        good = temperature.is_floating_point() and temperature.shape == (count,)
        require(good, f"a number or float [{count}]", kind_of(temperature), "temperature")
        values = temperature.to(hidden.device, dtype)
    else:
        values = torch.full((count,), float(temperature), dtype=dtype, device=hidden.device)
    require(bool((values > 0).all()), "values > 0", temperature, "temperature")
    return values


def _check_targets(targets: torch.Tensor, vocab: int) -> None:
    valid = ((targets >= 0) & (targets < vocab)) | (targets == IGNORE)
    if not bool(valid.all()):
        raise ValueError(f"expected ids in [0, {vocab}) or {IGNORE}, got {int(targets[~valid][0])} (targets)")
