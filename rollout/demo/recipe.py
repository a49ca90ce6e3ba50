"""The demo from beginning to end: warm start, GRPO on the engine's rollouts, evaluation, report."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.kernels.policy_loss import KINDS
from foveate.rollout.config import EngineConfig
from foveate.rollout.demo.model import make_model, make_processor
from foveate.rollout.demo.options import DemoOptions
from foveate.rollout.demo.pruning import look_at_pruning
from foveate.rollout.demo.record import Arm, DemoRecord, Reply, replies_of
from foveate.rollout.demo.report import write_report
from foveate.rollout.demo.scenes import QUESTIONS, Scene, scene_stream
from foveate.rollout.demo.tasks import MAX_TOKENS, evaluate, make_request, make_reward, sample_groups
from foveate.rollout.demo.threads import choose, step_seconds, thread_count
from foveate.rollout.demo.warmstart import SupervisedTrainer, WarmStartConfig, warm_start
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.progress import without_transformers_bars
from foveate.rollout.pruning import PruneConfig
from foveate.rollout.rewards import WeightedReward
from foveate.rollout.trainer import StepRecord, Trainer

PROMPTS_PER_STEP = 32
GROUP_SIZE = 8
NUM_HELD_OUT = 300
NUM_STOPPING = 400
SHOWN_OF_EACH_KIND = 3
EVALUATE_EVERY = 20  # steps
METRICS_FOLDERS = ("grpo", "ablation")  # by arm


@dataclass(frozen=True)
class DemoSizes:
    """What a test makes smaller."""

    held_out: int = NUM_HELD_OUT
    stopping: int = NUM_STOPPING
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


def grpo_config(options: DemoOptions) -> GRPOConfig:
    """The recipe: one update on the policy's own samples, every sample alike, a rate that falls to zero.

    With half as many prompts the gradient is so noisy that perception falls before it rises.
    """
    constant = KINDS[options.kind].aggregation == "constant"
    return GRPOConfig(
        kind=options.kind,
        advantage=options.advantage,
        aggregation="sequence" if options.kind == "grpo" else "kind",
        aggregation_length=MAX_TOKENS if constant else None,
        prompts_per_step=PROMPTS_PER_STEP,
        max_steps=options.steps,
        learning_rate=5e-4,
        betas=(0.9, 0.99),
        warmup_steps=20,
        schedule="linear",
        micro_batch_size=PROMPTS_PER_STEP * GROUP_SIZE,
        eval_every=min(EVALUATE_EVERY, options.steps),
        progress="none",
        seed=options.seed,
    )


class Demo:
    """One run of the demo; `record` grows as it goes."""

    def __init__(self, options: DemoOptions, sizes: DemoSizes | None = None):
        self.options, self.sizes = options, sizes or DemoSizes()
        self.processor = make_processor()
        self.engine = self._make_engine(None)  # of the warm start, which each arm begins with a copy of
        held_out = list(itertools.islice(scene_stream("held-out", 0), self.sizes.held_out))
        config = grpo_config(options)
        self.record = DemoRecord(
            seed=options.seed,
            num_parameters=sum(parameter.numel() for parameter in self.engine.model.parameters()),
            group_size=GROUP_SIZE,
            prompts_per_step=config.prompts_per_step,
            held_out=held_out,
            variant=options.variant,
            showcase=first_of_each_kind(held_out, SHOWN_OF_EACH_KIND),
        )
        self.reward = make_reward()

    def run(self) -> DemoRecord:
        """Everything; prints what it does."""
        start = time.perf_counter()
        record, options = self.record, self.options
        for folder in METRICS_FOLDERS:
            (options.output / folder).mkdir(parents=True, exist_ok=True)
            (options.output / folder / "metrics.jsonl").unlink(missing_ok=True)
        say(f"a Qwen2.5-VL of {record.num_parameters / 1e6:.1f} million parameters learns to read scanned digits")
        rewards = {"with the perception reward": self.reward}
        if options.ablate:
            rewards["without the perception reward"] = make_reward(with_perception=False)
        with thread_count(self._choose_threads()):
            self.warm_start()
            policies = [self.policy(options.prune_config) for _ in rewards]
            record.before_samples = self._sample(policies[0])
            for (name, reward), policy, folder in zip(rewards.items(), policies, METRICS_FOLDERS, strict=False):
                arm = self.train(name, policy, reward, grpo_config(options), options.output / folder)
                arm.samples = self._sample(policy)
            record.pruning = look_at_pruning(policies[0], self.processor, record.held_out, self.reward)
        self._save_model(policies[0])
        record.seconds = time.perf_counter() - start
        report = write_report(record, options.output)
        say("")
        if options.ablate:
            say(f"without the perception reward, {record.arms[1].result}")
        say(record.arms[0].result)
        say(f"report: {report}")
        say(f"model: {options.output / 'model'} (Engine.from_pretrained loads it)")
        say(f"done in {record.seconds / 60:.1f} minutes")
        return record

    def _choose_threads(self) -> int:
        if self.options.threads is not None:
            return self.options.threads
        seconds = step_seconds(self.processor)
        best = choose(seconds)
        measured = ", ".join(f"{value:.2f} s with {count}" for count, value in seconds.items())
        say(f"threads: {best} (a training step took {measured})")
        return best

    def policy(self, prune: PruneConfig | None) -> Engine:
        """An engine over a copy of the model as it is now, which prunes as told."""
        engine = self._make_engine(prune)
        engine.model.load_state_dict(self.engine.model.state_dict())
        engine.update_weights()
        return engine

    def warm_start(self) -> None:
        """Supervised training of the demo's model, on all vision tokens."""
        config, record, engine = self.sizes.warm_start, self.record, self.engine
        say(f"\nsupervised warm start, until {config.enough:.0%} of the stopping set is answered")
        stopping = list(itertools.islice(scene_stream("stopping", 0), self.sizes.stopping))

        def accuracy() -> float:
            engine.update_weights()
            return evaluate(engine, stopping, self.reward).accuracy

        def tell(step: int, loss: float, value: float) -> None:
            record.warm_start.append((step, loss, value))
            say(f"  step {step:4d}   loss {loss:.3f}   accuracy {value:.1%}")

        trainer = SupervisedTrainer(engine.model, self.processor, config)
        warm_start(trainer, scene_stream("train", 2 * self.options.seed), accuracy, tell)

    def train(
        self, name: str, engine: Engine, reward: WeightedReward, config: GRPOConfig, folder: Path | None = None
    ) -> Arm:
        """One GRPO run, added to the record. folder: of its metrics, None writes none."""
        arm = Arm(name)
        self.record.arms.append(arm)

        def look(step: int) -> dict[str, float]:
            result = evaluate(engine, self.record.held_out, reward)
            arm.evaluations.append((step, result))
            return {"accuracy": result.accuracy, "perception": result.perception, "format": result.format}

        look(0)
        drawn = f"{config.prompts_per_step} prompts x {GROUP_SIZE} rollouts"
        say(f"\nGRPO {', '.join(filter(None, (name, self.options.variant)))}: {config.max_steps} steps of {drawn}")
        say(f"  held-out accuracy before: {arm.before.accuracy:.1%}")
        callbacks: list[Callable[[StepRecord], None]] = [
            lambda step: arm.metrics.append(step.metrics),
            ProgressPrinter(config),
        ]
        trainer = Trainer(engine.model, engine, reward, config, evaluate=look, output_dir=folder, callbacks=callbacks)
        scenes = scene_stream("train", 2 * self.options.seed + 1)
        trainer.train(make_request(scene, GROUP_SIZE) for scene in scenes)
        if trainer.step % config.eval_every:
            look(trainer.step)
        return arm

    def _sample(self, engine: Engine) -> list[list[Reply]]:
        scenes = [self.record.held_out[index] for index in self.record.showcase]
        groups = sample_groups(engine, scenes, self.reward, GROUP_SIZE, self.options.seed)
        return [replies_of(group, table) for group, table in groups]

    def _make_engine(self, prune: PruneConfig | None) -> Engine:
        seed = self.options.seed
        return Engine(make_model(seed), self.processor, EngineConfig(seed=seed, prune=prune))

    def _save_model(self, engine: Engine) -> None:
        """Writes what `Engine.from_pretrained` loads."""
        folder = self.options.output / "model"
        with without_transformers_bars():
            parts: tuple[Any, ...] = (engine.model, self.processor.tokenizer, self.processor.image_processor)
            for part in parts:
                part.save_pretrained(folder)


