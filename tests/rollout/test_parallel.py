"""Data parallel training: two ranks give what one rank with the whole batch gives."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.rollout import checkpoint, parallel
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.rewards import RewardTable
from foveate.rollout.testing import tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request

# Gradients that are added in another order differ by about 1e-6 of their size. Adam divides by their size, so that the
# smallest would be all rounding; with an eps of 1e-4 the weights of the runs agree to 1e-3 of how far they moved.
LEARNING_RATE = 1e-3
CONFIG = GRPOConfig(
    prompts_per_step=5, max_steps=3, learning_rate=LEARNING_RATE, adam_eps=1e-4, progress="none", save_every=3
)
PROMPTS = [[65 + i, 66, 67 + i] for i in range(5)]


def fake(monkeypatch, rank, size):
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "size", lambda: size)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 8])
def test_shares_are_the_list_in_order(monkeypatch, size, count):
    items, shares = list(range(count)), []
    for rank in range(size):
        fake(monkeypatch, rank, size)
        shares.append(parallel.share(items))
    assert [item for own in shares for item in own] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_rank_is_left_alone():
    assert (parallel.rank(), parallel.size()) == (0, 1)
    gathered = parallel.gather([3, 4])
    assert gathered.items[gathered.own] == gathered.items == [3, 4]
    parameter = torch.nn.Parameter(torch.ones(2))
    parallel.add_gradients([parameter])
    assert parameter.grad is None
    parallel.check_same(a=object())
    with parallel.torchrun_group():
        assert not torch.distributed.is_initialized()


def test_buckets_hold_every_parameter_once(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET_ELEMENTS", 6)
    parameters = [torch.nn.Parameter(torch.zeros(count)) for count in (2, 4, 1, 9, 0, 3, 3)]
    buckets = list(parallel._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[2, 4], [1], [9], [0, 3, 3]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]


def reward(group):
    totals = [float((rollout.token_ids < 100).float().mean()) for rollout in group.rollouts]
    if group.request.request_id == "p1":
        totals[0] = None
    return RewardTable({"low": totals}, totals)


def train(output, case):
    """One run; every rank does this. Returns metrics, weights and what the optimiser has."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_model("qwen3")
    engine = Engine(model, config=EngineConfig(page_size=16, kv_memory=4 << 20))
    config = replace(CONFIG, **case["config"])
    prompts = [
        Request(
            ids if place not in case["failing"] else [7] * 5000,  # beyond the context
            n=3,
            sampling=SamplingParams(max_tokens=4 + place),
            request_id=f"p{place}",
        )
        for place, ids in enumerate(PROMPTS)
    ]
    records = []
    trainer = Trainer(model, engine, reward, config, output_dir=output, callbacks=[records.append])
    trainer.train(prompts)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return [record.metrics for record in records], weights, [len(record.groups) for record in records]


CASES = {
    "token": {"config": {}, "failing": []},
    "sequence, two updates": {
        "config": {"aggregation": "sequence", "num_updates": 2, "micro_batch_size": 2},
        "failing": [1],
    },
    "a rank without a request": {"config": {"prompts_per_step": 1, "max_steps": 2, "save_every": 2}, "failing": []},
    "dynamic sampling, whitened over all ranks": {
        "config": {
            "prompts_per_step": 2,
            "max_steps": 2,
            "save_every": 2,
            "dynamic_sampling": 3,
            "dynamic_sampling_part": "low",
            "advantage": "reinforce++",
        },
        "failing": [0],
    },
    "a rank whose requests fail": {
        "config": {"aggregation": "constant", "aggregation_length": 8, "max_steps": 1, "save_every": 1},
        "failing": [0, 1, 2],
    },
}


