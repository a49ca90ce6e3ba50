"""GRPO on the engine's own rollouts: the loop, checkpoints, evaluation."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.kernels.policy_loss import group_advantage
from foveate.rollout import checkpoint, grpo, metrics, parallel, resumption
from foveate.rollout.config import require
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Batch, Learner
from foveate.rollout.policy import Sample, check_trainable
from foveate.rollout.reward_pool import RewardPool
from foveate.rollout.rewards import RewardTable
from foveate.rollout.rewards.base import numbers
from foveate.rollout.types import Request, RolloutGroup

logger = logging.getLogger("foveate.trainer")


@dataclass(frozen=True, eq=False)
class StepRecord:
    """What one step made. tables: the rewards of each group, None for a request that failed.

    With several ranks (`foveate.rollout.parallel`) groups and tables are this rank's, metrics are of all.
    """

    step: int
    groups: list[RolloutGroup]
    tables: list[RewardTable | None]
    metrics: dict[str, float]


class Trainer:
    """Generate, score, update, with an engine that reads this model's own parameters.

    model: the module the engine was made with. reward: a group's `RewardTable` (`foveate.rollout.rewards`), a function
    of the group alone; it is called as groups finish, see `GRPOConfig.reward_workers`.
    ref_model: the frozen policy of the KL term, needed where kl_coef > 0. evaluate: called with the step count after
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
        reward: Callable[[RolloutGroup], RewardTable],
        config: GRPOConfig | None = None,
        *,
        ref_model: nn.Module | None = None,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        output_dir: str | Path | None = None,
        callbacks: Sequence[Callable[[StepRecord], None]] = (),
    ):
        self.config = config = config or GRPOConfig()
        require(engine.model is model, "an engine made with this model", type(engine.model).__name__, "engine")
        require(config.kl_coef == 0 or ref_model is not None, "a model for kl_coef > 0", None, "ref_model")
        require(config.save_every == 0 or output_dir is not None, "a path for save_every > 0", None, "output_dir")
        require(config.eval_every == 0 or evaluate is not None, "a function for eval_every > 0", None, "evaluate")
        metrics.check_extras(config.progress, config.tensorboard)
        self.model, self.engine, self.reward, self.ref_model = model, engine, reward, ref_model
        self.learner = Learner(model, ref_model, config)
        self.evaluate, self.callbacks = evaluate, list(callbacks)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.step = 0
        self._prompts: Callable[[], str | None] = lambda: None  # fingerprint of the whole data, where that is known
        self._begun_with: str | None = None  # the same of the run whose checkpoint was loaded

    def train(self, prompts: Sequence[Request] | Iterable[Request]) -> None:
        """Runs until max_steps, or once through the prompts.

        A sequence is shuffled anew each epoch, by (seed, epoch), and continues at the current step; any other
        iterable is consumed in order, and after a resume the caller hands over what is left. Raises ValueError for
        another sequence than that of the run whose checkpoint was loaded.
        """
        config, total = self.config, self._num_steps(prompts)
        self.identify(prompts)
        same = self._prompts() if parallel.size() > 1 else None
        parallel.check_same(config=config, step=self.step, prompts=same, weights=parallel.fingerprint(self.model))
        with self._log(total) as log:
            for requests in self._batches(prompts):
                record = self.train_step(requests)
                if config.eval_every and self.step % config.eval_every == 0:
                    record.metrics.update({f"eval/{key}": value for key, value in self._evaluate().items()})
                log.write(self.step, record.metrics)
                for callback in self.callbacks:
                    callback(record)
                if config.save_every and self.step % config.save_every == 0:
                    self.save_checkpoint(self.output_dir / f"step-{self.step}")  # type: ignore[operator]

    def train_step(self, requests: Sequence[Request]) -> StepRecord:
        """One rollout batch and its updates: generate and reward, update, tell the engine."""
        if parallel.size() > 1:
            parallel.check_same(requests=resumption.prompt_fingerprint(requests))
        clock = metrics.Clock()
        groups, tables = self._rollout(requests, clock)
        batch = self._batch(groups, tables)
        with clock.phase("update"):
            report = self.learner.update(batch, grpo.learning_rate(self.config, self.step))
        with clock.phase("sync"):
            self.engine.update_weights()
        self.step += 1
        everyone = parallel.gather(tables).items
        rollouts = [sample.rollout for sample in batch.samples]
        ends = parallel.gather([(len(rollout.token_ids), rollout.finish_reason) for rollout in rollouts]).items
        report |= metrics.reward_metrics([table for table in everyone if table is not None])
        report |= metrics.completion_metrics(ends)
        report |= clock.metrics(sum(length for length, _ in ends))
        report |= {"step": float(self.step), "group/failed": float(everyone.count(None))}
        return StepRecord(self.step, groups, tables, report)

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must repeat, by name; all can be written as JSON."""
        return {**resumption.settings_of(self.config), "ranks": parallel.size(), "ref_model": self._reference}

    def save_checkpoint(self, directory: str | Path, write_more: Callable[[Path], None] | None = None) -> None:
        """Writes model, optimiser, step, settings and the generators of every rank; complete or not at all.

        Every rank calls it, rank 0 writes. write_more: see `checkpoint.save`.
        """
        state = {
            "step": self.step,
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
        self.step, self.engine.num_requests = state["step"], state["num_requests"][parallel.rank()]
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

    def _rollout(
        self, requests: Sequence[Request], clock: metrics.Clock
    ) -> tuple[list[RolloutGroup], list[RewardTable | None]]:
        """Groups in request order and their rewards, None for a request that failed."""
        for index, request in enumerate(requests):
            check_trainable(request, request.request_id or f"prompts[{index}]")
        requests = parallel.share(self._seeded(requests))
        places = {id(request): index for index, request in enumerate(requests)}
        groups: dict[int, RolloutGroup] = {}
        with RewardPool(self._score, self.config.reward_workers) as pool:
            with clock.phase("rollout"):
                for group in self.engine.stream(requests):
                    index = places[id(group.request)]
                    groups[index] = group
                    if group.error is None:
                        pool.submit(index, group)
            with clock.phase("reward"):
                tables = pool.results()
        order = range(len(requests))
        return [groups[index] for index in order], [tables.get(index) for index in order]

    def _score(self, group: RolloutGroup) -> RewardTable:
        """The group's rewards, with None for a rollout that has no tokens to learn from."""
        table = self.reward(group)
        name, count = f"reward of request {group.request_id!r}", len(group.rollouts)
        require(len(table.totals) == count, f"{count} totals", len(table.totals), name)
        parts = {part: numbers(values, f"{name}, {part}") for part, values in table.parts.items()}
        table = RewardTable(parts, numbers(table.totals, name))
        for part, values in {**table.parts, "total": table.totals}.items():
            finite = all(value is None or math.isfinite(value) for value in values)
            require(finite, f"finite values of {part!r} or None", values, name)
        learnable = [len(r.token_ids) > 0 and r.finish_reason != "error" for r in group.rollouts]
        totals = [total if ok else None for total, ok in zip(table.totals, learnable, strict=True)]
        return replace(table, totals=totals)

    def _batch(self, groups: Sequence[RolloutGroup], tables: Sequence[RewardTable | None]) -> Batch:
        samples: list[Sample] = []
        totals: list[float | None] = []
        offsets = [0]
        for group, table in zip(groups, tables, strict=True):
            if table is None:
                logger.warning("request %r failed and is skipped: %s", group.request_id, group.error)
                continue
            for rollout, total in zip(group.rollouts, table.totals, strict=True):
                if len(rollout.token_ids):
                    samples.append(Sample(group, rollout))
                    totals.append(total)
            offsets.append(len(samples))
        if not any(parallel.gather([bool(samples)]).items):
            errors = [group.error for group in groups if group.error]
            raise RuntimeError(f"expected rollouts to learn from, got none of {len(groups)} requests: {errors[:1]}")
        advantages = group_advantage(
            torch.tensor([0.0 if total is None else total for total in totals], dtype=torch.float64),
            torch.tensor(offsets, dtype=torch.int32),
            ddof=self.config.advantage_ddof,
            eps=self.config.advantage_eps,
            scorable=torch.tensor([total is not None for total in totals], dtype=torch.bool),
        )
        # Samples without a reward teach nothing, and take no weight from those that do.
        taught = [index for index, total in enumerate(totals) if total is not None]
        weights = torch.zeros(len(samples))
        lengths = parallel.gather([len(samples[index].rollout.token_ids) for index in taught])
        if taught:
            options = self.config.aggregation, self.config.aggregation_length
            weights[taught] = grpo.sample_weights(torch.tensor(lengths.items), *options)[lengths.own]
        return Batch(samples, advantages, weights)

    def _batches(self, prompts: Sequence[Request] | Iterable[Request]) -> Iterator[list[Request]]:
        size, limit = self.config.prompts_per_step, self.config.max_steps
        if not isinstance(prompts, Sequence):
            iterator = iter(prompts)
            while (limit is None or self.step < limit) and (batch := list(islice(iterator, size))):
                yield batch
            return
        require(len(prompts) > 0, "at least one request", 0, "prompts")
        per_epoch = math.ceil(len(prompts) / size)
        while self.step < (limit or per_epoch):
            epoch, index = divmod(self.step, per_epoch)
            generator = torch.Generator().manual_seed(_seed(self.config.seed, "epoch", epoch))
            order = torch.randperm(len(prompts), generator=generator).tolist()
            yield [prompts[i] for i in order[index * size : (index + 1) * size]]

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

    def _seeded(self, requests: Sequence[Request]) -> list[Request]:
        """Gives each request without a seed one of (seed, step, place): rollouts do not depend on evaluations.

        All are copies, so that a group tells its place even where one request comes twice.
        """
        seeds = [
            _seed(self.config.seed, self.step, index) if request.sampling.seed is None else request.sampling.seed
            for index, request in enumerate(requests)
        ]
        return [
            replace(request, sampling=replace(request.sampling, seed=seed))
            for request, seed in zip(requests, seeds, strict=True)
        ]

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        with torch.no_grad():
            return {key: float(value) for key, value in self.evaluate(self.step).items()}


def _seed(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
