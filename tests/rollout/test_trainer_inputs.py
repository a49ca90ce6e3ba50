"""What callers hand a trainer first: rewards as plain numbers, groups of one, prompts and options of other types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.rewards import Format, RewardTable, WeightedReward
from foveate.rollout.testing import tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request

QUIET = {"progress": "none", "learning_rate": 1e-3}


def lengths(group) -> list[float]:
    return [len(rollout.token_ids) / 8 for rollout in group.rollouts]


def prompts(n: int = 3) -> list[Request]:
    sampling = SamplingParams(max_tokens=8, stop_token_ids=tuple(range(40)))
    return [Request([5, 6, 7 + i], n=n, sampling=sampling, request_id=f"p{i}") for i in range(2)]


def make(reward=lengths, config=None) -> Trainer:
    model = tiny_model("qwen3")
    engine = Engine(model, config=EngineConfig(page_size=16, kv_memory=4 << 20))
    return Trainer(model, engine, reward, GRPOConfig(**QUIET) if config is None else config)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_a_reward_may_be_one_number_a_rollout(kind):
    expected = make(lambda group: RewardTable({}, lengths(group))).train_step(prompts())
    record = make(lambda group: kind(lengths(group))).train_step(prompts())
    assert [table.totals for table in record.tables] == [table.totals for table in expected.tables]
    assert len({total for table in record.tables for total in table.totals}) > 1
    assert record.metrics["policy/loss"] == expected.metrics["policy/loss"] != 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "a RewardTable or 3 totals, got NoneType"),
        (1.0, "a RewardTable or 3 totals, got float"),
        (torch.tensor(1.0), "a RewardTable or 3 totals, got Tensor"),
        (np.array(1.0), "a RewardTable or 3 totals, got ndarray"),
        ({0: 0.1, 1: 0.2, 2: 0.9}, "a RewardTable or 3 totals, got dict"),
        ({1.0, 0.5, 0.0}, "a RewardTable or 3 totals, got set"),
        ([1.0], "3 totals, got 1"),
        ("abc", "a number or None, got 'a'"),
    ],
)
def test_what_is_no_reward(wrong, message):
    with pytest.raises(ValueError, match=rf"expected {message} \(reward of request 'p0'"):
        make(lambda group: wrong).train_step(prompts())


def test_what_a_reward_raises_names_the_request():
    def broken(group):
        raise KeyError("answer")

    with pytest.raises(KeyError) as caught:
        make(broken).train_step(prompts())
    assert caught.value.__notes__ == ["raised by the reward of request 'p0'"]
    with pytest.raises(ZeroDivisionError) as caught:
        make(lambda group: (1 / 0 for _ in group.rollouts)).train_step(prompts())
    assert caught.value.__notes__ == ["raised by the reward of request 'p0'"]


def test_a_group_of_one_teaches_nothing():
    """It is its own baseline, and n is 1 unless it is given: every gradient would be 0, without a word."""
    with pytest.raises(ValueError, match=r"request 'p0': n >= 2, because 'grpo' compares .*, got 1 \(n\)"):
        make().train_step(prompts(n=1))
    record = make(config=GRPOConfig(**QUIET, advantage="reinforce++")).train_step(prompts(n=1))
    assert record.metrics["optim/grad_norm"] > 0


def test_what_is_no_prompt_and_no_configuration():
    with pytest.raises(ValueError, match=r"a Request, got 'why' \(prompts\[0\]\)"):
        make().train(["why"])
    with pytest.raises(ValueError, match=r"a GRPOConfig or None, got \{'kind': 'dapo'\} \(config\)"):
        make(config={"kind": "dapo"})


def test_a_line_of_one_sample_is_found_before_the_model_is_loaded(tmp_path, capsys):
    pytest.importorskip("tyro")
    from foveate.rollout.tools.train import TrainOptions, load_prompts

    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a"}\n{"prompt": "b", "n": 1}\n', encoding="utf-8")
    reward = WeightedReward([Format()], {"format": 1.0})
    options = TrainOptions(model="nowhere", data=data, n=2, allow_errors=True)
    assert [request.n for request in load_prompts(options, data, reward)] == [2]
    assert "line 2: expected request '2': n >= 2, because 'grpo' compares" in capsys.readouterr().err
