"""What each kind of loss, and each way of pruning, does on the demo's task: curves of held-out accuracy.

    python benchmarks/demo_curves.py --arms grpo gspo visionzip --seeds 0 1 2 --output curves.jsonl

Every arm of a seed starts from the same warm start, takes its training scenes from the same sequence and has the recipe
of `foveate demo`, but for what its name says; dapo draws more scenes, in place of those it leaves out (group/drawn).
With one update a rollout batch grpo, gspo, gspo_token and sapo have one gradient; dapo, cispo and cispo_max have
another. Pruning keeps a half: visionzip and its like 2 of 4 tokens everywhere, fastv 4 in the first layer of three and
then 2, pyramiddrop 4, 2 and 1. Accuracy is greedy on the demo's 300 held-out scenes, with the arm's own pruning and,
after the last step, without any. One row an arm and seed. An arm takes minutes; on a machine with several cores give
each seed a process of its own. `--summary FILE...` prints the rows as a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import append_rows
from machine import environment

from foveate.rollout.demo.options import DemoOptions
from foveate.rollout.demo.recipe import Demo, DemoSizes, grpo_config
from foveate.rollout.demo.tasks import evaluate
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.pruning import METHODS

MEANS, LAST_STEPS = ("policy/", "reward/", "group/"), 20  # the metrics in a row, means of the last steps
SHOWN = ("logprob_difference_mean", "ess")  # in the table


@dataclass(frozen=True)
class Arm:
    """What differs from the demo's recipe: options of the demo, and of `GRPOConfig` besides."""

    kind: str = "grpo"
    advantage: str = "kind"
    prune: str | None = None
    learner: tuple[tuple[str, object], ...] = ()

    def options(self, options: DemoOptions) -> DemoOptions:
        return replace(options, kind=self.kind, advantage=self.advantage, prune=self.prune)

    def config(self, options: DemoOptions) -> GRPOConfig:
        return replace(grpo_config(self.options(options)), **dict(self.learner))


DENSE = (("pruned_policy", "dense"),)
CORRECTED = (*DENSE, ("correction", "tis"))
ARMS = {
    "grpo": Arm(),
    **{kind: Arm(kind) for kind in ("dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "cispo_max", "sapo")},
    "rloo": Arm(advantage="rloo"),
    **{method: Arm(prune=method) for method in METHODS},
    **{f"{method}-dense": Arm(prune=method, learner=DENSE) for method in METHODS},
    **{f"{method}-corrected": Arm(prune=method, learner=CORRECTED) for method in METHODS},
}


def run_seed(seed: int, arms: Sequence[str], options: argparse.Namespace) -> None:
    """All arms of one seed; a row is written as soon as its arm has ended."""
    plain = DemoOptions(steps=options.steps, seed=seed, threads=options.threads)
    demo = Demo(plain, DemoSizes(held_out=options.held_out))
    demo.warm_start()
    for name in arms:
        arm, start = ARMS[name], time.perf_counter()
        engine = demo.policy(arm.options(plain).prune_config)
        trained = demo.train(name, engine, demo.reward, arm.config(plain))
        seconds = time.perf_counter() - start
        dense = trained.after
        if arm.prune is not None:
            copy = demo.policy(None)
            copy.model.load_state_dict(engine.model.state_dict())
            copy.update_weights()
            dense = evaluate(copy, demo.record.held_out, demo.reward)
        last = trained.metrics[-LAST_STEPS:]
        row = {
            "arm": name,
            "seed": seed,
            "steps": options.steps,
            "curve": [(step, round(e.accuracy, 4), round(e.perception, 4)) for step, e in trained.evaluations],
            "unpruned_accuracy": dense.accuracy,
            "p_value": trained.comparison.p_value,
            "metrics": {key: statistics.fmean(m[key] for m in last) for key in last[0] if key.startswith(MEANS)},
            "seconds": round(seconds, 1),
            **environment(torch.device("cpu")),
        }
        append_rows(options.output, [row])


def table(paths: Sequence[Path]) -> str:
    """Markdown: each arm's held-out accuracy in percent by step, mean over its seeds, and what there is at last."""
    rows = defaultdict(list)
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["arm"]].append(row)
    steps = [step for step, _, _ in next(iter(rows.values()))[0]["curve"]]
    head = ["arm", "seeds", *map(str, steps), "from-to", "all tokens", "perception", "difference", "ESS"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm, found in rows.items():
        curves = [row["curve"] for row in found]
        assert all([step for step, _, _ in curve] == steps for curve in curves), "arms of equal length"
        assert len({row["seed"] for row in found}) == len(found), f"one row of {arm} for each seed"
        means = [_mean(100 * curve[place][1] for curve in curves) for place in range(len(steps))]
        last = [100 * curve[-1][1] for curve in curves]
        numbers = [*means, f"{min(last):.1f}-{max(last):.1f}" if len(last) > 1 else ""]
        numbers += [_mean(100 * row["unpruned_accuracy"] for row in found), _mean(100 * c[-1][2] for c in curves)]
        numbers += [_mean((row["metrics"][f"policy/{name}"] for row in found), 2) for name in SHOWN]
        lines.append(f"| {arm} | {len(found)} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _mean(values: Iterable[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=DemoOptions.steps)
    parser.add_argument("--held-out", type=int, default=DemoSizes.held_out)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--summary", nargs="+", type=Path, help="print these rows as a table and run nothing")
    options = parser.parse_args()
    if options.summary:
        print(table(options.summary))
        return
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        run_seed(seed, options.arms, options)


if __name__ == "__main__":
    main()
