"""What a run of the demo leaves behind: all that its report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foveate.rollout.checks import require
from foveate.rollout.demo.scenes import Scene
from foveate.rollout.demo.tasks import Evaluation
from foveate.rollout.rewards import RewardTable
from foveate.rollout.types import RolloutGroup


@dataclass(frozen=True)
class Reply:
    """One sampled completion with its reward. None is a value that could not be had."""

    text: str
    total: float | None
    parts: dict[str, float | None]


def replies_of(group: RolloutGroup, table: RewardTable) -> list[Reply]:
    """The group's rollouts as text and numbers."""
    return [
        Reply(rollout.text, table.totals[i], {name: values[i] for name, values in table.parts.items()})
        for i, rollout in enumerate(group.rollouts)
    ]


@dataclass(frozen=True)
class Comparison:
    """The same scenes before and after. p_value: McNemar's exact test, see `mcnemar`."""

    lost: int  # right before, wrong after
    gained: int  # wrong before, right after
    p_value: float


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> Comparison:
    """McNemar's exact two-sided test of paired answers: p = P(|X - m/2| >= |gained - m/2|), X ~ Binomial(m, 1/2).

    m = lost + gained counts the scenes whose answer changed sides; p = 1 if there is none. Raises ValueError for
    different lengths. Source: Q. McNemar, Psychometrika 12 (1947), in the exact binomial form.
    """
    from scipy.stats import binomtest

    require(len(before) == len(after), f"{len(before)} answers", len(after), "after")
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    p_value = float(binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0
    return Comparison(lost, gained, p_value)


@dataclass
class Arm:
    """One GRPO run from the warm start.

    metrics: of each step, as the trainer reports them. evaluations: (step, held-out set) from step 0 on.
    samples: of each showcase scene, a group of rollouts after the last step.
    """

    name: str
    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    samples: list[list[Reply]] = field(default_factory=list)

    @property
    def before(self) -> Evaluation:
        return self.evaluations[0][1]

    @property
    def after(self) -> Evaluation:
        """The last evaluation, not the best."""
        return self.evaluations[-1][1]

    def num_prompts(self, of_a_step: int) -> int:
        """Prompts that were rolled out; dynamic sampling draws more than a step takes."""
        return sum(int(metrics.get("group/drawn", of_a_step)) for metrics in self.metrics)

    @property
    def comparison(self) -> Comparison:
        return mcnemar(self.before.correct, self.after.correct)

    @property
    def result(self) -> str:
        """The sentence that counts."""
        change = f"{self.before.accuracy:.1%} -> {self.after.accuracy:.1%}"
        return f"held-out accuracy: {change} (McNemar p = {self.comparison.p_value:.2g})"


@dataclass(frozen=True)
class PrunedSite:
    """A place at which a method drops image tokens.

    layer: the first decoder layer that no longer sees them, 0 before the language model. tokens: that an image has
    left. digits: share of the held-out scenes' digits whose token is left. kept: of each shown scene, a flag for each
    of PLACES.
    """

    layer: int
    tokens: int
    digits: float
    kept: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class PrunedRun:
    """The held-out scenes under one method; accuracy of greedy replies."""

    method: str
    accuracy: float
    sites: tuple[PrunedSite, ...]


@dataclass(frozen=True)
class PruningView:
    """What pruning does to the trained model.

    shown: indices of the shown held-out scenes. accuracy: without pruning. most_digits: the share of the held-out
    scenes' digits that can be kept at best.
    """

    shown: tuple[int, ...]
    accuracy: float
    most_digits: float
    runs: tuple[PrunedRun, ...]


@dataclass
class DemoRecord:
    """A whole run.

    held_out: the evaluated scenes. showcase: indices of the scenes whose rollouts are shown; before_samples: their
    groups after the warm start. warm_start: (step, loss, accuracy on the stopping set). arms: the run with the
    perception reward, then the one without, if there was one. pruning: of the first arm's model. variant: see
    `foveate.rollout.demo.options.DemoOptions.variant`.
    """

    seed: int
    num_parameters: int
    group_size: int
    prompts_per_step: int
    held_out: list[Scene]
    showcase: list[int]
    warm_start: list[tuple[int, float, float]] = field(default_factory=list)
    before_samples: list[list[Reply]] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    pruning: PruningView | None = None
    seconds: float = 0.0
    variant: str = ""
