"""`foveate train`: GRPO on the user's own model and data."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from foveate.rollout import checkpoint, metrics, parallel
from foveate.rollout.atomic import fresh_folder
from foveate.rollout.checks import require
from foveate.rollout.collect import check_prompt
from foveate.rollout.config import EngineConfig, SamplingParams
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

SAVE_EVERY = 50  # steps


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
    """Names and weights: accuracy, format, overlong, perception, repetition, package.module:name, file.py:name. Left
    out, those of Perception-R1."""
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
    """Go on from the last checkpoint in the output folder; with no run there, begin."""
    keep_checkpoints: int | None = None
    """How many of the newest checkpoints stay; left out, all."""
    allow_errors: bool = False
    """Train although lines of the data make no request."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    grpo: GRPOConfig = field(default_factory=partial(GRPOConfig, save_every=SAVE_EVERY))

    def __post_init__(self) -> None:
        require(self.n >= 1, "an int >= 1", self.n, "--n")
        require(self.sampling.seed is None, "the seed in --grpo.seed", self.sampling.seed, "--sampling.seed")
        require(self.data.is_file(), "a file", str(self.data), "--data")
        require(self.eval_data is None or self.eval_data.is_file(), "a file", str(self.eval_data), "--eval-data")
        missing = self.grpo.eval_every > 0 and self.eval_data is None
        require(not missing, "a file for --grpo.eval-every > 0", None, "--eval-data")
        keep = self.keep_checkpoints
        require(keep is None or keep >= 1, "an int >= 1 or None", keep, "--keep-checkpoints")
        for flag, model in (("--model", self.model), ("--ref-model", self.ref_model)):
            require(not self._writes(model), f"another folder than this run writes, {self.output}", model, flag)

    def _writes(self, model: str | None) -> bool:
        """Whether the run would write, or with --keep-checkpoints remove, a folder it reads from."""
        if model is None:
            return False
        path, output = Path(model).resolve(), self.output.resolve()
        own = path.parent == output and re.fullmatch(r"model|step-\d+", path.name) is not None
        return own or path == (self.output / "model").resolve()

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers of a run depend on, beside the data and `grpo`: it is only resumed with the same."""
        sampling = {f"sampling.{name}": value for name, value in _plain_all(asdict(self.sampling)).items()}
        names = ("dtype", "max_context", "ban_vision_tokens", "deterministic")
        engine = {f"engine.{name}": getattr(self.engine, name) for name in names}
        own = {"n": self.n, "rewards": self.rewards, "system": self.system, "dtype": self.dtype}
        return {**own, **sampling, **_plain_all(engine)}


class CheckpointTrainer(Trainer):
    """A `Trainer` whose checkpoints also hold the processor, so that every tool can load them.

    more_settings: of the command, which a resumed run must repeat too.
    """

    def __init__(self, *args: Any, processor: Any, keep: int | None, more_settings: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.processor, self.keep, self.more_settings = processor, keep, more_settings

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, **self.more_settings}

    def save_checkpoint(self, directory: str | Path, write_more: Callable[[Path], None] | None = None) -> None:
        directory = Path(directory)
        with without_transformers_bars():
            super().save_checkpoint(directory, write_more or partial(save_processor, self.processor))
        if parallel.rank() == 0:
            for old in checkpoint.saved(directory.parent)[: -self.keep if self.keep else 0]:
                shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 after an error of the user's in options, data or model, which is printed.

    What fails later, as in a reward of the user's own, is raised with its traceback.
    """
    options = parse(TrainOptions, "foveate train", arguments)
    with ExitStack() as stack:
        try:
            stack.enter_context(parallel.torchrun_group())
            trainer, prompts = prepare(options)
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            print(f"foveate train: {error}", file=sys.stderr)
            return 1
        train(options, trainer, prompts)
    return 0


def run(options: TrainOptions) -> Trainer:
    """Trains as the options say and writes the model; returns the trainer that did it.

    In a process group every rank calls it; rank 0 alone writes and prints.
    """
    trainer, prompts = prepare(options)
    train(options, trainer, prompts)
    return trainer


