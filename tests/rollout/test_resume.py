"""A run that is killed and resumed ends with the weights and metrics of one that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foveate.rollout import checkpoint

# The program imports once and forks each run, so that a run takes tenths of a second.
COMMON = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from foveate.rollout import checkpoint
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.rewards import RewardTable
from foveate.rollout.testing import special_id, tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request, VisionInputs
import transformers
transformers.logging.disable_progress_bar()

family, steps, output = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def prompts():
    generator = torch.Generator().manual_seed(5)
    for index in range(5):
        ids = torch.randint(256, (3 + index,), generator=generator).tolist()
        inputs = None
        if family == "qwen2_5_vl":
            ids += [special_id("<|vision_start|>")] + [special_id("<|image_pad|>")] * 2 + [special_id("<|vision_end|>")]
            inputs = VisionInputs(torch.randn(8, 1176, generator=generator), torch.tensor([[1, 2, 4]]))
        yield Request(ids, vision=inputs, n=2, sampling=SamplingParams(max_tokens=4))

def reward(group):  # depends on the global generators, which a checkpoint holds
    noise = [torch.rand(()).item() + random.random() + random.gauss(0, 1) + np.random.normal() for _ in group.rollouts]
    totals = [float((r.token_ids < 100).float().mean()) + x for r, x in zip(group.rollouts, noise)]
    return RewardTable({"low": totals}, totals)

def train(folder, last=False):
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    model = tiny_model(family)
    engine = Engine(model, config=EngineConfig(page_size=16, kv_memory=1 << 20))
    config = GRPOConfig(progress="none", learning_rate=1e-3, prompts_per_step=2, max_steps=steps, num_updates=2,
                        warmup_steps=3, schedule="cosine", weight_decay=0.1, save_every=0 if last else 2)
    trainer = Trainer(model, engine, reward, config, output_dir=folder)
    if last:
        trainer.callbacks.append(lambda record: trainer.save_checkpoint(folder / "step-0"))
    if found := checkpoint.saved(folder):
        trainer.load_checkpoint(found[-1])
    trainer.train(list(prompts()))

def child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid

def finished(pid):
    '''Whether it ended by itself, and well; False: killed.'''
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return not os.WIFSIGNALED(status)
"""

RANDOM_KILLS = """
random.seed(int(sys.argv[4]))
start = time.monotonic()
assert finished(child(lambda: train(output / "whole")))
of_a_step, kills = (time.monotonic() - start) / steps, 0

def size():
    path = output / "killed" / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0

while True:
    wanted, begun = size() + random.randint(0, 5 * 700), time.monotonic()  # 700 bytes a step
    pid = child(lambda: train(output / "killed"))
    while size() < wanted and time.monotonic() - begun < steps * of_a_step:
        time.sleep(0.001)
    time.sleep(random.uniform(0, of_a_step))
    os.kill(pid, signal.SIGKILL)
    if finished(pid):
        break
    kills += 1
    assert kills < 100
print(kills)
"""

# Kills at the n-th call of anything that touches the folder while a checkpoint is written.
EVERY_POINT = """
import safetensors.torch

def train_until(folder, last, point):
    calls = [0]
    def fatal(function):
        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return counted
    save = checkpoint.save
    def watched(directory, *args):
        if last and not directory.exists():
            return save(directory, *args)
        kept = os.fsync, os.replace, os.rmdir, os.unlink, checkpoint.save_file, Path.write_text, shutil.rmtree
        os.fsync, os.replace, os.rmdir, os.unlink = map(fatal, kept[:4])
        checkpoint.save_file, Path.write_text, shutil.rmtree = map(fatal, kept[4:])
        save(directory, *args)
        os.fsync, os.replace, os.rmdir, os.unlink, checkpoint.save_file, Path.write_text, shutil.rmtree = kept
    checkpoint.save = watched
    train(folder, last)

for last in (False, True):
    folder = output / ("last" if last else "steps")
    assert finished(child(lambda: train(folder / "whole", last)))
    point = 1
    while not finished(child(lambda: train_until(folder / f"killed-{point}", last, point))):
        assert finished(child(lambda: train(folder / f"killed-{point}", last)))
        point += 1
    shutil.rmtree(folder / f"killed-{point}")
    print(point - 1)
"""


def run(program, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMON + program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


def metrics(folder):
    """step -> its numbers; every line is whole, and a step that was done twice gave the same numbers twice."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "throughput/"))}
        assert found.setdefault(values["step"], values) == values
    return found


def assert_same_run(first, second):
    assert metrics(first) == metrics(second)
    ends = [checkpoint.saved(folder)[-1] for folder in (first, second)]
    assert ends[0].name == ends[1].name
    for name in ("model.safetensors", "trainer.safetensors"):
        tensors, others = (load_file(end / name) for end in ends)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert len({(end / "trainer.json").read_text() for end in ends}) == 1
    assert [path.name for path in second.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seed"), [("qwen3", 0), ("qwen2_5_vl", 2)])
def test_kills_at_random_moments(family, seed, tmp_path):
    (kills,) = run(RANDOM_KILLS, family, 16, tmp_path, seed)
    assert kills >= 2
    assert sorted(metrics(tmp_path / "whole")) == list(range(1, 17))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_kills_at_every_point_of_a_save(tmp_path):
    """Of a new checkpoint each time, and of one that takes the place of the last."""
    points = run(EVERY_POINT, "qwen3", 2, tmp_path)
    assert points[0] >= 8
    assert points[1] >= 16
    for name, count in zip(("steps", "last"), points, strict=True):
        for point in range(1, count + 1):
            assert_same_run(tmp_path / name / "whole", tmp_path / name / f"killed-{point}")


def test_checkpoints_are_found_by_step(tmp_path):
    for name in ("step-10", "step-9", ".step-11.old-77", ".step-12.writing-77", "last", "step-x", ".step-9.old-3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-9", "step-10", "step-11"]
    assert checkpoint.saved(Path(tmp_path / "missing")) == []
