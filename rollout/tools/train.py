"""`foveate train`: GRPO on the user's own model and data."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from foveate.rollout import checkpoint, metrics, parallel
from foveate.rollout.config import EngineConfig, SamplingParams, require
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.processor import load_processor
from foveate.rollout.progress import without_transformers_bars
from foveate.rollout.rewards import PERCEPTION_R1_WEIGHTS, WeightedReward
from foveate.rollout.tools.command_line import parse
from foveate.rollout.tools.prompts import BadLine, Defaults, read_requests
from foveate.rollout.tools.reward_sources import weighted_reward
from foveate.rollout.tools.rollout import load_engine
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request


@dataclass(frozen=True)
class TrainOptions:
    """Trains a model by GRPO on its own rollouts.

    Each step completes prompts of the data n times, scores the completions and updates the model. Metrics, checkpoints
    and the trained model are written to the output folder; --resume goes on from its last checkpoint.
    """

    model: str
    """Folder or Hugging Face name of a model with its tokenizer; weights from safetensors."""
    data: Path
    """Prompts, as `foveate rollout` reads them, with what the rewards compare with: answer, facts, metadata."""
    output: Path = Path("runs/train")
    """Folder of metrics.jsonl, run.yaml (all options of this run), step-N/ (checkpoints) and model/ (the result)."""
    n: int = 8
    """Samples of each prompt: one group."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Names and weights: accuracy, format, perception, repetition, package.module:name, file.py:name. Left out, those
    of Perception-R1."""
    eval_data: Path | None = None
    """Prompts answered greedily every grpo.eval_every steps; their mean rewards are reported as eval/NAME."""
    ref_model: str | None = None
    """The reference of the KL term; left out, the model before training."""
    system: str | None = None
    """System message of prompts that bring none."""
    image_root: Path | None = None
    """Folder that relative image paths start from; left out, that of the data."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto is that of the checkpoint."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder; with none there, begin."""
    keep_checkpoints: int | None = None
    """How many of the newest checkpoints stay; left out, all."""
    allow_errors: bool = False
    """Train although lines of the data make no request."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    def __post_init__(self) -> None:
        require(self.n >= 1, "an int >= 1", self.n, "--n")
        require(self.sampling.seed is None, "the seed in --grpo.seed", self.sampling.seed, "--sampling.seed")
        require(self.data.is_file(), "a file", str(self.data), "--data")
        require(self.eval_data is None or self.eval_data.is_file(), "a file", str(self.eval_data), "--eval-data")
        missing = self.grpo.eval_every > 0 and self.eval_data is None
        require(not missing, "a file for --grpo.eval-every > 0", None, "--eval-data")
        keep = self.keep_checkpoints
        require(keep is None or keep >= 1, "an int >= 1 or None", keep, "--keep-checkpoints")


