"""What a training step reports, and where it goes: a JSON line, event files, a line for the reader.

A step's metrics are one flat dict of floats. Means leave out what could not be scored; a key is missing where there is
nothing to take the mean of.

step                          rollout batches done, this one included
reward/total, reward/<part>   mean over samples: the weighted sum, and each unweighted part
reward/kl                     where the KL penalty is part of the reward: mean over the samples with a total of its sum
                              over tokens, which reward/kl_coef weighs; reward/total and group/ are without it
group/variance                mean over groups of the variance of the totals (ddof 1)
group/zero_variance_share     share of the groups of two or more scored samples whose totals are all equal; a baseline
                              of the group leaves nothing of them, a KL penalty in the reward may
group/failed                  requests the engine could not serve
group/drawn, group/rounds     prompts and rounds that dynamic sampling took; reward/, group/ are over all of them
sample/unscorable             samples without a total: not in their group's baseline, advantage 0
unscorable/<part>             samples for which that part could not be had, as when a judge failed
completion/length_mean, completion/length_max, completion/truncated_share (ended by length)
policy/loss                   of the last update, KL term included
policy/clip_low, policy/clip_high, policy/clip_dual   share of tokens where that bound is active
policy/ratio, policy/ratio_max of the current over the old policy, by token or sequence as the kind has it
policy/kl                     mean estimate of KL(policy || reference); missing without a reference
policy/entropy                mean over tokens, nats
policy/correction             mean factor of the correction for the engine's mismatch; policy/dropped: share of tokens
                              whose policy term it, or a rejection, takes out
policy/mismatch_k1, policy/mismatch_k3   estimates of KL(behaviour || old); policy/mismatch_abs, policy/mismatch_abs_max
                              |old - behaviour|; policy/ess: share of the sample that its weights leave effective
policy/logprob_difference_mean, policy/logprob_difference_max   |engine - trainer| of the drawn tokens' log-probs,
                              both over the whole vocabulary, before the first update
throughput/tokens_forwarded   of one pass over the batch, without padding; a prompt that samples share counts once
optim/grad_norm               before clipping, mean over the updates; optim/lr
time/step                     seconds; time/rollout_share, reward, update, sync: of time/step; reward is what was left
                              of it when the last group had ended
throughput/tokens_per_second  completion tokens over time/step
eval/<key>                    of the evaluation after this step
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

from foveate.kernels.policy_loss import add_metrics, mean_metrics
from foveate.rollout import phases
from foveate.rollout.rewards import RewardTable
from foveate.rollout.types import FinishReason

PRINTED = ("reward/total", "policy/entropy", "policy/logprob_difference_mean", "completion/length_mean", "time/step")


class Clock:
    """Wall time of the named phases of one step, which profilers see too (`foveate.rollout.phases`)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with phases.phase(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self, num_tokens: int) -> dict[str, float]:
        total = sum(self.seconds.values())
        shares = {f"time/{name}_share": seconds / total for name, seconds in self.seconds.items()}
        return {"time/step": total, **shares, "throughput/tokens_per_second": num_tokens / total}


def reward_metrics(tables: Sequence[RewardTable]) -> dict[str, float]:
    """Means of totals and parts, spread within the groups, and what could not be scored."""
    totals = [[total for total in table.totals if total is not None] for table in tables]
    values = {"reward/total": [total for group in totals for total in group]}
    unscorable = {}
    for name in sorted({name for table in tables for name in table.parts}):
        parts = [part for table in tables for part in table.parts.get(name, ())]
        values[f"reward/{name}"] = [part for part in parts if part is not None]
        unscorable[f"unscorable/{name}"] = float(len(parts) - len(values[f"reward/{name}"]))
    scored = [torch.tensor(group, dtype=torch.float64, device="cpu") for group in totals if len(group) > 1]
    values["group/variance"] = [float(group.var()) for group in scored]
    values["group/zero_variance_share"] = [float(group.min() == group.max()) for group in scored]
    metrics = {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}
    missing = sum(len(table.totals) for table in tables) - len(values["reward/total"])
    return {**metrics, **unscorable, "sample/unscorable": float(missing)}


