"""Rewards to group advantages, and hidden states to the log-probabilities of given tokens.

Neither writes a `[tokens, vocabulary]` tensor: `linear_logprobs` works on a chunk of tokens at a time and computes a
chunk's logits again in the backward pass.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from foveate.kernels.dispatch import choose, require
from foveate.kernels.policy_loss import reference

__all__ = ["IGNORE", "LinearLogprobs", "group_advantage", "linear_logprobs"]

IGNORE = -100
KINDS = ("grpo",)


class LinearLogprobs(NamedTuple):
    """One entry a token, each float32 [N] (float64 if `hidden` is), each differentiable.

    logprobs: z[target] - logsumexp. logsumexp: log sum_v exp(z_v). entropy: of softmax(z), in nats.
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor


def group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    kind: str = "grpo",
    weights: torch.Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
    scorable: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Advantage of each sample over its group, float32 [N]: A_i = (r_i - mean) / (std + eps).

    Mean and std run in float64 over the scorable members of i's group; std divides by (members - ddof). A member
    that is not scorable gets 0 and its reward is not read; so does a group with fewer than two scorable members. A
    group whose rewards are all equal gets exactly 0: rounding of the mean, divided by eps, would otherwise look like
    an advantage. A scorable reward that is NaN or infinite gives NaN to all scorable members of its group.

    rewards: float [N], or [N, R] for R parts whose sum r = sum_k weights_k part_k is scored. group_offsets: int32
    [G + 1], samples of group g are group_offsets[g] to group_offsets[g + 1] - 1; a group may be empty. weights: float
    [R], None is all ones. scorable: bool [N], None is all. Differentiable by nothing. Raises ValueError on shapes,
    dtypes, offsets that do not run from 0 to N, and kinds other than "grpo".
    Source: GRPO (arXiv 2402.03300), with the Bessel-corrected std of its public implementations.
    """
    choose("policy_loss", backend, rewards.device)
    require(kind in KINDS, f"one of {KINDS}", kind, "kind")
    require(ddof in (0, 1), "0 or 1", ddof, "ddof")
    require(eps >= 0, "a number >= 0", eps, "eps")
    require(rewards.is_floating_point() and rewards.dim() in (1, 2), "float [N] or [N, R]", _kind(rewards), "rewards")
    parts = rewards.shape[1] if rewards.dim() == 2 else 0
    if weights is not None:
        require(
            weights.is_floating_point() and weights.shape == (parts,), f"float [{parts}]", _kind(weights), "weights"
        )
    count = rewards.shape[0]
    if scorable is not None:
        good = scorable.dtype == torch.bool and scorable.shape == (count,)
        require(good, f"bool [{count}]", _kind(scorable), "scorable")
    _check_offsets(group_offsets, count)
    return reference.group_advantage(rewards, group_offsets, weights, ddof, eps, scorable)


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
        require(matrix.dim() == 2 and matrix.is_floating_point(), "a float matrix", _kind(matrix), argument)
    count, (vocab, width) = hidden.shape[0], lm_head.shape
    require(hidden.shape[1] == width, f"[N, {width}]", _kind(hidden), "hidden")
    require(targets.dtype == torch.int64 and targets.shape == (count,), f"int64 [{count}]", _kind(targets), "targets")
    if bias is not None:
        require(bias.is_floating_point() and bias.shape == (vocab,), f"float [{vocab}]", _kind(bias), "bias")
    require(softcap is None or softcap > 0, "a number > 0 or None", softcap, "softcap")
    if allowed is not None:
        good = allowed.dtype == torch.bool and tuple(allowed.shape) in ((vocab,), (count, vocab))
        require(good, f"bool [{vocab}] or [{count}, {vocab}]", _kind(allowed), "allowed")
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
        require(good, f"a number or float [{count}]", _kind(temperature), "temperature")
        values = temperature.to(hidden.device, dtype)
    else:
        values = torch.full((count,), float(temperature), dtype=dtype, device=hidden.device)
    require(bool((values > 0).all()), "values > 0", temperature, "temperature")
    return values


def _check_targets(targets: torch.Tensor, vocab: int) -> None:
    valid = ((targets >= 0) & (targets < vocab)) | (targets == IGNORE)
    if not bool(valid.all()):
        raise ValueError(f"expected ids in [0, {vocab}) or {IGNORE}, got {int(targets[~valid][0])} (targets)")


def _check_offsets(group_offsets: torch.Tensor, count: int) -> None:
    good = group_offsets.dtype == torch.int32 and group_offsets.dim() == 1 and group_offsets.numel() >= 1
    require(good, "int32 [G + 1]", _kind(group_offsets), "group_offsets")
    values = group_offsets.tolist()
    rising = all(a <= b for a, b in pairwise(values))
    require(values[0] == 0 and values[-1] == count and rising, f"ascending from 0 to {count}", values, "group_offsets")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
