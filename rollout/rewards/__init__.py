"""Rewards of a group of rollouts, their weighted sum, and the judges behind visual perception.

    reward = perception_r1()
    table = reward(group)          # table.totals: one float per rollout, None where it is unscorable

What a request must carry in its `metadata`:

- "answer": str, the known answer, plain or LaTeX. Missing: accuracy is unscorable (None).
- "facts": sequence of `Fact` or (subject, value) strings, what the image shows. Missing or empty: the request
  has no perception part; it adds 0 to the total and has no entry in `table.parts`.

None is a value that could not be had (a judge failed, nothing to compare with): such a rollout must leave the
group's baseline and gets no advantage. It is never replaced by 0.

Judges of perception: `RuleJudge` (a grammar, no model), `HTTPJudge` (a served model), `EngineJudge` (an engine).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from foveate.rollout.checks import require
from foveate.rollout.rewards.accuracy import Accuracy
from foveate.rollout.rewards.base import Reward, RewardTable, WeightedReward
from foveate.rollout.rewards.engine_judge import EngineJudge
from foveate.rollout.rewards.format import Format, follows_format
from foveate.rollout.rewards.geometry import GeometryGrammar, describe, diagram_fact
from foveate.rollout.rewards.grammar import PLACES, Fact, Grammar, LabelGrammar
from foveate.rollout.rewards.http_judge import HTTPJudge
from foveate.rollout.rewards.judge import Judge, RuleJudge
from foveate.rollout.rewards.overlong import Overlong, overlong_penalty
from foveate.rollout.rewards.perception import Perception
from foveate.rollout.rewards.repetition import Repetition, repeated_share

PERCEPTION_R1_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"accuracy": 0.9, "format": 0.1, "perception": 0.7, "repetition": -2.0}
)


def perception_r1(judge: Judge | None = None, weights: Mapping[str, float] = PERCEPTION_R1_WEIGHTS) -> WeightedReward:
    """The reward of Perception-R1: 0.9 accuracy + 0.1 format + 0.7 perception - 2 repetition, in [-2, 1.7].

    judge: None is `RuleJudge()`. weights: replace the published ones by name, for example
    {"perception": 0.0}. Raises ValueError on an unknown name. Source: arXiv 2506.07218 and its released code;
    unlike there, a missing judgement is unscorable and perception divides by the number of annotations.
    """
    unknown = sorted(set(weights) - set(PERCEPTION_R1_WEIGHTS))
    require(not unknown, f"names among {sorted(PERCEPTION_R1_WEIGHTS)}", unknown, "weights")
    rewards: tuple[Reward, ...] = (Accuracy(), Format(), Perception(judge), Repetition())
    return WeightedReward(rewards, {**PERCEPTION_R1_WEIGHTS, **weights})


__all__ = [
    "PERCEPTION_R1_WEIGHTS",
    "PLACES",
    "Accuracy",
    "EngineJudge",
    "Fact",
    "Format",
    "GeometryGrammar",
    "Grammar",
    "HTTPJudge",
    "Judge",
    "LabelGrammar",
    "Overlong",
    "Perception",
    "Repetition",
    "Reward",
    "RewardTable",
    "RuleJudge",
    "WeightedReward",
    "describe",
    "diagram_fact",
    "follows_format",
    "overlong_penalty",
    "perception_r1",
    "repeated_share",
]
