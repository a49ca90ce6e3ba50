"""The rollouts of one step and their rewards; with dynamic sampling, of as many prompts as it takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice

from foveate.rollout import metrics, parallel, resumption, schedules
from foveate.rollout.checks import require
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.policy import check_trainable
from foveate.rollout.reward_pool import RewardPool
from foveate.rollout.rewards import RewardTable
from foveate.rollout.rewards.base import numbers
from foveate.rollout.types import Request, RolloutGroup

RewardFunction = Callable[[RolloutGroup], RewardTable | Iterable[float | None]]  # the latter: totals alone


@dataclass(eq=False)
class Collected:
    """This rank's groups of a step and their rewards, None for a request that failed.

    scored: the rewards of all groups that were drawn, also of those that dynamic sampling left out. num_prompts: that
    were asked, on all ranks, in so many rounds.
    """

    groups: list[RolloutGroup] = field(default_factory=list)
    tables: list[RewardTable | None] = field(default_factory=list)
    scored: list[RewardTable | None] = field(default_factory=list)
    num_prompts: int = 0
    rounds: int = 0


class Collector:
    """Asks the engine for rollouts and scores them as groups finish."""

    def __init__(self, engine: Engine, reward: RewardFunction, config: GRPOConfig, clock: metrics.Clock):
        self.engine, self.reward, self.config, self.clock = engine, reward, config, clock
        if not config.prunes_all:
            prune = engine.config.prune
            at_encoder = prune is None or prune.site == "encoder"
            require(at_encoder, "an engine that prunes at the encoder", prune, "pruned_share")

    def collect(self, requests: Sequence[Request], step: int, more: Iterator[Request]) -> Collected:
        """The groups of `requests`, in their order.

        With dynamic sampling the first len(requests) groups that are neither all right nor all wrong, of these and of
        as many of `more` as it takes. A round asks for what is missing over the share of groups that stayed so far, at
        most len(requests). Raises RuntimeError when the rounds, or the prompts, are spent before the step is full.
        """
        found, limit = Collected(), self.config.sampling_rounds
        asked, wanted, stayed = list(requests), len(requests), 0
        while asked or not limit:
            groups, tables = self._roll_out(asked, step, found.num_prompts)
            found.num_prompts, found.rounds = found.num_prompts + len(asked), found.rounds + 1
            found.scored += tables
            if not limit:
                found.groups, found.tables = groups, tables
                return found
            good = parallel.gather([self._teaches(table) for table in tables])
            kept = _first(good.items, wanted - stayed)[good.own]
            stayed = min(wanted, stayed + sum(good.items))
            found.groups += [group for group, keep in zip(groups, kept, strict=True) if keep]
            found.tables += [table for table, keep in zip(tables, kept, strict=True) if keep]
            if stayed == wanted:
                return found
            if found.rounds == limit:
                break
            share = max(stayed, 1) / found.num_prompts
            asked = list(islice(more, min(wanted, math.ceil((wanted - stayed) / share))))
        spent = f"{found.num_prompts} prompts in {found.rounds} rounds" + ("" if asked else ", all there are")
        raise RuntimeError(
            f"expected {wanted} groups with right and wrong answers, got {stayed} of {spent}: prompts are too hard or "
            f"too easy for this policy (dynamic_sampling)"
        )

    def _roll_out(
        self, requests: Sequence[Request], step: int, first: int
    ) -> tuple[list[RolloutGroup], list[RewardTable | None]]:
        """This rank's share. first: place of the first request among those of the step."""
        for index, request in enumerate(requests):
            require(isinstance(request, Request), "a Request", request, f"prompts[{index}]")
        if parallel.size() > 1:  # before what could stop one rank alone, and leave the others waiting
            parallel.check_same(requests=resumption.prompt_fingerprint(requests))
        for index, request in enumerate(requests):
            check_prompt(request, f"prompts[{index}]", self.config)
        requests = parallel.share(self._shared_out(self._seeded(requests, step, first), step, first))
        places = {id(request): index for index, request in enumerate(requests)}
        groups: dict[int, RolloutGroup] = {}
        with RewardPool(self._score, self.config.reward_workers) as pool:
            with self.clock.phase("rollout"):
                for group in self.engine.stream(requests):
                    index = places[id(group.request)]
                    groups[index] = group
                    if group.error is None:
                        pool.submit(index, group)
            with self.clock.phase("reward"):
                tables = pool.results()
        order = range(len(requests))
        return [groups[index] for index in order], [tables.get(index) for index in order]

    def _score(self, group: RolloutGroup) -> RewardTable:
        """The group's rewards, with None for a rollout that has no tokens to learn from."""
        name, count = f"reward of request {group.request_id!r}", len(group.rollouts)
        try:
            found = self.reward(group)
            if not isinstance(found, RewardTable) and _is_ordered(found):
                found = RewardTable({}, list(found))
        except Exception as error:
            if not getattr(error, "__notes__", None):  # a `WeightedReward` says which of its parts it was
                error.add_note(f"raised by the {name}")
            raise
        if not isinstance(found, RewardTable):
            raise ValueError(f"expected a RewardTable or {count} totals, got {type(found).__name__} ({name})")
        require(len(found.totals) == count, f"{count} totals", len(found.totals), name)
        parts = {part: numbers(values, f"{name}, {part}") for part, values in found.parts.items()}
        table = RewardTable(parts, numbers(found.totals, name))
        for part, values in {**table.parts, "total": table.totals}.items():
            for index, value in enumerate(values):
                finite = value is None or math.isfinite(value)
                require(finite, f"a finite {part!r} or None", value, f"{name}, sample {index}")
        learnable = [len(r.token_ids) > 0 and r.finish_reason != "error" for r in group.rollouts]
        totals = [total if ok else None for total, ok in zip(table.totals, learnable, strict=True)]
        return replace(table, totals=totals)

    def _teaches(self, table: RewardTable | None) -> bool:
        """Whether the samples that can be scored differ in what dynamic sampling looks at."""
        if table is None:
            return False
        part = self.config.dynamic_sampling_part
        known = [*table.parts, "total"]
        require(part in known, f"one of the rewards {known}", part, "dynamic_sampling_part")
        values = table.totals if part == "total" else table.parts[part]
        pairs = zip(values, table.totals, strict=True)
        return len({value for value, total in pairs if value is not None and total is not None}) > 1

    def _seeded(self, requests: Sequence[Request], step: int, first: int) -> list[Request]:
        """Gives each request without a seed one of (seed, step, place): rollouts do not depend on evaluations.

        All are copies, so that a group tells its place even where one request comes twice.
        """
        seeds = [
            seed_of(self.config.seed, step, first + index) if request.sampling.seed is None else request.sampling.seed
            for index, request in enumerate(requests)
        ]
        return [
            replace(request, sampling=replace(request.sampling, seed=seed))
            for request, seed in zip(requests, seeds, strict=True)
        ]

    def _shared_out(self, requests: list[Request], step: int, first: int) -> list[Request]:
        """Requests, of which a share stays to be pruned: a draw of (seed, step, place) for each."""
        if self.config.prunes_all:
            return requests
        limit = schedules.pruned_share(self.config, step) * 2.0**64
        draws = (seed_of(self.config.seed, "pruned", step, first + index) for index in range(len(requests)))
        return [
            request if draw < limit else replace(request, prune=None)
            for request, draw in zip(requests, draws, strict=True)
        ]


def _is_ordered(values: object) -> bool:
    """Whether values come one by one, in an order that means something: a mapping's and a set's do not."""
    return isinstance(values, Iterable) and not isinstance(values, (Mapping, Set)) and getattr(values, "ndim", 1) > 0


def check_prompt(request: Request, name: str, config: GRPOConfig) -> None:
    """ValueError, with the request's own name if it has one, for what is no request or could teach nothing.

    That is one with penalties or biases, and a group of one where advantages are against the rest of the group.
    """
    require(isinstance(request, Request), "a Request", request, name)
    name, kind = request.request_id or name, config.of_kind("advantage")
    check_trainable(request, name)
    alone = request.n == 1 and kind != "reinforce++"
    require(not alone, f"request {name!r}: n >= 2, because {kind!r} compares the samples of a group", 1, "n")


def seed_of(*parts: object) -> int:
    """64 bits of the parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _first(flags: Sequence[bool], count: int) -> list[bool]:
    """The first `count` that are True, the others False."""
    left = count
    kept = []
    for flag in flags:
        kept.append(flag and left > 0)
        left -= kept[-1]
    return kept
