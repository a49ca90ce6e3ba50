"""Log-probabilities of given tokens from the last hidden state, a chunk of tokens at a time.

`forward`, `backward` and `with_gradients` take what `foveate.kernels.policy_loss.linear_logprobs` has checked, with a
temperature for each row (float [N], in the dtype that is computed in) and `allowed` as it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from foveate.kernels.policy_loss.arguments import IGNORE

# Logits held at a time, in elements: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24
LOWEST = -1e4  # of a centred logit: e^LOWEST is 0, and 0 times it is no NaN

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def forward(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    softcap: float | None,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob of the target, log-sum-exp, entropy; each [N] in the dtype of `temperatures`. No autograd."""
    dtype = temperatures.dtype
    logprobs, logsumexp, entropy = (torch.zeros_like(temperatures) for _ in range(3))
    head, offset = lm_head.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(hidden.shape[0], lm_head.shape[0]):
            z, _ = _scaled(hidden[rows].to(dtype), head, offset, temperatures[rows], softcap, _part(allowed, rows))
            chunk = _softmax(z, targets[rows], infinite=allowed is not None or bias is not None)
            logprobs[rows], logsumexp[rows], entropy[rows] = chunk.logprob, chunk.logsumexp, chunk.entropy
    ignored = targets == IGNORE
    for result in (logprobs, logsumexp, entropy):
        result.masked_fill_(ignored, 0.0)
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
) -> Gradients:
    """Gradients of hidden, lm_head and bias, in their dtypes; None where not needed.

    logsumexp, entropy: of `forward`. g_*: gradients with respect to its results, [N].
    """
    dtype = temperatures.dtype
    head, offset = lm_head.to(dtype), None if bias is None else bias.to(dtype)
    kept = targets != IGNORE
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_head = torch.zeros_like(head) if need_head else None
    d_bias = torch.zeros_like(head[:, 0]) if need_bias else None
    grads = (g_logprob, g_logsumexp, g_entropy)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(hidden.shape[0], lm_head.shape[0]):
            # A row that is ignored may hold NaN, which 0 times it would keep.
            x = hidden[rows].to(dtype).masked_fill(~kept[rows, None], 0.0)
            part = _part(allowed, rows)
            z, slope = _scaled(x, head, offset, temperatures[rows], softcap, part)
            d_z = _grad_z(z.log_softmax(-1), targets[rows], entropy[rows], kept[rows], *(g[rows] for g in grads))
            if part is not None:
                d_z.masked_fill_(~part, 0.0)  # a target outside the allowed ids
            d_logits = d_z.div_(temperatures[rows, None])
            d_logits = d_logits if slope is None else d_logits.mul_(slope)
            if d_hidden is not None:
                d_hidden[rows] = (d_logits @ head).to(hidden.dtype)
            if d_head is not None:
                d_head.addmm_(d_logits.T, x)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
    d_head = None if d_head is None else d_head.to(lm_head.dtype)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return d_hidden, d_head, d_bias


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
) -> Gradients:
    """Fills log-probs and entropies, [N], and returns the gradients of hidden, lm_head and bias, of one product fewer.

    slopes: called when those of a further chunk are filled; the derivatives of what is minimised by log-probs and by
    entropies (None: 0), each [N], of which those of the chunk are read. The gradients are in the dtype of
    `temperatures`; None where not needed.
    """
    dtype = temperatures.dtype
    head, offset = lm_head.to(dtype), None if bias is None else bias.to(dtype)
    ignored = targets == IGNORE
    d_hidden = torch.empty_like(hidden, dtype=dtype) if need_hidden else None
    d_head = torch.zeros_like(head) if need_head and not len(hidden) else None
    d_bias = torch.zeros_like(head[:, 0]) if need_bias else None
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(hidden.shape[0], lm_head.shape[0]):
            # A row that is ignored may hold NaN, which 0 times it would keep.
            x = hidden[rows].to(dtype).masked_fill(ignored[rows, None], 0.0)
            part = _part(allowed, rows)
            z, slope = _scaled(x, head, offset, temperatures[rows], softcap, part)
            chunk = _softmax(z, targets[rows], infinite=allowed is not None or bias is not None)
            logprobs[rows] = chunk.logprob.masked_fill(ignored[rows], 0.0)
            entropy[rows] = chunk.entropy.masked_fill(ignored[rows], 0.0)
            by_logprob, by_entropy = slopes()
            by_logprob = by_logprob[rows].masked_fill(ignored[rows], 0.0)
            by_entropy = None if by_entropy is None else by_entropy[rows].masked_fill(ignored[rows], 0.0)
            d_logits = chunk.gradient(targets[rows], temperatures[rows], by_logprob, by_entropy)
            if part is not None:
                d_logits.masked_fill_(~part, 0.0)  # a target outside the allowed ids
            d_logits = d_logits if slope is None else d_logits.mul_(slope)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ head
            if need_head:
                d_head = d_logits.T @ x if d_head is None else d_head.addmm_(d_logits.T, x)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
    return d_hidden, d_head, d_bias


