"""The optimiser steps on one batch of rollouts, in micro-batches that add up to the whole batch's loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from foveate.kernels.policy_loss import (
    PolicyLoss,
    PolicyLossOptions,
    add_metrics,
    kl_estimate,
    linear_policy_loss,
)
from foveate.rollout import metrics, models, parallel
from foveate.rollout.batch import Batch
from foveate.rollout.checks import require
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.policy import policy_logprobs, predict
from foveate.rollout.prefix_groups import Packer, Sample, micro_batches, row_inputs

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Learner:
    """Holds the optimiser (AdamW) of a model and applies the policy loss.

    ref_model: the frozen policy of the KL term, or None. Raises ValueError for a model with dropout: its log-probs
    would not be those of the policy that was sampled.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module | None, config: GRPOConfig):
        _refuse_dropout(model)
        if ref_model is not None:
            _refuse_dropout(ref_model)
            own = {id(parameter) for parameter in model.parameters()}
            shared = [name for name, parameter in ref_model.named_parameters() if id(parameter) in own]
            require(not shared, "a reference model with parameters of its own", shared[:1], "ref_model")
        self.model, self.config = model, config
        self.spec = models.describe(model)
        self.ref_spec = None if ref_model is None else models.describe(ref_model)
        self.packer = Packer.of(self.spec, config.prefix_grouping)
        self.device = self.spec.lm_head.weight.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, config)
        if config.gradient_checkpointing:
            # The older name, still the only one in transformers 5.5. Both checkpoint without re-entering autograd.
            renamed = getattr(model, "activation_checkpointing_enable", None)
            (renamed or model.gradient_checkpointing_enable)()  # type: ignore[operator]

    def update(self, batch: Batch, rate: float, kl_coef: float | None = None, step: int = 1) -> dict[str, float]:
        """All optimiser steps on one batch at one learning rate, and what they report.

        kl_coef: weight of the KL penalty, None is that of the configuration. step: what errors call the batch. Raises
        RuntimeError on a loss or gradient that is not finite, before the weights have changed by it.
        """
        config = self.config
        options = replace(config.loss_options, kl_coef=config.kl_coef if kl_coef is None else kl_coef)
        parts = list(self._micro_batches(batch.samples))
        fixed: list[dict[str, torch.Tensor]] = [{} for _ in parts]  # log-probs of each that no update changes
        seen: list[Mapping[str, torch.Tensor]] = []
        norms = []
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _in_training(self.model):
            for index in range(config.num_updates):
                self.optimizer.zero_grad(set_to_none=True)
                total = torch.zeros((), dtype=torch.float64, device=self.device)
                for part, logprobs in zip(parts, fixed, strict=True):
                    out = self._loss(batch, part, logprobs, options)
                    out.loss.backward()
                    total += out.loss.detach()
                    seen.append(out.metrics)
                loss, norm = self._step(total, f"step {step}, update {index + 1} of {config.num_updates}")
                norms.append(norm)
        report = metrics.policy_metrics(parallel.gather([metrics.as_floats(add_metrics(seen))]).items)
        gap = torch.cat([logprobs["gap"] for logprobs in fixed]) if fixed else torch.zeros(0, device="cpu")
        # A rank whose requests all failed has nothing to report, and takes part in the sums all the same.
        gaps = (float(gap.sum()), float(gap.max()), len(gap)) if fixed else (0.0, 0.0, 0)
        report |= metrics.difference_metrics(parallel.gather([gaps]).items)
        report["policy/loss"] = loss  # of the last update
        forwarded = sum(row_inputs(row) for part in parts for row in self.packer.rows(batch.samples[part]))
        report["throughput/tokens_forwarded"] = float(sum(parallel.gather([forwarded]).items))
        return {**report, "optim/grad_norm": sum(norms) / len(norms), "optim/lr": rate}

    def _step(self, loss: torch.Tensor, where: str) -> tuple[float, float]:
        """One step of the optimiser on the gradients of all ranks: their loss, and the norm before clipping.

        loss: float64 scalar, this rank's share.
        """
        parallel.add_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        own, size = torch.stack([loss, norm.to(loss)]).tolist()  # the one wait for the device
        # A loss may be NaN where its gradient is not, as where a log-prob is -inf. All ranks see the same sum and stop.
        whole = sum(parallel.gather([own]).items)
        finite = math.isfinite(whole) and math.isfinite(size)
        if not finite:
            raise RuntimeError(f"expected a finite loss and gradient norm, got {whole} and {size} ({where})")
        self.optimizer.step()
        return whole, size

    @torch.no_grad()
    def kl(self, samples: Sequence[Sample]) -> torch.Tensor:
        """kl_kind's estimate of KL(model || reference) at every token of the samples, float [N], nats.

        Both by the same forward, so that a copy of the model is exactly 0 away from it.
        """
        assert self.ref_spec is not None
        parts = []
        for part in self._micro_batches(samples):
            own, other = (self._logprobs(spec, samples[part]) for spec in (self.spec, self.ref_spec))
            parts.append(kl_estimate(own, other, self.config.kl_kind))
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def _micro_batches(self, samples: Sequence[Sample]) -> Iterator[slice]:
        return micro_batches(samples, self.config.micro_batch_size, self.config.micro_batch_tokens, self.packer)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _engine_logprobs(self, samples: Sequence[Sample]) -> torch.Tensor:
        return torch.cat([sample.rollout.logprobs for sample in samples]).to(self.device)

    def _logprobs(self, spec: models.ModelSpec, samples: Sequence[Sample]) -> torch.Tensor:
        """Under a model, float32 [N]; without gradients, where the caller has none."""
        with self._autocast():
            return policy_logprobs(spec, samples, prefix_grouping=self.config.prefix_grouping).logprobs

    def _loss(
        self, batch: Batch, part: slice, fixed: dict[str, torch.Tensor], options: PolicyLossOptions
    ) -> PolicyLoss:
        """A micro-batch's share of the batch's loss.

        fixed: filled by the first update, whose own forward is the recomputed old policy: no forward is spent on it.
        """
        samples, head = batch.samples[part], self.spec.lm_head
        lengths = torch.tensor([len(sample.rollout.token_ids) for sample in samples], device="cpu")
        ids = torch.arange(len(samples), device="cpu").repeat_interleave(lengths)
        first = not fixed
        with self._autocast():
            hidden, targets, temperatures = predict(self.spec, samples, self.packer)
        if first:
            fixed |= self._fixed_logprobs(samples)
        out = linear_policy_loss(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            temperature=temperatures,
            advantages=batch.advantages[part].to(self.device),
            sequence_ids=ids.int().to(self.device),
            mask=batch.taught[part][ids].to(self.device),
            denominator=batch.denominator,
            old_logprobs=fixed.get("old"),
            rollout_logprobs=fixed["behaviour"],
            ref_logprobs=fixed.get("ref"),
            kind=self.config.kind,
            options=options,
        )
        if first:
            fixed["gap"] = (fixed["engine"] - out.logprobs).abs()
            fixed.setdefault("old", out.logprobs)
        return out

    @torch.no_grad()
    def _fixed_logprobs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Log-probs float32 [N] of the engine's model, of its draws, of the reference, of the old policy if known."""
        engine = self._engine_logprobs(samples)
        behaviour = torch.cat([sample.rollout.behaviour_logprobs for sample in samples]).to(self.device)
        fixed = {"engine": engine, "behaviour": behaviour}
        if self.config.old_logprobs == "engine":
            fixed["old"] = engine
        if self.ref_spec is not None and self.config.kl_in == "loss":
            fixed["ref"] = self._logprobs(self.ref_spec, samples)
        return fixed


def _optimizer(parameters: Sequence[nn.Parameter], config: GRPOConfig) -> torch.optim.AdamW:
    """AdamW; biases and norms are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.adam_eps, fused=True)


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing asks for training mode; every module is put back as it was, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, _DROPOUTS) else getattr(module, "attention_dropout", 0.0)
        require(not isinstance(rate, (int, float)) or rate == 0, "no dropout", rate, name)