class CheckpointTrainer(Trainer):
    """A `Trainer` whose checkpoints also hold the processor, so that every tool can load them."""

    def __init__(self, *args: Any, processor: Any, keep: int | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.processor, self.keep = processor, keep

    def save_checkpoint(self, directory: str | Path) -> None:
        directory = Path(directory)
        with without_transformers_bars():
            super().save_checkpoint(directory)
            save_processor(self.processor, directory)
        for old in checkpoint.saved(directory.parent)[: -self.keep if self.keep else 0]:
            shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 after an error of the user's, which is printed."""
    options = parse(TrainOptions, "foveate train", arguments)
    try:
        with parallel.torchrun_group():
            run(options)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"foveate train: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: TrainOptions) -> Trainer:
    """Trains as the options say and writes the model; returns the trainer that did it.

    In a process group every rank calls it; rank 0 alone writes and prints.
    """
    prompts = load_prompts(options, options.data)
    reward = weighted_reward(options.rewards or PERCEPTION_R1_WEIGHTS)
    found = checkpoint.saved(options.output)
    used = bool(found) or (options.output / "metrics.jsonl").exists()
    require(options.resume or not used, "a folder without a run, or --resume", str(options.output), "--output")
    engine = load_engine(options.model, options.dtype, options.engine)
    ref_model: Any = None
    if options.grpo.kl_coef > 0:
        ref_model = load_engine(options.ref_model or options.model, options.dtype, options.engine).model
    trainer = CheckpointTrainer(
        engine.model,
        engine,
        reward,
        options.grpo,
        ref_model=ref_model,
        evaluate=Evaluation(options, engine, reward) if options.eval_data else None,
        output_dir=options.output,
        processor=load_processor(options.model, engine.spec.vision is not None),
        keep=options.keep_checkpoints,
    )
    if found and options.resume:
        with without_transformers_bars():
            trainer.load_checkpoint(found[-1])
        say(f"going on from {found[-1]}")
    say(f"metrics: {options.output / 'metrics.jsonl'}")
    if parallel.rank() == 0:
        write_options(options)
    trainer.train(prompts)
    if parallel.rank() == 0:
        model: Any = engine.model
        with without_transformers_bars():
            model.save_pretrained(options.output / "model")
        save_processor(trainer.processor, options.output / "model")
    say(f"model after {trainer.step} steps: {options.output / 'model'}")
    return trainer


class Evaluation:
    """Mean rewards of greedy answers to the prompts of a file; called with a step, returns name -> mean."""

    def __init__(self, options: TrainOptions, engine: Engine, reward: WeightedReward):
        assert options.eval_data is not None
        greedy = replace(options, n=1, sampling=replace(options.sampling, temperature=0.0))
        self.prompts = [replace(prompt, n=1) for prompt in load_prompts(greedy, options.eval_data)]
        self.engine, self.reward = engine, reward

    def __call__(self, step: int) -> dict[str, float]:
        groups = self.engine.generate(parallel.share(self.prompts), progress=False)
        tables = [self.reward(group) for group in groups if group.error is None]
        means = metrics.reward_metrics(parallel.gather(tables).items)
        return {name.partition("/")[2]: mean for name, mean in means.items() if name.startswith("reward/")}


def load_prompts(options: TrainOptions, path: Path) -> list[Request]:
    """The requests of a file, without seeds: those belong to the steps.

    Raises ValueError naming the first lines that make no request, unless the options allow them.
    """
    defaults = Defaults(options.n, options.grpo.seed, options.sampling, options.system, options.image_root)
    read = list(read_requests(path, defaults))
    bad = [f"line {item.line}: {item.reason}" for item in read if isinstance(item, BadLine)]
    for line in bad[:10] if parallel.rank() == 0 else []:
        print(f"{path}, {line}", file=sys.stderr)
    require(not bad or options.allow_errors, "prompts, or --allow-errors", f"{len(bad)} bad lines", str(path))
    requests = [item[1] for item in read if not isinstance(item, BadLine)]
    require(len(requests) > 0, "at least one prompt", 0, str(path))
    return [replace(request, sampling=replace(request.sampling, seed=None)) for request in requests]


def say(line: str) -> None:
    """One line for the person who watches."""
    if parallel.rank() == 0:
        print(line, flush=True)


def save_processor(processor: Any, folder: Path) -> None:
    """Writes tokenizer and image processor beside a model's weights."""
    for part in (processor.tokenizer, processor.image_processor):
        if part is not None:
            part.save_pretrained(folder)


def write_options(options: TrainOptions) -> None:
    """Writes run.yaml, with which `--config` repeats the run."""
    options.output.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(_plain(replace(options, resume=False)), sort_keys=False)
    (options.output / "run.yaml").write_text(content, encoding="utf-8")


def _plain(value: Any) -> Any:
    """As YAML has it; without what is None by default."""
    if is_dataclass(value):
        named = {part.name: (part.default, getattr(value, part.name)) for part in fields(value)}
        return {name: _plain(held) for name, (default, held) in named.items() if (default, held) != (None, None)}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else str(value)
