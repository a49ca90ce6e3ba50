"""Log-probs and policy loss from hidden states, with gradients; run as `python benchmarks/bench_policy_loss.py`.

A call is a forward and a backward pass: `linear_logprobs` of -sum log-prob, `linear_policy_loss` of GRPO, both with the
gradients of hidden states and LM head. On a GPU a row has the peak of allocated memory beyond the inputs, of the kernel
and of its peers:

    torch, compile    write the logits; the second under torch.compile, on a GPU
    twice             of linear_policy_loss: log-probs first, whose backward pass computes the logits again
    liger             Liger-Kernel's fused cross-entropy, on a GPU; its chunked GRPO loss
    liger_triton      its GRPO loss in Triton, from written logits, on a GPU
    cce               cut-cross-entropy, which leaves small gradients out, on a GPU

Those that are not installed are named on stderr. Logits are normal with deviation 3.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache, lru_cache, partial
from importlib.util import find_spec

import floors
import torch
import torch.nn.functional as F
from common import Options, backends_of, main
from measurement import Measurement, Results
from samplers import Inputs, Run

from foveate.kernels.policy_loss import (
    PolicyLossOptions,
    linear_logprobs,
    linear_policy_loss,
    logprob_policy_loss,
)

KERNELS = ("linear_logprobs", "linear_policy_loss")
SPREAD = 3.0
SEQUENCE = 512  # tokens of a sequence, or half of all
OPTIONS = PolicyLossOptions(clip_low=0.2, clip_high=0.2, aggregation="token")
Results3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(tokens: int, dim: int, vocab: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """hidden, lm_head, targets, advantages, sequence ids, old log-probs"""
    device = generator.device
    draw = partial(torch.randn, device=device, generator=generator)
    hidden, lm_head = draw(tokens, dim).to(dtype), (draw(vocab, dim) * SPREAD * dim**-0.5).to(dtype)
    targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
    length = min(SEQUENCE, tokens // 2)
    assert tokens % length == 0, (tokens, length)  # peers take [sequences, length]
    sequence_ids = torch.arange(tokens, device=device, dtype=torch.int32) // length
    old = logprobs_of(hidden, lm_head, targets) + 0.1 * draw(tokens)
    return hidden, lm_head, targets, draw(tokens // length), sequence_ids, old


def logprobs_of(hidden: torch.Tensor, lm_head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return linear_logprobs(hidden, lm_head, targets, backend="reference").logprobs


def with_gradients(loss_of: Run, hidden: torch.Tensor, lm_head: torch.Tensor, *rest: torch.Tensor) -> Results3:
    """loss, d_hidden, d_lm_head"""
    leaves = hidden.detach().requires_grad_(), lm_head.detach().requires_grad_()
    loss = loss_of(*leaves, *rest)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def entropy_of(backend: str, hidden, lm_head, targets, *_) -> torch.Tensor:
    return -linear_logprobs(hidden, lm_head, targets, backend=backend).logprobs.sum()


def loss_of(backend: str, hidden, lm_head, targets, advantages, sequence_ids, old) -> torch.Tensor:
    given = {"advantages": advantages, "sequence_ids": sequence_ids, "old_logprobs": old, "options": OPTIONS}
    return linear_policy_loss(hidden, lm_head, targets, **given, denominator=len(targets), backend=backend).loss


def loss_of_logprobs(backend: str, hidden, lm_head, targets, advantages, sequence_ids, old) -> torch.Tensor:
    out = linear_logprobs(hidden, lm_head, targets, backend=backend)
    given = {"advantages": advantages, "sequence_ids": sequence_ids, "old_logprobs": old, "options": OPTIONS}
    return logprob_policy_loss(*out[::2], **given, denominator=len(targets), backend=backend).loss


def torch_entropy(hidden, lm_head, targets, *_) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, lm_head).float(), targets, reduction="sum")


def torch_loss(hidden, lm_head, targets, advantages, sequence_ids, old) -> torch.Tensor:
    log_p = F.linear(hidden, lm_head).float().log_softmax(-1)
    ratio = (log_p.gather(1, targets[:, None])[:, 0] - old).exp()
    advantage = advantages[sequence_ids.long()]
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def liger_loss(hidden, lm_head, targets, advantages, sequence_ids, old) -> torch.Tensor:
    """ "dapo" is the mean over all tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    clips = {"epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "dapo"}
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=hidden.is_cuda, **clips)
    hidden, targets, old = (x.view(len(advantages), -1, *x.shape[1:]) for x in (hidden, targets, old))
    return loss(hidden, lm_head, targets, torch.ones_like(targets), advantages, old_per_token_logps=old)[0]