def launch(count, words, timeout=240):
    """Starts `count` processes as torchrun would, with gloo on this machine, and returns what each has printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base |= {"WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            words,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        ended = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, ended, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_gives(tmp_path, name):
    for ended in launch(2, [sys.executable, __file__, str(tmp_path), name]):
        assert ended[0] == 0, ended[2]
    ranks = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    metrics, weights, _ = train(tmp_path / "alone", CASES[name])
    (first, first_weights, shares), (second, second_weights, other_shares) = ranks
    assert all(torch.equal(first_weights[key], second_weights[key]) for key in weights)
    assert len(metrics) == len(first) == len(second)
    whole = CASES[name]["config"].get("prompts_per_step", len(PROMPTS))
    assert [a + b for a, b in zip(shares, other_shares, strict=True)] == [whole] * len(metrics)
    before = {key: p.detach() for key, p in tiny_model("qwen3").named_parameters()}
    moved = max(float((weights[key] - before[key]).abs().max()) for key in weights)
    apart = max(float((weights[key] - first_weights[key]).abs().max()) for key in weights)
    assert apart < 1e-3 * moved
    for alone, rank_0, rank_1 in zip(metrics, first, second, strict=True):
        timed = {key for key in alone if key.startswith(("time/", "throughput/"))}
        assert alone.keys() == rank_0.keys()
        for key in alone.keys() - timed:
            if key.startswith(("reward/", "group/", "sample/", "completion/", "optim/lr", "step")):
                assert alone[key] == rank_0[key], key  # exact: these are of the same tokens
            assert alone[key] == pytest.approx(rank_0[key], rel=1e-4, abs=2e-6), key
            assert rank_0[key] == rank_1[key], key
    # Rank 0 alone writes, and what it writes is one run's.
    files = {path.name for path in (tmp_path / "0").iterdir()}
    assert files == {"metrics.jsonl", f"step-{len(metrics)}"}
    assert not (tmp_path / "1").exists()
    assert [json.loads(line) for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()] == first


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), [("config", "config"), ("prompts", "prompts"), ("stream", "requests")])
def test_ranks_that_differ_are_refused(tmp_path, case, name):
    for code, _, error in launch(2, [sys.executable, __file__, str(tmp_path), f"differ {case}"]):
        assert code == 0, error
    for rank in range(2):
        assert "expected the same on every rank" in (tmp_path / f"{rank}.txt").read_text()
        assert f"({name})" in (tmp_path / f"{rank}.txt").read_text()


def noisy(group):
    """Depends on all global generators of its rank."""
    drawn = (torch.rand(()).item() + random.random() + np.random.normal() for _ in group.rollouts)
    totals = [float((r.token_ids < 100).float().mean()) + x for r, x in zip(group.rollouts, drawn, strict=True)]
    return RewardTable({}, totals)


def train_with_noise(output, steps, resumed_from=None):
    """A run whose ranks draw different numbers; sampling goes by the engine's count of requests in `evaluate`."""
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(parallel.rank() + 10 * (resumed_from is not None))
    model = tiny_model("qwen3")
    engine = Engine(model, config=EngineConfig(page_size=16, kv_memory=4 << 20))
    config = GRPOConfig(
        prompts_per_step=3, max_steps=steps, learning_rate=LEARNING_RATE, progress="none", save_every=1, eval_every=1
    )

    def evaluate(step):
        request = Request([65, 66], sampling=SamplingParams(max_tokens=4))
        groups = engine.generate([request] * (1 + parallel.rank()), progress=False)  # not as many on each
        found = parallel.gather([group.rollouts[0].token_ids.tolist() for group in groups]).items
        return {f"{place}-{index}": token for place, ids in enumerate(found) for index, token in enumerate(ids)}

    trainer = Trainer(model, engine, noisy, config, output_dir=output, evaluate=evaluate)
    if resumed_from is not None:
        trainer.load_checkpoint(resumed_from)
    trainer.train([Request(ids, n=2, sampling=SamplingParams(max_tokens=4)) for ids in PROMPTS])


@pytest.mark.slow
def test_resumed_ranks_go_on_as_if_never_stopped(tmp_path):
    for name in ("whole", "resumed"):
        for code, _, error in launch(2, [sys.executable, __file__, str(tmp_path), name]):
            assert code == 0, error
    whole, resumed = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    )
    untimed = [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in whole]
    assert [line["step"] for line in resumed] == [2.0, 3.0]
    for one, two in zip(untimed[1:], resumed, strict=True):
        assert one == {key: two[key] for key in one}
    ends = [checkpoint.load_file(tmp_path / name / "step-3" / "trainer.safetensors") for name in ("whole", "resumed")]
    assert {key for key in ends[0] if key.startswith("rng/1/")} == {"rng/1/cpu", "rng/1/numpy", "rng/1/python"}
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    with pytest.raises(ValueError, match="ranks = 2, with which the run was begun, got 1"):
        train_with_noise(tmp_path / "alone", 3, tmp_path / "whole" / "step-1")


def differ(output, case, rank):
    """A run that has on each rank another configuration, other prompts, or others in an iterator."""
    if case == "config":
        train(output, {"config": {"learning_rate": 0.1 + rank}, "failing": []})
    model = tiny_model("qwen3")
    engine = Engine(model, config=EngineConfig(page_size=16, kv_memory=4 << 20))
    prompts = [Request([65, 66 + rank * (place == 4)], sampling=SamplingParams(max_tokens=2)) for place in range(5)]
    trainer = Trainer(model, engine, noisy, GRPOConfig(prompts_per_step=5, progress="none"))
    trainer.train(prompts if case == "prompts" else iter(prompts))


def main(folder, name):
    """What a rank of the tests above does."""
    with parallel.torchrun_group():
        rank = parallel.rank()
        if name == "whole":
            train_with_noise(folder / name, 3)
            return
        if name == "resumed":
            train_with_noise(folder / name, 3, folder / "whole" / "step-1")
            return
        if name.startswith("differ"):
            with pytest.raises(ValueError, match="the same") as error:
                differ(folder / str(rank), name.split()[1], rank)
            (folder / f"{rank}.txt").write_text(str(error.value))
            return
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(train(folder / str(rank), CASES[name])))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
