"""Scenes as the engine's requests, and what a model makes of a fixed set of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.rollout.config import SamplingParams
from foveate.rollout.demo.scenes import PLACES, Scene
from foveate.rollout.engine import Engine
from foveate.rollout.rewards import LabelGrammar, RewardTable, RuleJudge, WeightedReward, perception_r1
from foveate.rollout.types import Request, RolloutGroup

MAX_TOKENS = 22  # the longest right reply has 19, its end included


def make_request(scene: Scene, n: int = 1, temperature: float = 1.0, seed: int | None = None) -> Request:
    """One group: image and question, with answer and annotations in the metadata for the rewards."""
    content = [{"type": "image"}, {"type": "text", "text": scene.question}]
    return Request(
        [{"role": "user", "content": content}],
        images=(scene.image,),
        n=n,
        sampling=SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, seed=seed),
        metadata={"answer": scene.answer, "facts": scene.facts},
    )


def make_reward(with_perception: bool = True) -> WeightedReward:
    """The reward of Perception-R1 with a judge that reads "place digit"; the part is scored even at weight 0."""
    judge = RuleJudge([LabelGrammar(PLACES)])
    return perception_r1(judge, {} if with_perception else {"perception": 0.0})


@dataclass(frozen=True)
class Evaluation:
    """Greedy replies to a fixed set of scenes, in its order."""

    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    perception: float  # mean
    format: float  # mean

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


def evaluate(engine: Engine, scenes: Sequence[Scene], reward: WeightedReward) -> Evaluation:
    """Greedy accuracy, perception and format on the scenes."""
    return judged(greedy_groups(engine, scenes), reward)


def greedy_groups(engine: Engine, scenes: Sequence[Scene]) -> list[RolloutGroup]:
    """The greedy reply to each scene."""
    return engine.generate([make_request(scene, temperature=0.0) for scene in scenes], strict=True, progress=False)


def judged(groups: Sequence[RolloutGroup], reward: WeightedReward) -> Evaluation:
    """What greedy replies are worth."""
    parts = [{name: values[0] for name, values in reward(group).parts.items()} for group in groups]
    means = {name: sum(_scored(part[name]) for part in parts) / len(parts) for name in ("perception", "format")}
    return Evaluation(
        texts=tuple(group.rollouts[0].text for group in groups),
        correct=tuple(part["accuracy"] == 1.0 for part in parts),
        **means,
    )


def _scored(value: float | None) -> float:
    assert value is not None, "rules score every reply"
    return value


def sample_groups(
    engine: Engine, scenes: Sequence[Scene], reward: WeightedReward, n: int, seed: int
) -> list[tuple[RolloutGroup, RewardTable]]:
    """A scored group of n rollouts for each scene."""
    requests = [make_request(scene, n, seed=seed + index) for index, scene in enumerate(scenes)]
    return [(group, reward(group)) for group in engine.generate(requests, strict=True, progress=False)]
