"""Log-probabilities of given tokens from the last hidden state, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Logits held at a time, in elements: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24


def linear_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    softcap: float | None,
    allowed: torch.Tensor | None,
    ignore: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `foveate.kernels.policy_loss.linear_logprobs`; arguments are checked there."""
    return _LinearLogprobs.apply(hidden, lm_head, bias, targets, temperatures, softcap, allowed, ignore)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, lm_head, bias, targets, temperatures, softcap, allowed, ignore):
        dtype = temperatures.dtype
        logprobs, logsumexp, entropy = (torch.zeros_like(temperatures) for _ in range(3))
        head, offset = lm_head.to(dtype), None if bias is None else bias.to(dtype)
        kept = targets != ignore
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden.shape[0], lm_head.shape[0]):
                z, _ = _scaled(hidden[rows].to(dtype), head, offset, temperatures[rows], softcap, _part(allowed, rows))
                logsumexp[rows] = z.logsumexp(-1)
                # Not z - logsumexp: its rounding would be common to a whole row and add up in the entropy.
                log_p = z.log_softmax(-1)
                logprobs[rows] = log_p.gather(1, targets[rows].clamp(min=0)[:, None])[:, 0]
                entropy[rows] = -(log_p.exp() * _finite(log_p)).sum(-1)
        results = [x.masked_fill_(~kept, 0.0) for x in (logprobs, logsumexp, entropy)]
        ctx.save_for_backward(hidden, lm_head, bias, targets, temperatures, allowed, entropy)
        ctx.softcap, ctx.ignore = softcap, ignore
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor):
        hidden, lm_head, bias, targets, temperatures, allowed, entropy = ctx.saved_tensors
        dtype = temperatures.dtype
        head, offset = lm_head.to(dtype), None if bias is None else bias.to(dtype)
        kept = targets != ctx.ignore
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        d_bias = None if bias is None or not ctx.needs_input_grad[2] else torch.zeros_like(head[:, 0])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden.shape[0], lm_head.shape[0]):
                x = hidden[rows].to(dtype)
                part = _part(allowed, rows)
                z, slope = _scaled(x, head, offset, temperatures[rows], ctx.softcap, part)
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
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_head, d_bias, None, None, None, None, None


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
