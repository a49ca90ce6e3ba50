"""Whole rollouts with pruned images: the requests of a batch, an engine that runs them, and what must be right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from foveate.kernels.vision_prune import keep_count
from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.types import Request, RolloutGroup, VisionInputs

GROUP = 8  # samples
TEXT_TOKENS, PAGE_SIZE = 32, 16


@dataclass(frozen=True)
class Setting:
    """Engines are compared within one. batch: samples; each GROUP of them looks at a picture of its own."""

    sharing: bool
    batch: int
    grid: tuple[int, int]
    new_tokens: int

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n(self) -> int:
        """Samples of a request."""
        return min(self.batch, GROUP) if self.sharing else 1

    @cached_property
    def pictures(self) -> list[VisionInputs]:
        grid = torch.tensor([[1, 2 * self.grid[0], 2 * self.grid[1]]])
        generators = [torch.Generator().manual_seed(seed) for seed in range(-(-self.batch // GROUP))]
        shape = (4 * self.image_tokens, 3 * 2 * 14 * 14)
        return [VisionInputs(torch.randn(shape, generator=generator), grid) for generator in generators]

    def requests(self, model: nn.Module, **sampling: Any) -> list[Request]:
        """Prompts that differ in their first token; the requests of one group's samples share its picture."""
        config = model.config
        text = torch.randint(0, 200, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(0))
        image = torch.full((self.image_tokens,), config.image_token_id)
        ends = torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])
        params = SamplingParams(**{"max_tokens": self.new_tokens, "ignore_eos": True, **sampling})
        return [
            Request(
                torch.cat([torch.tensor([first]), text[:8], ends[0], image, ends[1], text[8:]]),
                vision=self.pictures[first * self.n // GROUP],
                n=self.n,
                sampling=params,
            )
            for first in range(self.batch // self.n)
        ]


@dataclass(frozen=True)
class Times:
    """One run. Seconds; bytes of the pages in use."""

    encode: float
    prefill: float
    decode: float
    kv_prompt: int
    kv_most: int

    @property
    def total(self) -> float:
        return self.encode + self.prefill + self.decode


class Contender:
    """An engine of its own with one method and keep ratio."""

    def __init__(self, model: nn.Module, setting: Setting, prune: PruneConfig | None, kv_memory: int | None) -> None:
        self.prune, self.setting = prune, setting
        self.requests = setting.requests(model)
        # Everything is prefilled before anything is decoded, so that the two can be told apart.
        room = 2 * sum(len(request.prompt) for request in self.requests)
        config = EngineConfig(kv_memory=kv_memory, page_size=PAGE_SIZE, max_batch_tokens=room, prune=prune)
        self.engine = Engine(model, None, config)
        self._encode, self._encode_seconds = self.engine._runner.encode, 0.0
        self.engine._runner.encode = self._timed_encode  # type: ignore[method-assign]

    def run(self) -> Times:
        """One whole run on an empty cache, checked."""
        engine, scheduler = self.engine, self.engine._scheduler
        engine.update_weights(vision_changed=True)  # as between two training steps
        self._encode_seconds = 0.0
        start = self._now()
        for request in self.requests:
            engine.add_request(request)
        while scheduler.waiting or not all(sequence.token_ids for sequence in scheduler.running):
            engine.step()
        drawn = self._now()
        prompt = most = int(engine.memory_report()["kv_used"])
        groups: list[RolloutGroup] = []
        while engine.has_unfinished:
            groups += engine.step()
            most = max(most, int(engine.memory_report()["kv_used"]))
        end = self._now()
        assert engine.stats()["preempted"] == 0, engine.stats()
        check_groups(groups, self.setting, self.prune)
        return Times(self._encode_seconds, drawn - start - self._encode_seconds, end - drawn, prompt, most)

    def fits(self) -> int:
        """Samples, in whole requests, that find pages to their last token."""
        tree, request = self.engine._tree, self.requests[0]
        prompt = self.engine._prepare(request, "fits").prompt
        own = tree.pages_for(request.sampling.max_tokens - 1)
        return tree.pool.num_pages // (sum(tree.prompt_pages(prompt)) + request.n * own) * request.n

    def _timed_encode(self, *arguments: Any) -> Any:
        start = self._now()
        result = self._encode(*arguments)
        self._encode_seconds += self._now() - start
        return result

    def _now(self) -> float:
        if self.engine._weights.device.type == "cuda":
            torch.cuda.synchronize(self.engine._weights.device)
        return time.perf_counter()


def check_groups(groups: Sequence[RolloutGroup], setting: Setting, prune: PruneConfig | None) -> None:
    """AssertionError unless every sample has all its tokens, and every plan keeps as many as it should."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert [len(rollout.token_ids) for rollout in rollouts] == [setting.new_tokens] * setting.batch, groups
    for group in groups if prune else ():
        assert group.keep is not None, group.request_id
        kept = [len(site.kept) for site in group.keep.sites]
        powers = range(1, 4 if prune.method == "pyramiddrop" else 2)
        assert kept == [keep_count(setting.image_tokens, prune.keep**power) for power in powers], kept


def check_keeping_all(model: nn.Module, methods: Sequence[str], setting: Setting) -> None:
    """AssertionError unless each method at keep 1.0 gives what an engine without pruning gives."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    config = EngineConfig(kv_memory=1 << 28, page_size=PAGE_SIZE, deterministic=on_cpu)

    def rollouts(prune: PruneConfig | None) -> list:
        engine = Engine(model, None, replace(config, prune=prune))
        groups = engine.generate(setting.requests(model, temperature=0.0), strict=True, progress=False)
        return [rollout for group in groups for rollout in group.rollouts]

    plain = rollouts(None)
    for method in methods:
        for ours, theirs in zip(rollouts(PruneConfig(method, 1.0)), plain, strict=True):
            assert torch.equal(ours.token_ids, theirs.token_ids), method
            assert not on_cpu or torch.equal(ours.logprobs, theirs.logprobs), method


def plain_memory(model: nn.Module, setting: Setting) -> int:
    """Bytes of the pages that the batch takes without pruning and without sharing."""
    alone = Contender(model, replace(setting, sharing=False), None, 1 << 28)
    tree, pool = alone.engine._tree, alone.engine._runner.kv_pool
    pages = sum(tree.prompt_pages(alone.engine._prepare(alone.requests[0], "size").prompt))
    pages += tree.pages_for(setting.new_tokens - 1)
    return setting.batch * pages * (pool.nbytes // tree.pool.num_pages)