def liger_triton_loss(hidden, lm_head, targets, advantages, sequence_ids, old) -> torch.Tensor:
    """Its logits have one row more for each sequence, which it leaves out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    hidden, targets, old = (x.view(len(advantages), -1, *x.shape[1:]) for x in (hidden, targets, old))
    logits = F.linear(F.pad(hidden, (0, 0, 0, 1)), lm_head)
    mask = torch.ones_like(targets, dtype=torch.float32)
    form = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.2, "loss_type": "dapo", "reduce": True}
    return triton_grpo_loss(logits, old, None, targets, advantages, completion_mask=mask, **form)[0]


def liger_entropy(hidden, lm_head, targets, *_) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, lm_head, targets, reduction="sum")


def cce_entropy(hidden, lm_head, targets, *_) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, lm_head, targets, reduction="sum")


@lru_cache(maxsize=4)
def in_float64(loss: Run, hidden: torch.Tensor, lm_head: torch.Tensor, *rest: torch.Tensor) -> Results3:
    """Kept, as every contender is checked on the same inputs."""
    return with_gradients(loss, hidden.double(), lm_head.double(), *rest)


def check(exact_loss: Run, inputs: Inputs, results: Results, room: float) -> None:
    """Against the same in float64, of an element's size and of the largest.

    In half precision a logit's gradient is rounded once, and the result; a float32 sum has thousands of terms.
    """
    hidden = inputs[0]
    exact = in_float64(exact_loss, *inputs)
    for name, got, truth in zip(("loss", "gradient of hidden", "gradient of lm_head"), results, exact, strict=True):
        eps = torch.finfo(torch.float32 if name == "loss" else hidden.dtype).eps
        eps *= 32 if eps < 1e-6 else 1
        error = (got.double() - truth).abs()
        allowed = room * eps * (truth.abs() + truth.abs().amax())
        wrong = (~(error <= allowed)).nonzero()
        assert not len(wrong), (
            f"{name}: {len(wrong)} of {error.numel()} are wrong, the largest error is {error.max():.3g}"
        )


@cache
def installed(package: str) -> bool:
    found = find_spec(package) is not None
    if not found:
        print(f"skipped: peers of {package}, which is not installed", file=sys.stderr)
    return found


def peers_of(case: str, device: torch.device, backend: str) -> dict[str, Run]:
    """backend: the best there, for `twice`."""
    plain = {"linear_logprobs": torch_entropy, "linear_policy_loss": torch_loss}[case]
    found: dict[str, Run] = {"torch": plain}
    on_gpu = device.type == "cuda"
    if on_gpu:
        found["compile"] = torch.compile(plain)
    if case == "linear_policy_loss":
        found["twice"] = partial(loss_of_logprobs, backend)
        if installed("liger_kernel"):
            found |= {"liger": liger_loss} | ({"liger_triton": liger_triton_loss} if on_gpu else {})
    elif on_gpu:
        found |= {"liger": liger_entropy} if installed("liger_kernel") else {}
        found |= {"cce": cce_entropy} if installed("cut_cross_entropy") else {}
    return {name: partial(with_gradients, loss) for name, loss in found.items()}


def measurements(options: Options) -> Iterator[Measurement]:
    backends = [name for name in backends_of("policy_loss", options.device) if name in ("reference", "triton")]
    on_gpu = options.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shapes = [(256, 64, 1000), (64, 256, 49_152), (1024, 256, 8192)]
    if on_gpu:
        shapes = [(n, 2048, 151_936) for n in (1024, 8192, 32_768)]
        shapes += [(8192, 896, 151_936), (8192, 4096, 32_000), (8192, 3584, 152_064)]
    for tokens, dim, vocab in [(12, 16, 70)] if options.quick else shapes:
        for kernel, loss, floor in (
            ("linear_logprobs", entropy_of, floors.linear_logprobs),
            ("linear_policy_loss", loss_of, floors.linear_policy_loss),
        ):
            yield Measurement(
                kernel=kernel,
                shape={"N": tokens, "D": dim, "V": vocab},
                dtype=dtype,
                make_inputs=partial(make_inputs, tokens, dim, vocab, dtype),
                backends={name: partial(with_gradients, partial(loss, name)) for name in backends},
                check=partial(check, partial(loss, "reference")),
                floor=floor(tokens, dim, vocab, dtype.itemsize),
                peers=peers_of(kernel, options.device, backends[0]),
            )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, KERNELS, measurements))
