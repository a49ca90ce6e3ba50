"""GRPO on the engine's own rollouts: the loop, checkpoints, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.rollout import checkpoint, metrics, parallel, resumption, schedules
from foveate.rollout.batch import KLPenalty, make_batch
from foveate.rollout.checks import require
from foveate.rollout.collect import Collector, RewardFunction, seed_of
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Learner
from foveate.rollout.rewards import RewardTable
from foveate.rollout.types import Request, RolloutGroup


@dataclass(frozen=True, eq=False)
class StepRecord:
    """What one step learnt from. tables: the rewards of each group, None for a request that failed.

    With several ranks (`foveate.rollout.parallel`) groups and tables are this rank's, metrics are of all.
    """

    step: int
    groups: list[RolloutGroup]
    tables: list[RewardTable | None]
    metrics: dict[str, float]


class Trainer:
    """Generate, score, update, with an engine that reads this model's own parameters.

    model: the module the engine was made with. reward: of a group its `RewardTable` (`foveate.rollout.rewards`), or
    one number for each rollout, None where it cannot be scored; a function of the group alone, called as groups finish,
    see `GRPOConfig.reward_workers`.
    ref_model: the frozen policy of the KL term, where that has a weight. evaluate: called with the step count after
    every eval_every steps; its floats are reported as eval/<key>. output_dir: metrics.jsonl and checkpoints go there.
    callbacks: called with each `StepRecord`. In a process group every rank makes a trainer and calls the same methods
    with the same prompts; each rolls out its share, and rank 0 alone writes (`foveate.rollout.parallel`). Raises
    ValueError for a model the engine does not know, and for one with dropout: its log-probs would not be those of the
    policy that was sampled.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        reward: RewardFunction,
        config: GRPOConfig | None = None,
        *,
        ref_model: nn.Module | None = None,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callable[[StepRecord], None]] = (),
    ):
        require(config is None or isinstance(config, GRPOConfig), "a GRPOConfig or None", config, "config")
        self.config = config = config or GRPOConfig()
        require(engine.model is model, "an engine made with this model", type(engine.model).__name__, "engine")
        require(not config.needs_reference or ref_model is not None, "a model for kl_coef > 0", None, "ref_model")
        require(config.save_every == 0 or output_dir is not None, "a path for save_every > 0", None, "output_dir")
        require(config.eval_every == 0 or evaluate is not None, "a function for eval_every > 0", None, "evaluate")
        self._weights: Mapping[str, float] | None = getattr(reward, "weights", None)
        weighted = config.of_kind("advantage") != "gdpo" or self._weights is not None
        require(weighted, "a WeightedReward for advantage 'gdpo'", type(reward).__name__, "reward")
        metrics.check_extras(config.progress, config.tensorboard)
        self.model, self.engine, self.reward, self.ref_model = model, engine, reward, ref_model
        self.learner = Learner(model, ref_model, config)
        self.evaluate, self.callbacks = evaluate, list(callbacks)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.step, self.num_prompts = 0, 0  # prompts asked so far, dynamic sampling's included
        self._prompts: Callable[[], str | None] = lambda: None  # fingerprint of the whole data, where that is known
        self._begun_with: str | None = None  # the same of the run whose checkpoint was loaded

    def train(self, prompts: Sequence[Request] | Iterable[Request]) -> None:
        """Runs until max_steps, or once through the prompts.

        A sequence is shuffled anew each epoch, by (seed, epoch), and continues at the current step; any other
        iterable is consumed in order, and after a resume the caller hands over what is left after `num_prompts`. Raises
        ValueError for another sequence than that of the run whose checkpoint was loaded.
        """
        config, total = self.config, self._num_steps(prompts)
        self.identify(prompts)
        same = self._prompts() if parallel.size() > 1 else None
        parallel.check_same(config=config, step=self.step, prompts=same, weights=parallel.fingerprint(self.model))
        with self._log(total) as log:
            for requests, more in self._batches(prompts):
                record = self.train_step(requests, more)
                if config.eval_every and self.step % config.eval_every == 0:
                    record.metrics.update({f"eval/{key}": value for key, value in self._evaluate().items()})
                log.write(self.step, record.metrics)
                for callback in self.callbacks:
                    callback(record)
                if config.save_every and self.step % config.save_every == 0:
                    self.save_checkpoint(self.output_dir / f"step-{self.step}")  # type: ignore[operator]

    def train_step(self, requests: Sequence[Request], more: Iterable[Request] = ()) -> StepRecord:
        """One rollout batch and its updates: generate and reward, update, tell the engine.

        more: where dynamic sampling finds prompts in place of those of `requests` that teach nothing.
        """
        clock = metrics.Clock()
        found = Collector(self.engine, self.reward, self.config, clock).collect(requests, self.step, iter(more))
        rate, kl_coef = (schedule(self.config, self.step) for schedule in (schedules.learning_rate, schedules.kl_coef))
        penalty = KLPenalty(self.learner.kl, kl_coef) if self.config.kl_in == "reward" else None
        with clock.phase("update"):
            batch = make_batch(found.groups, found.tables, self.config, self._weights, penalty)
            report = self.learner.update(batch, rate, kl_coef if penalty is None else 0.0, self.step + 1)
        with clock.phase("sync"):
            self.engine.update_weights()
        self.step += 1
        self.num_prompts += found.num_prompts
        everyone = parallel.gather(found.scored).items
        rollouts = [sample.rollout for sample in batch.samples]
        ends = parallel.gather([(len(rollout.token_ids), rollout.finish_reason) for rollout in rollouts]).items
        report |= metrics.reward_metrics([table for table in everyone if table is not None])
        if batch.kl is not None:
            sums = parallel.gather(batch.kl[batch.taught].tolist()).items
            report |= metrics.reward_kl_metrics(sums, kl_coef)
        report |= metrics.completion_metrics(ends)
        report |= clock.metrics(sum(length for length, _ in ends))
        report |= {"step": float(self.step), "group/failed": float(everyone.count(None))}
        if self.config.sampling_rounds:
            report |= {"group/drawn": float(found.num_prompts), "group/rounds": float(found.rounds)}
        return StepRecord(self.step, found.groups, found.tables, report)

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must repeat, by name; all can be written as JSON."""
        prune = resumption.pruning_of(self.engine.config.prune)
        run = {"ranks": parallel.size(), "ref_model": self._reference, "prune": prune}
        return {**resumption.settings_of(self.config), **run}

    def save_checkpoint(self, directory: str | Path, write_more: Callable[[Path], None] | None = None) -> None:
        """Writes model, optimiser, step, settings and the generators of every rank; complete or not at all.

        Every rank calls it, rank 0 writes. write_more: see `checkpoint.save`.
        """
        state = {
            "step": self.step,
            "num_prompts": self.num_prompts,
            "num_requests": parallel.gather([self.engine.num_requests]).items,
            "settings": self.settings,
            "prompts": self._prompts(),
        }
        checkpoint.save(Path(directory), self.model, self.learner.optimizer, state, write_more)

    def load_checkpoint(self, directory: str | Path) -> None:
        """Continues where `save_checkpoint` stopped: the next step is that of the uninterrupted run.

        Every rank calls it. Raises ValueError, before anything has changed, naming the setting that is not the run's.
        """
        state = checkpoint.read_state(Path(directory))
        resumption.check_settings(state["settings"], self.settings)
        checkpoint.load(Path(directory), self.model, self.learner.optimizer)
        self.step, self.num_prompts = state["step"], state["num_prompts"]
        self.engine.num_requests = state["num_requests"][parallel.rank()]
        self._begun_with = state["prompts"]
        self._prompts = lambda: state["prompts"]
        self.engine.update_weights()

    def identify(self, prompts: Sequence[Request] | Iterable[Request]) -> None:
        """Refuses another sequence than that of the run that is resumed, and remembers this one."""
        self._prompts = lambda: None
        if isinstance(prompts, Sequence):
            self._prompts = cache(lambda: resumption.prompt_fingerprint(prompts))
            if self._begun_with is not None:
                same = self._prompts() == self._begun_with
                require(same, "the prompts with which the run was begun", "others", "prompts")
        self._begun_with = None  # it was for the first call

    @cached_property
    def _reference(self) -> str | None:
        """Of its weights, which do not change."""
        return None if self.ref_model is None else resumption.checksum(dict(self.ref_model.named_parameters()))

    def _batches(
        self, prompts: Sequence[Request] | Iterable[Request]
    ) -> Iterator[tuple[list[Request], Iterator[Request]]]:
        """The prompts of each step, and those that may take their place."""
        size, limit = self.config.prompts_per_step, self.config.max_steps
        if not isinstance(prompts, Sequence):
            iterator = iter(prompts)
            while (limit is None or self.step < limit) and (batch := list(islice(iterator, size))):
                yield batch, iterator
            return
        require(len(prompts) > 0, "at least one request", 0, "prompts")
        per_epoch = math.ceil(len(prompts) / size)
        while self.step < (limit or per_epoch):
            epoch, index = divmod(self.step, per_epoch)
            order = self._order(len(prompts), "epoch", epoch)
            chosen = order[index * size : (index + 1) * size]
            yield [prompts[place] for place in chosen], self._others(prompts, set(chosen))

    def _others(self, prompts: Sequence[Request], chosen: set[int]) -> Iterator[Request]:
        """Of the step alone: a run that is resumed draws the same, and every epoch still has each prompt once."""
        for place in self._order(len(prompts), "more", self.step):
            if place not in chosen:
                yield prompts[place]

    def _order(self, count: int, *of: object) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, *of))
        return torch.randperm(count, generator=generator, device="cpu").tolist()

    def _log(self, total: int | None) -> metrics.MetricsLog:
        config = self.config
        if parallel.rank() > 0:
            return metrics.MetricsLog(None, total, self.step, "none", 1, False)
        return metrics.MetricsLog(
            self.output_dir, total, self.step, config.progress, config.log_every, config.tensorboard
        )

    def _num_steps(self, prompts: Sequence[Request] | Iterable[Request]) -> int | None:
        if self.config.max_steps is not None or not isinstance(prompts, Sequence):
            return self.config.max_steps
        return math.ceil(len(prompts) / self.config.prompts_per_step)

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        with torch.no_grad():
            return {key: float(value) for key, value in self.evaluate(self.step).items()}
