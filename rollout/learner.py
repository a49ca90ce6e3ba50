"""The optimiser steps on one batch of rollouts, in micro-batches that add up to the whole batch's loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from foveate.rollout import grpo, metrics, models, parallel
from foveate.rollout.config import require
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.policy import Sample, micro_batches, policy_logprobs

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step learns from. advantages, weights (of each token in the loss): float32 [samples]."""

    samples: list[Sample]
    advantages: torch.Tensor
    weights: torch.Tensor


class Learner:
    """Holds the optimiser (AdamW) of a model and applies the GRPO loss.

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
        self.device = self.spec.lm_head.weight.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, config)
        if config.gradient_checkpointing:
            # The older name, still the only one in transformers 5.5. Both checkpoint without re-entering autograd.
            renamed = getattr(model, "activation_checkpointing_enable", None)
            (renamed or model.gradient_checkpointing_enable)()  # type: ignore[operator]

    def update(self, batch: Batch, rate: float) -> dict[str, float]:
        """All optimiser steps on one batch at one learning rate, and what they report."""
        config = self.config
        parts = list(micro_batches(batch.samples, config.micro_batch_size, config.micro_batch_tokens))
        fixed: dict[int, dict[str, torch.Tensor]] = {}  # micro-batch -> log-probs that no update changes
        seen: list[dict[str, torch.Tensor]] = []
        norms = []
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _in_training(self.model):
            for _ in range(config.num_updates):
                self.optimizer.zero_grad(set_to_none=True)
                losses = []
                for index, part in enumerate(parts):
                    loss, tokens = self._loss(batch, part, fixed.setdefault(index, {}))
                    loss.backward()
                    losses.append(loss.detach())
                    seen.append(tokens)
                parallel.add_gradients(self.parameters)
                limit = config.max_grad_norm or math.inf
                norms.append(nn.utils.clip_grad_norm_(self.parameters, limit, error_if_nonfinite=True))
                self.optimizer.step()
        values = {name: torch.cat([tokens[name] for tokens in seen]) for name in (seen[0] if seen else ())}
        if fixed:
            values["logprob_difference_mean"] = torch.cat([logprobs["gap"] for logprobs in fixed.values()])
        # A rank whose requests all failed has nothing to report, and takes part in the sums all the same.
        sums = parallel.gather([metrics.token_sums(values)]).items
        gaps = parallel.gather([values["logprob_difference_mean"].max().item()] if fixed else []).items
        report = metrics.token_means(sums)
        report["policy/loss"] = sum(parallel.gather([float(sum(losses))]).items)
        report["policy/logprob_difference_max"] = max(gaps)
        return {**report, "optim/grad_norm": float(torch.stack(norms).mean()), "optim/lr": rate}

    def _loss(self, batch: Batch, part: slice, fixed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        """A micro-batch's share of the batch's loss, and its per-token values [N]."""
        config, samples = self.config, batch.samples[part]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            policy = policy_logprobs(self.spec, samples)
            if not fixed:
                fixed.update(self._fixed_logprobs(samples, policy.logprobs.detach()))
        lengths = torch.tensor([len(sample.rollout.token_ids) for sample in samples])
        advantages, weights = (
            x[part].repeat_interleave(lengths).to(self.device) for x in (batch.advantages, batch.weights)
        )
        terms = grpo.token_terms(
            policy.logprobs,
            fixed["old"],
            advantages,
            config,
            behaviour_logprobs=fixed["behaviour"],
            ref_logprobs=fixed.get("ref"),
        )
        loss = (weights * (terms.loss + config.kl_coef * terms.kl)).sum()
        tokens = {name: values.detach() for name, values in terms._asdict().items() if name != "loss"}
        tokens["entropy"] = policy.entropy.detach()
        if config.tis_cap is not None:
            tokens["tis_weight"] = grpo.importance_weights(fixed["old"], fixed["behaviour"], config.tis_cap)
        return loss, tokens

    @torch.no_grad()
    def _fixed_logprobs(self, samples: Sequence[Sample], current: torch.Tensor) -> dict[str, torch.Tensor]:
        """Log-probs float32 [N] of the old, behaviour and reference policies, and |engine - trainer|.

        The first update's own forward is the recomputed old policy: no forward is spent on it.
        """
        engine = torch.cat([sample.rollout.logprobs for sample in samples]).to(self.device)
        behaviour = torch.cat([sample.rollout.behaviour_logprobs for sample in samples]).to(self.device)
        old = engine if self.config.old_logprobs == "engine" else current
        fixed = {"old": old, "behaviour": behaviour, "gap": (engine - current).abs()}
        if self.ref_spec is not None:
            fixed["ref"] = policy_logprobs(self.ref_spec, samples).logprobs
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
