"""What one step learns from: samples, their advantages, and what their loss is divided by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from foveate.kernels.policy_loss import group_advantage, kl_in_reward, loss_denominator, sequence_sums
from foveate.rollout import parallel
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.prefix_groups import Sample
from foveate.rollout.rewards import RewardTable
from foveate.rollout.types import RolloutGroup

logger = logging.getLogger("foveate.trainer")


@dataclass(frozen=True, eq=False)
class Batch:
    """This rank's part of one step. advantages: float32 [samples]. taught: bool [samples], those with a reward; the
    others are no part of the loss. denominator: of the loss, the same on all ranks. kl: float64 [samples], what the
    penalty took from each reward over its weight, or None.
    """

    samples: list[Sample]
    advantages: torch.Tensor
    taught: torch.Tensor
    denominator: float
    kl: torch.Tensor | None = None


class KLPenalty(NamedTuple):
    """Subtracted from rewards before advantages. of: samples -> float [N], of their tokens one after another, nats."""

    of: Callable[[Sequence[Sample]], torch.Tensor]
    weight: float


class _Scored(NamedTuple):
    """One sample: the columns of its reward, whether it has them, and its number of tokens."""

    columns: tuple[float, ...]
    scorable: bool
    length: int


def make_batch(
    groups: Sequence[RolloutGroup],
    tables: Sequence[RewardTable | None],
    config: GRPOConfig,
    weights: Mapping[str, float] | None,
    penalty: KLPenalty | None = None,
) -> Batch:
    """The batch of groups and their rewards, None for a request that failed; in advantages, all ranks are one batch.

    weights: of the parts of the reward, for advantage "gdpo"; penalty: for the others. With a dense pruned_policy
    groups lose their plans. Samples without a reward teach nothing, and take no weight from those that do. Raises
    RuntimeError if there is no sample on any rank.
    """
    columns = _columns(config, weights)
    samples: list[Sample] = []
    scored: list[_Scored] = []
    sizes = []
    for group, table in zip(groups, tables, strict=True):
        if table is None:
            logger.warning("request %r failed and is skipped: %s", group.request_id, group.error)
            continue
        if config.pruned_policy == "dense" and group.keep is not None:
            group = replace(group, keep=None)
        places = [index for index, rollout in enumerate(group.rollouts) if len(rollout.token_ids)]
        samples += [Sample(group, group.rollouts[index]) for index in places]
        scored += [_score(table, index, len(group.rollouts[index].token_ids), columns) for index in places]
        sizes.append(len(places))
    kl = None
    if penalty is not None:
        scored, kl = _penalised(samples, scored, penalty)
    everyone = parallel.gather(scored)
    if not everyone.items:
        errors = [group.error for group in groups if group.error]
        raise RuntimeError(f"expected rollouts to learn from, got none of {len(groups)} requests: {errors[:1]}")
    advantages = _advantages(everyone.items, parallel.gather(sizes).items, config, columns)
    lengths = torch.tensor([sample.length for sample in everyone.items if sample.scorable], device="cpu")
    aggregation = config.loss_options.resolve(config.kind).aggregation
    denominator = float(loss_denominator(lengths, aggregation, config.aggregation_length)) if len(lengths) else 1.0
    taught = torch.tensor([sample.scorable for sample in scored], dtype=torch.bool, device="cpu")
    return Batch(samples, advantages[everyone.own], taught, denominator, kl)


def _columns(config: GRPOConfig, weights: Mapping[str, float] | None) -> dict[str, float] | None:
    """The parts of the reward that become columns, and their weights; None for one column, the totals."""
    if config.of_kind("advantage") != "gdpo":
        return None
    assert weights is not None, config.advantage
    return {name: weight for name, weight in weights.items() if weight != 0}


def _penalised(
    samples: Sequence[Sample], scored: Sequence[_Scored], penalty: KLPenalty
) -> tuple[list[_Scored], torch.Tensor]:
    """What is left of the rewards, and the sum of each sample's KL, float64."""
    totals = torch.tensor([sample.columns[0] for sample in scored], dtype=torch.float64, device="cpu")
    lengths = torch.tensor([sample.length for sample in scored], dtype=torch.int64, device="cpu")
    ids = torch.arange(len(scored), device="cpu").repeat_interleave(lengths)
    values = penalty.of(samples).cpu()
    left = kl_in_reward(totals, values, ids, penalty.weight).tolist()
    penalised = [sample._replace(columns=(total,)) for sample, total in zip(scored, left, strict=True)]
    return penalised, sequence_sums(values, ids, len(scored))


def _advantages(
    samples: Sequence[_Scored], sizes: Sequence[int], config: GRPOConfig, columns: Mapping[str, float] | None
) -> torch.Tensor:
    kind = config.of_kind("advantage")
    rewards = torch.tensor([sample.columns for sample in samples], dtype=torch.float64, device="cpu")
    lengths = torch.tensor([sample.length for sample in samples], device="cpu")
    return group_advantage(
        rewards if columns is not None else rewards[:, 0],
        torch.tensor([0, *sizes], device="cpu").cumsum(0).int(),
        kind=kind,
        weights=None if columns is None else torch.tensor(list(columns.values()), dtype=torch.float64, device="cpu"),
        ddof=config.advantage_ddof,
        eps=config.advantage_eps,
        scorable=torch.tensor([sample.scorable for sample in samples], dtype=torch.bool, device="cpu"),
        lengths=lengths if kind.startswith("reinforce++") else None,
    )


def _score(table: RewardTable, index: int, length: int, columns: Mapping[str, float] | None) -> _Scored:
    values = [table.totals[index]]
    if columns is not None:
        # A part that does not apply to a group is the same for all of it and moves nothing.
        values = [table.parts[name][index] if name in table.parts else 0.0 for name in columns]
    known = tuple(0.0 if value is None else value for value in values)
    return _Scored(known, table.totals[index] is not None and None not in values, length)
