"""The last hidden states and rewards of a batch to a policy loss, its gradient and what it reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from foveate.kernels.dispatch import choose_among, require
from foveate.kernels.policy_loss.advantage import group_advantage
from foveate.kernels.policy_loss.arguments import kind_of
from foveate.kernels.policy_loss.logprobs import IGNORE, LogitChunks, linear_logprobs
from foveate.kernels.policy_loss.options import Formula, PolicyLossOptions
from foveate.kernels.policy_loss.reference import loss as reference

BACKENDS = ("triton", "reference")
DEFAULTS = PolicyLossOptions()
METRICS = reference.METRICS
# Reported where there is a reference, and where there are the engine's log-probs.
_WITH_REFERENCE = ("kl",)
_WITH_ROLLOUT = ("correction", "mismatch_k1", "mismatch_k3", "mismatch_abs", "mismatch_abs_max", "weight",
                 "weight_squared")  # fmt: skip


class PolicyLoss(NamedTuple):
    """loss: scalar, differentiable once; float32 (float64 if `hidden` is). metrics: see `mean_metrics`. logprobs: [N],
    those of the targets, without gradient: the old policy's of later updates.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    logprobs: torch.Tensor


def linear_policy_loss(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    *,
    advantages: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    sequence_ids: torch.Tensor,
    denominator: float | torch.Tensor,
    old_logprobs: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    kind: str = "grpo",
    options: PolicyLossOptions = DEFAULTS,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    allowed: torch.Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Policy loss of drawn tokens straight from the last hidden states, with the metrics of the same pass.

        loss = sum_i w_i (factor_i policy_i + kl_coef kl_i - entropy_coef entropy_i) / denominator

    over the active tokens i: those whose target is not -100 and whose mask, if given, is True. policy_i is the loss of
    `kind` (formulas: `foveate.kernels.policy_loss.reference.loss`, table: docs/policy_losses.md) from the token's
    log-prob, see `linear_logprobs`, and the advantage of its sequence; factor_i corrects for the mismatch of the
    engine; the rest are named in `PolicyLossOptions`. w_i is 1, or for aggregation "sequence" 1 / (active tokens of its
    sequence). KL in the reward is `kl_in_reward`, not part of this loss.

    Micro-batches of one denominator, that of the whole batch (`loss_denominator`), add up to the batch's loss and
    gradient. Dropped tokens and sequences stay in it. A sequence lies in one micro-batch, whole, as one run of tokens:
    sequence-level ratios, corrections and means need all of it.

    hidden: float [N, D]. lm_head: float [V, D]. targets: int64 [N]. advantages: float [S], or (rewards float [S] or
    [S, R], group_offsets int32 [G + 1]), for which `group_advantage` is called with the kind's own normalisation: both
    of the whole batch. sequence_ids: int32 [N] in [0, S). denominator: finite, > 0, a number or a scalar tensor.
    old_logprobs: float [N], None for the current ones (on policy, ratio 1). rollout_logprobs: float [N], those under
    which the engine drew the tokens (`rollout.behaviour_logprobs`). ref_logprobs: float [N]. mask: bool [N]; a token
    that it leaves out still has a log-prob, and its row of hidden must be finite: if not, loss and metrics are what
    they were, but the gradients of that row, of lm_head and of bias are NaN. A target of -100 leaves out the row
    itself, whatever it holds. temperature, bias, softcap, allowed: see `linear_logprobs`. No `[N, V]` tensor exists;
    nothing waits for the GPU beyond the checks of `linear_logprobs` and `group_advantage`. Raises ValueError on shapes,
    dtypes, and options without meaning together; on the CPU on sequence ids too, which on a GPU give NaN, and on a
    denominator that is a tensor. A NaN advantage gives a NaN loss.

    Where the gradient of a token follows from its own log-prob, it is computed in the forward pass, one chunk of tokens
    after another, and scaled in the backward pass: three products of the size of `hidden @ lm_head^T`, two if one of
    hidden and lm_head is frozen. A ratio of whole sequences (gspo, gspo_token) to given old log-probs, a correction or
    rejection of whole sequences without them, and off_policy_limit take the log-probs of a whole sequence first, and
    the logits are computed twice. Gradients accumulate in float32 and are rounded to their dtype once, when they are
    scaled; between the passes they take (N + V) D elements, in float32. Which tokens lie in a chunk depends on V
    and on their places alone. There is no second derivative: RuntimeError.
    """
    kept = targets != IGNORE
    if mask is not None:
        require(
            mask.dtype == torch.bool and mask.shape == kept.shape, f"bool {list(kept.shape)}", kind_of(mask), "mask"
        )
        kept &= mask
    given: dict[str, Any] = {
        "advantages": advantages,
        "sequence_ids": sequence_ids,
        "denominator": denominator,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "ref_logprobs": ref_logprobs,
        "mask": kept,
        "kind": kind,
        "options": options,
        "backend": backend,
    }
    form: dict[str, Any] = {
        "temperature": temperature,
        "bias": bias,
        "softcap": softcap,
        "allowed": allowed,
        "backend": backend,
    }
    leaves = hidden, lm_head, bias
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    if not trained or options.resolve(kind).needs_sequences(old_logprobs is None):
        out = linear_logprobs(hidden, lm_head, targets, **form)
        return logprob_policy_loss(out.logprobs, out.entropy, **given)
    chunks = LogitChunks(hidden, lm_head, targets, **form)
    problem = _Problem.of(chunks.logprobs, chunks.entropy, **given)
    evaluated: list[_Evaluated] = []

    def slopes() -> tuple[torch.Tensor, torch.Tensor | None]:
        evaluated[:] = [problem.evaluate()]
        return evaluated[0][1:3]

    gradients = chunks.gradients(slopes)
    loss, _, _, sums = evaluated[0] if evaluated else problem.evaluate()
    return PolicyLoss(_WithGradient.apply(loss, *leaves, *gradients), problem.metrics(sums), chunks.logprobs)


def logprob_policy_loss(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    *,
    advantages: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    sequence_ids: torch.Tensor,
    denominator: float | torch.Tensor,
    old_logprobs: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    kind: str = "grpo",
    options: PolicyLossOptions = DEFAULTS,
    backend: str | None = None,
) -> PolicyLoss:
    """`linear_policy_loss` from log-probs and entropies, both float32 or float64 [N], that came from elsewhere.

    The gradient with respect to both, where one is asked for, is computed with the loss; the backward pass multiplies
    it.
    """
    problem = _Problem.of(
        logprobs,
        entropy,
        advantages=advantages,
        sequence_ids=sequence_ids,
        denominator=denominator,
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        kind=kind,
        options=options,
        backend=backend,
    )
    if not (torch.is_grad_enabled() and (logprobs.requires_grad or entropy.requires_grad)):
        loss, sums = problem.values()
        return PolicyLoss(loss, problem.metrics(sums), logprobs.detach())
    loss, d_logprobs, d_entropy, sums = problem.evaluate()
    attached = _WithGradient.apply(loss, logprobs, entropy, d_logprobs, d_entropy)
    return PolicyLoss(attached, problem.metrics(sums), logprobs.detach())


def loss_denominator(lengths: torch.Tensor, aggregation: str, constant: int | None = None) -> torch.Tensor:
    """What the loss of a batch is divided by, float64 scalar, from the active tokens of its sequences, int64 [S].

    token: sum(lengths), every token alike. sequence: S, every sequence alike. constant: S constant, as Dr. GRPO (arXiv
    2503.20783) with the generation cap as constant.
    """
    require(aggregation in ("token", "sequence", "constant"), "token, sequence or constant", aggregation, "aggregation")
    if aggregation == "token":
        return lengths.double().sum()
    if aggregation == "constant":
        require(constant is not None and constant > 0, "an int > 0", constant, "constant")
    scale = constant if aggregation == "constant" and constant is not None else 1
    return torch.full((), float(lengths.numel() * scale), dtype=torch.float64, device=lengths.device)


def add_metrics(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The metrics of micro-batches as those of one batch: sums, and the largest of each "_max"."""
    stacks = {name: torch.stack([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    return {name: x.amax(0) if name.endswith("_max") else x.sum(0) for name, x in stacks.items()}


def mean_metrics(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over the tokens of a batch, float64 scalars; NaN for a batch without tokens.

    clip_low, clip_high, clip_dual: shares of tokens where that bound binds. dropped: share whose policy term a
    correction or rejection removes. ratio, ratio_max: of current over old policy, by token or sequence as the kind has
    it. entropy: nats. With a reference, kl: the penalty as it enters. With the engine's log-probs: correction, the mean
    factor; mismatch_k1, mismatch_k3: estimates of KL(rollout || old); mismatch_abs, mismatch_abs_max: |old - rollout|;
    ess: (sum w)^2 / (tokens sum w^2) of w = e^(old - rollout), in (0, 1]. tokens stays a count.
    """
    means = {n: x if n == "tokens" or n.endswith("_max") else x / sums["tokens"] for n, x in sums.items()}
    if "weight" in means:
        means["ess"] = means.pop("weight").square() / means.pop("weight_squared")
    return means


# Loss, its gradients by logprobs and by entropy (None: 0), and the sums of METRICS.
_Evaluated = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients are already known: (loss, tensors, as many gradients or None).

    A gradient is scaled into the dtype of its tensor in one pass.
    """

    @staticmethod
    def forward(ctx: Any, loss, *tensors):
        leaves, gradients = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.dtypes = [None if x is None else x.dtype for x in leaves]
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("expected create_graph=False, got True: a policy loss has no second derivative")
        given = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [x if x is None else torch.mul(x, grad, out=torch.empty_like(x, dtype=dtype)) for x, dtype in given]
        return None, *scaled, *(None for _ in scaled)


class _Problem(NamedTuple):
    """A loss of given log-probs and entropies, which may change between evaluations."""

    tokens: reference.Tokens
    formula: Formula
    denominator: torch.Tensor
    backend: str

    @classmethod
    def of(
        cls,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
        *,
        advantages: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        sequence_ids: torch.Tensor,
        denominator: float | torch.Tensor,
        old_logprobs: torch.Tensor | None,
        rollout_logprobs: torch.Tensor | None,
        ref_logprobs: torch.Tensor | None,
        mask: torch.Tensor | None,
        kind: str,
        options: PolicyLossOptions,
        backend: str | None,
    ) -> _Problem:
        """ValueError as `logprob_policy_loss`."""
        formula = options.resolve(kind)
        _check_sources(options, old_logprobs, rollout_logprobs, ref_logprobs)
        if isinstance(advantages, tuple):
            rewards, group_offsets = advantages
            advantages = group_advantage(rewards, group_offsets, kind=formula.advantage)
        _check_vectors(logprobs, entropy, old_logprobs, rollout_logprobs, ref_logprobs, mask)
        _check_sequences(sequence_ids, advantages, logprobs)
        active = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
        given = (old_logprobs, rollout_logprobs, ref_logprobs)
        old, rollout, ref = (None if x is None else x.detach().to(logprobs) for x in given)
        per_sequence = advantages.detach().to(logprobs)
        tokens = reference.Tokens(
            logprobs.detach(), entropy.detach(), old, rollout, ref, sequence_ids, active, per_sequence
        )
        chosen = choose_among(BACKENDS, "the policy loss", "policy_loss", backend, logprobs.device, logprobs.dtype)
        return cls(tokens, formula, _scalar(denominator, logprobs), chosen)

    def evaluate(self) -> _Evaluated:
        run = _in_triton if self.backend == "triton" else _in_torch
        return run(self.tokens, self.formula, self.denominator)

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and sums alone: without autograd, which `torch.inference_mode` forbids."""
        if self.backend == "triton":  # its gradients come with the loss
            loss, _, _, sums = self.evaluate()
            return loss, sums
        with torch.no_grad():
            tokens = self.tokens._replace(sequence_ids=self.tokens.sequence_ids.long())
            loss, terms = reference.policy_loss(tokens, self.formula, self.denominator)
            return loss, reference.metric_sums(terms, tokens.active)

    def metrics(self, sums: torch.Tensor) -> dict[str, torch.Tensor]:
        absent = {*(_WITH_REFERENCE if self.tokens.ref is None else ())}
        absent |= {*(_WITH_ROLLOUT if self.tokens.rollout is None else ())}
        return {name: x for name, x in zip(METRICS, sums.unbind(), strict=True) if name not in absent}


def _in_torch(tokens: reference.Tokens, formula: Formula, denominator: torch.Tensor) -> _Evaluated:
    """By autograd over vectors of [N]."""
    leaves = [x.detach().requires_grad_() for x in (tokens.logprobs, tokens.entropy)]
    tokens = tokens._replace(logprobs=leaves[0], entropy=leaves[1], sequence_ids=tokens.sequence_ids.long())
    with torch.enable_grad():
        loss, terms = reference.policy_loss(tokens, formula, denominator)
        d_logprobs, d_entropy = torch.autograd.grad(loss, leaves, materialize_grads=True)
    sums = reference.metric_sums(terms, tokens.active)
    return loss.detach(), d_logprobs, d_entropy if formula.entropy_coef else None, sums


def _in_triton(tokens: reference.Tokens, formula: Formula, denominator: torch.Tensor) -> _Evaluated:
    from foveate.kernels.policy_loss import triton_loss

    optional = (tokens.old, tokens.rollout, tokens.ref)
    old, rollout, ref = (None if x is None else x.contiguous() for x in optional)
    dense = reference.Tokens(
        tokens.logprobs.contiguous(),
        tokens.entropy.contiguous(),
        old,
        rollout,
        ref,
        tokens.sequence_ids.contiguous(),
        tokens.active.contiguous(),
        tokens.advantages.contiguous(),
    )
    return triton_loss.policy_loss(dense, formula, denominator)


def _scalar(denominator: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if isinstance(denominator, torch.Tensor):
        require(denominator.numel() == 1, "a scalar", kind_of(denominator), "denominator")
        denominator = denominator.detach()
        if denominator.is_cuda:  # not waited for
            return denominator.reshape(()).to(like.device, torch.float64)
    require(0 < float(denominator) < math.inf, "a finite number > 0", denominator, "denominator")
    return torch.full((), float(denominator), dtype=torch.float64, device=like.device)


def _check_sources(options: PolicyLossOptions, old, rollout, ref) -> None:
    needed = {
        "rollout_logprobs": [
            n for n in ("correction", "rejection", "off_policy_limit") if getattr(options, n) is not None
        ],
        "ref_logprobs": ["kl_coef"] if options.kl_coef else [],
    }
    for (argument, names), given in zip(needed.items(), (rollout, ref), strict=True):
        require(not names or given is not None, f"float [N] for {', '.join(names)}", given, argument)
    for name in ("correction", "rejection"):
        twice = old is not None and old is rollout and getattr(options, name) is not None
        reason = "None: the ratio to the engine's own log-probs needs no correction"
        require(not twice, reason, getattr(options, name), name)


def _check_vectors(logprobs, entropy, old, rollout, ref, mask) -> None:
    good = logprobs.dim() == 1 and logprobs.dtype in (torch.float32, torch.float64)
    require(good, "float32 or float64 [N]", kind_of(logprobs), "logprobs")
    require(entropy.dtype == logprobs.dtype, str(logprobs.dtype), kind_of(entropy), "entropy")
    names = ("entropy", "old_logprobs", "rollout_logprobs", "ref_logprobs")
    for name, x in zip(names, (entropy, old, rollout, ref), strict=True):
        good = x is None or (x.is_floating_point() and x.shape == logprobs.shape)
        require(good, f"float {list(logprobs.shape)}", x if x is None else kind_of(x), name)
    if mask is not None:
        good = mask.dtype == torch.bool and mask.shape == logprobs.shape
        require(good, f"bool {list(logprobs.shape)}", kind_of(mask), "mask")


def _check_sequences(sequence_ids: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor) -> None:
    count, device = logprobs.numel(), logprobs.device
    require(advantages.dim() == 1 and advantages.is_floating_point(), "float [S]", kind_of(advantages), "advantages")
    good = sequence_ids.dtype == torch.int32 and sequence_ids.shape == (count,)
    require(good, f"int32 [{count}]", kind_of(sequence_ids), "sequence_ids")
    require(sequence_ids.device == device, f"a tensor on {device}", str(sequence_ids.device), "sequence_ids")
    if sequence_ids.is_cuda or count == 0:
        return
    size = advantages.numel()
    inside = bool(((sequence_ids >= 0) & (sequence_ids < size)).all())
    require(inside, f"ids in [0, {size})", sequence_ids.tolist(), "sequence_ids")
    runs = sequence_ids.unique_consecutive().numel()
    whole = runs == sequence_ids.unique().numel()
    require(whole, "one run of tokens for each sequence", sequence_ids.tolist(), "sequence_ids")
