"""Supervised warm start: the model learns the format, and to see a good part of what a scene shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from foveate.rollout import models
from foveate.rollout.demo.scenes import Scene
from foveate.rollout.demo.tasks import make_request
from foveate.rollout.policy import Sample, policy_logprobs
from foveate.rollout.processor import Processor, PromptProcessor
from foveate.rollout.types import Rollout, RolloutGroup


@dataclass(frozen=True)
class WarmStartConfig:
    """AdamW on `batch_size` scenes a step until accuracy on the stopping set, every `check_every` steps, is enough."""

    learning_rate: float = 1e-3
    warmup_steps: int = 50
    batch_size: int = 32
    enough: float = 0.4
    check_every: int = 10
    max_steps: int = 300


class SupervisedTrainer:
    """Maximum likelihood of the scenes' targets, through the forward pass that GRPO uses.

    loss = -mean over completion tokens of log p(token), the end of the turn included.
    """

    def __init__(self, model: nn.Module, processor: Processor, config: WarmStartConfig):
        self.config, self.spec, self.tokenizer = config, models.describe(model), processor.tokenizer
        self.prompts = PromptProcessor(processor, self.spec.vision, self.spec.vocab_size)
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.num_steps = 0

    def step(self, scenes: Sequence[Scene]) -> float:
        """One update; returns the loss before it, nats per token."""
        self.num_steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, self.num_steps / self.config.warmup_steps)
        loss = -policy_logprobs(self.spec, [self._sample(scene) for scene in scenes]).logprobs.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        return loss.item()

    def _sample(self, scene: Scene) -> Sample:
        """The scene as if the policy had drawn its target."""
        request = make_request(scene)
        prompt = self.prompts.prepare(request)
        ids = torch.tensor([*self.tokenizer(scene.target)["input_ids"], self.tokenizer.eos_token_id], device="cpu")
        zeros = torch.zeros(len(ids), device="cpu")
        rollout = Rollout(ids, zeros, zeros, zeros, "stop", text=scene.target)
        vision = prompt.vision
        assert vision is not None, scene
        group = RolloutGroup(
            request=request,
            request_id="",
            prompt_ids=prompt.token_ids,
            prompt_positions=prompt.positions.to(torch.int32),
            next_position=prompt.next_position,
            segments=torch.tensor([len(prompt.token_ids)], dtype=torch.int32, device="cpu"),
            rollouts=(rollout,),
            image_grid_thw=vision.image_grid_thw,
            pixel_values=vision.pixel_values,
        )
        return Sample(group, rollout)


def warm_start(
    trainer: SupervisedTrainer,
    scenes: Iterator[Scene],
    accuracy: Callable[[], float],
    report: Callable[[int, float, float], None],
) -> None:
    """Trains until `accuracy()`, of a set that is used for nothing else, is enough or the steps are spent.

    report: called at each check with the step, the loss and the accuracy.
    """
    config = trainer.config
    while trainer.num_steps < config.max_steps:
        loss = trainer.step(list(itertools.islice(scenes, config.batch_size)))
        if trainer.num_steps % config.check_every == 0:
            value = accuracy()
            report(trainer.num_steps, loss, value)
            if value >= config.enough:
                return