def reward_kl_metrics(sums: Sequence[float], weight: float) -> dict[str, float]:
    """Of a KL penalty in the reward, from what the tokens of each scored sample add up to."""
    mean = {"reward/kl": sum(sums) / len(sums)} if sums else {}
    return {**mean, "reward/kl_coef": weight}


def completion_metrics(ends: Sequence[tuple[int, FinishReason]]) -> dict[str, float]:
    """Lengths of completions and how many were cut, of (number of tokens, finish_reason) of each."""
    lengths = [length for length, _ in ends]
    truncated = sum(reason == "length" for _, reason in ends)
    return {
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/length_max": float(max(lengths)),
        "completion/truncated_share": truncated / len(ends),
    }


def as_floats(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars as numbers, in one transfer from the device."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def policy_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the tokens of all parts, from the sums that `linear_policy_loss` reports; a part may be empty."""
    sums = add_metrics([{name: torch.tensor(x, device="cpu") for name, x in part.items()} for part in parts if part])
    if not sums or sums["tokens"] == 0:
        return {}
    means = mean_metrics(sums)
    return {f"policy/{name}": float(value) for name, value in means.items() if name != "tokens"}


def difference_metrics(parts: Sequence[tuple[float, float, int]]) -> dict[str, float]:
    """Of |engine - trainer|, from sum, maximum and number of tokens of several parts."""
    sums, largest, counts = zip(*parts, strict=True)
    mean = {"policy/logprob_difference_mean": sum(sums) / sum(counts)} if sum(counts) else {}
    return {**mean, "policy/logprob_difference_max": max(largest)}


def check_extras(progress: str, tensorboard: bool) -> None:
    """Raises ImportError for a missing extra that was asked for, naming it."""
    if progress == "rich":
        _extra("rich.progress", 'progress="rich"')
    if tensorboard:
        _extra("tensorboard", "tensorboard=True")


class MetricsLog:
    """Writes each step's metrics to `metrics.jsonl` in output_dir, to event files, and to the reader.

    total: steps to come, None if unknown. progress: "auto", "rich", "plain" or "none", as in `GRPOConfig`. A resumed
    run appends: of two lines for one step the later stands. Raises ImportError for a missing extra that was asked for.
    """

    def __init__(
        self, output_dir: Path | None, total: int | None, done: int, progress: str, every: int, tensorboard: bool
    ):
        self.total, self.every = total, every
        self._file = self._events = self._bar = None
        if progress == "auto":
            progress = "rich" if find_spec("rich") and sys.stderr.isatty() else "plain"
        self._prints = progress == "plain"
        rich = _extra("rich.progress", 'progress="rich"') if progress == "rich" else None
        if tensorboard:
            if output_dir is None:
                raise ValueError("expected an output_dir for tensorboard=True, got None (output_dir)")
            _extra("tensorboard", "tensorboard=True")
            self._events = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(output_dir))
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._file = _open_lines(output_dir / "metrics.jsonl")
        if rich is not None:
            self._bar = _rich_bar(rich, total, done)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        for part, close in ((self._file, "close"), (self._events, "close"), (self._bar, "stop")):
            if part is not None:
                getattr(part, close)()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records one step; the line outlives a kill of this process from here on, though not a power cut."""
        if self._file is not None:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1)
        if step % self.every == 0:
            self._tell(self._line(step, metrics))

    def _tell(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        elif self._prints:
            print(line, flush=True)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        names = [*PRINTED, *(name for name in metrics if name.startswith("eval/"))]
        parts = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]
        return "  ".join([f"step {step}" + (f"/{self.total}" if self.total else ""), *parts])


def _open_lines(path: Path) -> TextIO:
    """Opened to append; the last line goes if a killed process wrote only part of it."""
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return path.open("a")


def _rich_bar(rich: Any, total: int | None, done: int) -> Any:
    console = importlib.import_module("rich.console").Console(stderr=True)
    columns = (rich.TextColumn("training"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
    bar = rich.Progress(*columns, console=console)
    bar.add_task("training", total=total, completed=done)
    bar.start()
    return bar


def _extra(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{option} needs the package {package}: pip install 'foveate[train]'") from error