def prepare(options: TrainOptions) -> tuple[CheckpointTrainer, list[Request]]:
    """The trainer at the step where it begins or goes on, and its prompts; whatever the user gave is read here."""
    found = _found(options)
    reward = weighted_reward(options.rewards or PERCEPTION_R1_WEIGHTS)
    prompts = load_prompts(options, options.data, reward)
    asked = load_prompts(options, options.eval_data, reward) if options.eval_data else None
    engine = load_engine(options.model, options.dtype, options.engine)
    ref_model: Any = None
    if options.grpo.needs_reference:
        ref_model = load_engine(options.ref_model or options.model, options.dtype, options.engine).model
    trainer = CheckpointTrainer(
        engine.model,
        engine,
        reward,
        options.grpo,
        ref_model=ref_model,
        evaluate=Evaluation(asked, engine, reward) if asked else None,
        output_dir=options.output,
        processor=load_processor(options.model, engine.spec.vision is not None),
        keep=options.keep_checkpoints,
        more_settings=options.settings,
    )
    if found is not None:
        trainer.load_checkpoint(found)
        trainer.identify(prompts)
        say(f"going on from {found}")
    if parallel.rank() == 0:
        write_options(options)
    return trainer, prompts


def train(options: TrainOptions, trainer: CheckpointTrainer, prompts: list[Request]) -> None:
    """Trains to the end and writes the last checkpoint and the model."""
    say(f"metrics: {options.output / 'metrics.jsonl'}")
    trainer.train(prompts)
    every = options.grpo.save_every
    if every and trainer.step % every:
        trainer.save_checkpoint(options.output / f"step-{trainer.step}")
    if parallel.rank() == 0:
        model: Any = trainer.model
        with without_transformers_bars(), fresh_folder(options.output / "model") as folder:
            model.save_pretrained(folder)
            save_processor(trainer.processor, folder)
    say(f"model after {trainer.step} steps: {options.output / 'model'}")


def _found(options: TrainOptions) -> Path | None:
    """The checkpoint to go on from. Raises ValueError where a run is there that is not, or cannot be, resumed."""
    found, lines = checkpoint.saved(options.output), options.output / "metrics.jsonl"
    used = bool(found) or lines.exists()
    require(options.resume or not used, "a folder without a run, or --resume", str(options.output), "--output")
    lost = not found and lines.exists() and lines.stat().st_size > 0
    require(not lost, "a checkpoint to go on from, or another folder", f"{lines} alone", "--resume")
    return found[-1] if found else None


class Evaluation:
    """Mean rewards of greedy answers to the prompts of a file; called with a step, returns name -> mean."""

    def __init__(self, prompts: list[Request], engine: Engine, reward: WeightedReward):
        self.prompts = [replace(prompt, n=1, sampling=replace(prompt.sampling, temperature=0.0)) for prompt in prompts]
        self.engine, self.reward = engine, reward

    def __call__(self, step: int) -> dict[str, float]:
        groups = self.engine.generate(parallel.share(self.prompts), progress=False)
        tables = [self.reward(group) for group in groups if group.error is None]
        means = metrics.reward_metrics(parallel.gather(tables).items)
        return {name.partition("/")[2]: mean for name, mean in means.items() if name.startswith("reward/")}


def load_prompts(options: TrainOptions, path: Path, reward: WeightedReward) -> list[Request]:
    """The requests of a file, without seeds: those belong to the steps.

    Raises ValueError naming the first lines that make no request, or one the rewards cannot score, unless the options
    allow them.
    """
    defaults = Defaults(options.n, options.grpo.seed, options.sampling, options.system, options.image_root)
    requests, bad = [], []
    for item in read_requests(path, defaults):
        try:
            if isinstance(item, BadLine):
                raise ValueError(item.reason)
            check_prompt(item[1], f"line {item[0]}", options.grpo)
            reward.check(item[1])
        except ValueError as error:
            line = item.line if isinstance(item, BadLine) else item[0]
            bad.append(f"line {line}: {error}")
        else:
            requests.append(replace(item[1], sampling=replace(item[1].sampling, seed=None)))
    for text in bad[:10] if parallel.rank() == 0 else []:
        print(f"{path}, {text}", file=sys.stderr)
    require(not bad or options.allow_errors, "prompts, or --allow-errors", f"{len(bad)} bad lines", str(path))
    require(len(requests) > 0, "at least one prompt", 0, str(path))
    return requests


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
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else str(value)


def _plain_all(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in values.items()}
