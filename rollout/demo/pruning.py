"""What each method of pruning keeps of held-out scenes, and what the trained model still answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from foveate.rollout.config import PruneConfig
from foveate.rollout.demo.options import KEEP, pruning_by
from foveate.rollout.demo.record import PrunedRun, PrunedSite, PruningView
from foveate.rollout.demo.scenes import PLACES, Scene
from foveate.rollout.demo.tasks import evaluate, greedy_groups, judged
from foveate.rollout.engine import Engine
from foveate.rollout.processor import Processor
from foveate.rollout.pruning import METHODS
from foveate.rollout.rewards import WeightedReward
from foveate.rollout.types import RolloutGroup

NUM_SHOWN = 8


def look_at_pruning(
    engine: Engine, processor: Processor, scenes: Sequence[Scene], reward: WeightedReward
) -> PruningView:
    """Every method on all the scenes; the first scenes with as many digits as tokens are kept are shown."""
    room = int(KEEP * len(PLACES))
    shown = [index for index, scene in enumerate(scenes) if len(scene.digits) == room][:NUM_SHOWN]
    counts = [len(scene.digits) for scene in scenes]

    def engine_with(config: PruneConfig | None) -> Engine:
        return Engine(engine.model, processor, replace(engine.config, prune=config))

    runs = []
    for config in map(pruning_by, METHODS):
        groups = greedy_groups(engine_with(config), scenes)
        runs.append(PrunedRun(config.method, judged(groups, reward).accuracy, _sites(groups, scenes, shown)))
    accuracy = evaluate(engine_with(None), scenes, reward).accuracy
    return PruningView(tuple(shown), accuracy, sum(min(count, room) for count in counts) / sum(counts), tuple(runs))


def _sites(groups: Sequence[RolloutGroup], scenes: Sequence[Scene], shown: Sequence[int]) -> tuple[PrunedSite, ...]:
    plans = [group.keep for group in groups if group.keep is not None]
    assert len(plans) == len(groups), "every group of a pruned engine has a plan"
    sites = []
    for place, first in enumerate(plans[0].sites):
        # The image's tokens are its quarters, in the order of PLACES.
        kept = [plan.sites[place].kept.tolist() for plan in plans]
        flags = [
            PLACES.index(name) in tokens for scene, tokens in zip(scenes, kept, strict=True) for name, _ in scene.digits
        ]
        quarters = tuple(tuple(quarter in kept[i] for quarter in range(len(PLACES))) for i in shown)
        sites.append(PrunedSite(first.layer, len(first.kept), sum(flags) / len(flags), quarters))
    return tuple(sites)