class _Softmax(NamedTuple):
    """Of rows of z, centred by their largest: mass e^z, total of it, moments z e^z; and what follows of each row."""

    logprob: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor
    mass: torch.Tensor
    total: torch.Tensor
    moments: torch.Tensor

    def gradient(
        self,
        targets: torch.Tensor,
        temperatures: torch.Tensor,
        by_logprob: torch.Tensor,
        by_entropy: torch.Tensor | None,
    ) -> torch.Tensor:
        """By z times temperature, [rows, V], in the place of mass.

        d logprob / d z_j = [j = target] - p_j,  d entropy / d z_j = -p_j (log p_j + entropy).
        """
        rate = by_logprob / temperatures
        d = self.mass
        if by_entropy is None:
            d.mul_((-rate / self.total)[:, None])
        else:
            pull = by_entropy / temperatures
            # log p = z - log(total)
            d.mul_(((pull * (self.total.log() - self.entropy) - rate) / self.total)[:, None])
            d.sub_(self.moments.mul_((pull / self.total)[:, None]))
        return d.scatter_add_(1, targets.clamp(min=0)[:, None], rate[:, None])


def _softmax(z: torch.Tensor, targets: torch.Tensor, infinite: bool) -> _Softmax:
    """Of z [rows, V], in its place. infinite: whether an entry may be -inf."""
    # All from z - max z: a rounding of the log-sum-exp would be common to a whole row.
    peak = z.amax(-1, keepdim=True)
    z.sub_(peak)
    picked = z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    mass = z.exp()
    total = mass.sum(-1)
    log_total = total.log()
    if infinite:
        z.clamp_(min=LOWEST)
    moments = z.mul_(mass)
    entropy = log_total - moments.sum(-1) / total
    return _Softmax(picked - log_total, peak[:, 0] + log_total, entropy, mass, total, moments)


def _grad_z(log_p, targets, entropy, kept, g_logprob, g_logsumexp, g_entropy) -> torch.Tensor:
    """Gradient with respect to z [rows, V]; log_p is log softmax(z).

    d logprob / d z_j = [j = target] - p_j,  d logsumexp / d z_j = p_j,  d entropy / d z_j = -p_j (log p_j + entropy).
    """
    p = log_p.exp()
    d_z = _finite(log_p).add_(entropy[:, None]).mul_(-g_entropy[:, None])
    d_z.add_((g_logsumexp - g_logprob)[:, None]).mul_(p)
    d_z.scatter_add_(1, targets.clamp(min=0)[:, None], g_logprob[:, None])
    return d_z.masked_fill_(~kept[:, None], 0.0)


def _scaled(
    x: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    temperatures: torch.Tensor,
    softcap: float | None,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> z [rows, V], and the slope of the soft cap [rows, V] where there is one."""
    z = F.linear(x, head, bias)
    slope = None
    if softcap is not None:
        z = z.div_(softcap).tanh_()
        slope = 1 - z.square()
        z = z.mul_(softcap)
    z = z.div_(temperatures[:, None])
    return (z if allowed is None else z.masked_fill_(~allowed, -torch.inf)), slope


def _chunks(rows: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, vocab))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _part(allowed: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return allowed[rows] if allowed is not None and allowed.dim() == 2 else allowed


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """p log p is 0 where p is 0: -inf becomes 0, NaN stays."""
    return log_p.masked_fill(log_p == -torch.inf, 0.0)