def first_of_each_kind(scenes: list[Scene], count: int) -> list[int]:
    """Indices of the first `count` scenes of each kind of question: nothing is picked by its outcome."""
    found = [[i for i, scene in enumerate(scenes) if scene.kind == kind][:count] for kind in QUESTIONS]
    return list(itertools.chain.from_iterable(found))


class ProgressPrinter:
    """Prints a line for every evaluation: means over the steps since the last."""

    def __init__(self, config: GRPOConfig):
        self.config, self.recent, self.start = config, list[dict[str, float]](), time.perf_counter()

    def __call__(self, step: StepRecord) -> None:
        self.recent.append(step.metrics)
        if "eval/accuracy" not in step.metrics:
            return
        names = {"reward/total": "reward", "reward/perception": "perception", "policy/entropy": "entropy"}
        means = [
            f"{label} {sum(metrics[name] for metrics in self.recent) / len(self.recent):.2f}"
            for name, label in names.items()
        ]
        assert self.config.max_steps is not None
        left = (time.perf_counter() - self.start) / step.step * (self.config.max_steps - step.step)
        say(
            f"  step {step.step:4d}/{self.config.max_steps}   {'   '.join(means)}   "
            f"held-out accuracy {step.metrics['eval/accuracy']:.1%}   {left / 60:.1f} min left"
        )
        self.recent.clear()


def say(line: str) -> None:
    """One line for the person who watches."""
    print(line, flush=True)


def run_demo(options: DemoOptions, sizes: DemoSizes | None = None) -> DemoRecord:
    """Runs the demo as the options say and writes its report."""
    return Demo(options, sizes).run()
