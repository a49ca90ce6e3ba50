"""Log-probs of tokens from logits that are ordinary tensors, problems for them, and what rounding may change."""

from __future__ import annotations

from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANTS = ["plain", "bias", "softcap", "allowed", "allowed_rows", "temperatures", "all"]


def logits_of(
    hidden: torch.Tensor,
    head: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(products, z): the formula with every intermediate an ordinary tensor."""
    products = hidden @ head.T
    logits = products if bias is None else products + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    return products, z if allowed is None else z.masked_fill(~allowed, -torch.inf)


def logprobs(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, **given: Any) -> Tensors:
    """Log-prob of each target, log-sum-exp and entropy of each row; given: as `logits_of` takes it."""
    _, z = logits_of(hidden, head, **given)
    log_p = z.log_softmax(-1)
    keep = targets != -100
    picked = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return tuple(torch.where(keep, x, 0.0) for x in (picked, z.logsumexp(-1), entropy))


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """hidden, head, bias, targets (every third ignored), cotangents [3, rows]"""
    hidden, head = torch.randn(rows, width) * 2, torch.randn(vocab, width) * width**-0.5 * 2
    targets = torch.randint(vocab, (rows,))
    targets[2::3] = -100
    tensors = hidden.to(dtype), head.to(dtype), torch.randn(vocab).to(dtype), targets, torch.randn(3, rows)
    return [x.to(DEVICE) for x in tensors]


def variant(name: str, rows: int, vocab: int, targets: torch.Tensor) -> dict[str, Any]:
    """Options of `logits_of` by name, but for a bias."""
    each = torch.rand(rows, vocab, device=DEVICE) < 0.6
    each[torch.arange(rows), targets.clamp(min=0)] = True
    every = torch.rand(vocab, device=DEVICE) < 0.6
    every[targets.clamp(min=0)] = True
    temperatures = torch.rand(rows, device=DEVICE) + 0.3
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "bias": {},
        "softcap": {"softcap": 2.0},
        "allowed": {"allowed": every},
        "allowed_rows": {"allowed": each},
        "temperatures": {"temperature": temperatures},
        "all": {"softcap": 3.0, "allowed": each, "temperature": temperatures},
    }
    return options[name]


def gradient_bounds(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    cotangents: torch.Tensor,
    dtype: torch.dtype,
    **given: Any,
) -> list[torch.Tensor]:
    """What roundings of one logit's gradient can change in the gradients of hidden, head and bias: of the log-sum-exp
    and 1 / temperature to float32, which are common to a row; of p, its factor, their product and that with the
    slope; of the cap's slope 1 - tanh^2, with tanh right to two ulp; and, in half precision, of the whole to `dtype`.
    """
    exact = hidden.double().requires_grad_(), head.double().requires_grad_()
    products, z = logits_of(*exact, **{**given, "bias": None if bias is None else bias.double()})
    log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
    surprise = log_p.masked_fill(log_p == -torch.inf, 0.0)
    entropy = -(log_p.exp() * surprise).sum(-1)
    out = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0], lse, entropy
    g = torch.where(targets != -100, cotangents.double(), 0.0)
    (d,) = torch.autograd.grad(out, products, list(g), retain_graph=True)
    (slope,) = torch.autograd.grad(z.masked_fill(log_p == -torch.inf, 0.0).sum(), products)
    tempered = isinstance(given.get("temperature"), torch.Tensor)
    shift = 4 + lse.abs() + (z.masked_fill(log_p == -torch.inf, 0.0).abs().amax(-1) if tempered else 0)
    eps = torch.finfo(torch.float32).eps
    shift = eps / 2 * shift[:, None]
    weight = g[:2].abs().sum(0)[:, None] + g[2].abs()[:, None] * (1 + (surprise + entropy[:, None]).abs())
    rounded = shift * log_p.exp() * weight * slope
    rounded = rounded + (0 if dtype == torch.float32 else d.abs() * torch.finfo(dtype).eps / 2)
    if given.get("softcap") is not None:
        temperature = given.get("temperature", torch.ones(len(z), device=z.device)).double()
        rounded = rounded + 2.5 * eps * d.abs() / slope.clamp(min=1e-300) / temperature[:, None]
    d = rounded.detach()
    bounds = [d @ exact[1].detach().abs(), d.T @ exact[0].detach().abs()]
    return [*bounds, d.sum(0)] if bias is not None else bounds
