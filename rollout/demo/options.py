"""Options of `foveate demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveate.rollout.checks import require
from foveate.rollout.pruning import PruneConfig

KEEP = 0.5  # of an image's four tokens
# Of the methods inside the language model, for a decoder of three layers.
LAYER_OPTIONS: dict[str, dict[str, Any]] = {"fastv": {"layer": 1}, "pyramiddrop": {"layers": (1, 2)}}


def pruning_by(method: str, keep: float | None = None) -> PruneConfig:
    """A method as the demo's model takes it; keep: None is a half."""
    return PruneConfig(method, KEEP if keep is None else keep, **LAYER_OPTIONS.get(method, {}))


@dataclass(frozen=True)
class DemoOptions:
    """A tiny vision-language model learns to read scanned digits, by GRPO on its own rollouts.

    A Qwen2.5-VL of 1.3 million parameters sees one to four scanned digits and a question. After a short supervised
    warm start it learns by GRPO with the perception reward. Accuracy on 300 held-out scenes is measured before and
    after, and a report with curves and rollouts is written.
    """

    ablate: bool = False
    """Train a second time from the same warm start, without the perception reward (takes twice as long)."""
    steps: int = 240
    """GRPO steps, each on 32 prompts with 8 rollouts."""
    seed: int = 0
    """Of the model's first weights, the training scenes and the sampling; the held-out scenes stay the same."""
    output: Path = Path("runs/demo")
    """Folder of report.html, the trained model and the metrics of each step. Files of an earlier run are replaced."""
    threads: int | None = None
    """Threads of torch. Left out, a good number is measured; give it for a run that repeats to the bit."""
    kind: Literal["grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "cispo_max", "sapo"] = "grpo"
    """Of policy loss. The demo updates once a rollout batch, so that every ratio is 1: grpo, gspo, gspo_token and sapo
    then have one gradient, dapo, cispo and cispo_max another. dapo replaces groups that are all right or all wrong."""
    advantage: Literal["kind", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gdpo"] = "kind"
    """Of the groups' rewards; "kind" is what the kind of loss has."""
    prune: Literal["random", "strided", "visionzip", "divprune", "fastv", "pyramiddrop"] | None = None
    """Prune vision tokens by this method in GRPO and its evaluations. The warm start sees all of them."""
    keep: float | None = None
    """Share of the 4 vision tokens of an image that pruning keeps, with pyramiddrop at each of its two stages; a half
    where it is left out."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "an int >= 1", self.steps, "--steps")
        require(self.seed >= 0, "an int >= 0", self.seed, "--seed")
        require(self.threads is None or self.threads >= 1, "an int >= 1", self.threads, "--threads")
        require(self.keep is None or self.prune is not None, "no share without --prune", self.keep, "--keep")
        require(self.keep is None or 0 < self.keep <= 1, "0 < keep <= 1", self.keep, "--keep")
        existing = next(path for path in (self.output, *self.output.absolute().parents) if path.exists())
        require(existing.is_dir(), "a folder", str(existing), "--output")

    @property
    def prune_config(self) -> PruneConfig | None:
        """Of the engine that GRPO rolls out with."""
        return None if self.prune is None else pruning_by(self.prune, self.keep)

    @property
    def variant(self) -> str:
        """What differs from the demo's recipe, in words; empty where nothing does."""
        parts = [f"loss {self.kind}"] if self.kind != "grpo" else []
        parts += [f"advantage {self.advantage}"] if self.advantage != "kind" else []
        if self.prune_config is not None:
            parts.append(f"images pruned by {self.prune_config.method}, keep {self.prune_config.keep:g}")
        return ", ".join(parts)
