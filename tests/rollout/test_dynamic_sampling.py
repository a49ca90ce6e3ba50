"""Steps that draw prompts until enough groups have both right and wrong answers."""

from types import SimpleNamespace

import pytest
import torch

from foveate.rollout import collect
from foveate.rollout.collect import Collector
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.metrics import Clock
from foveate.rollout.rewards import RewardTable
from foveate.rollout.testing import tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request

QUIET = {"progress": "none", "learning_rate": 1e-3}


class FakeEngine:
    """Answers at once, in reverse; a prompt of 0 fails."""

    def __init__(self):
        self.asked = []

    def stream(self, requests):
        self.asked.append([request.prompt[0] for request in requests])
        for request in reversed(requests):
            rollouts = [SimpleNamespace(token_ids=torch.zeros(2), finish_reason="stop")] * request.n
            error = ValueError("no") if request.prompt[0] == 0 else None
            yield SimpleNamespace(request=request, request_id=str(request.prompt[0]), rollouts=rollouts, error=error)


def reward(group):
    """Prompts above 100 have both answers, others are all right; the shaped total always differs."""
    right = [1.0, float(group.request.prompt[0] < 100)]
    return RewardTable(
        {"accuracy": right, "length": [0.1, 0.2]}, [r + s for r, s in zip(right, (0.1, 0.2), strict=True)]
    )


def run(prompts, more=(), reward=reward, **options):
    engine = FakeEngine()
    config = GRPOConfig(**{"dynamic_sampling": True, "reward_workers": 0, **options})
    requests = [[Request([prompt], n=2) for prompt in part] for part in (prompts, more)]
    found = Collector(engine, reward, config, Clock()).collect(requests[0], 3, iter(requests[1]))
    return engine.asked, found


def prompts_of(found):
    return [group.request.prompt[0] for group in found.groups]


def test_groups_without_both_answers_are_replaced():
    asked, found = run([101, 2, 103, 4], [5, 106, 107, 108, 109])
    # 2 of 4 stayed: 2 missing over a half are 4
    assert asked == [[101, 2, 103, 4], [5, 106, 107, 108]]
    assert prompts_of(found) == [101, 103, 106, 107]
    assert (found.num_prompts, found.rounds) == (8, 2)
    assert len(found.scored) == 8
    assert [table.parts["accuracy"] for table in found.tables] == [[1.0, 0.0]] * 4


def test_a_round_asks_for_what_is_missing_over_the_share_that_stays():
    asked, found = run([101, 102, 103, 4], [5, 6, 107, 108, 109])
    # 1 missing over three quarters is 2; over 3 of 6 again 2
    assert asked == [[101, 102, 103, 4], [5, 6], [107, 108]]
    assert prompts_of(found) == [101, 102, 103, 107]


def test_a_full_first_round_asks_no_more():
    asked, found = run([101, 102], [103])
    assert asked == [[101, 102]]
    assert (prompts_of(found), found.rounds) == ([101, 102], 1)


def test_a_failed_request_is_replaced():
    asked, found = run([101, 0], [102, 103])
    assert asked == [[101, 0], [102, 103]]
    assert prompts_of(found) == [101, 102]
    assert found.scored[1] is None


def test_a_round_asks_at_most_for_a_whole_step():
    asked, _ = run([1, 2, 3, 104], [*range(5, 20), *range(120, 140)])
    assert [len(part) for part in asked] == [4] * len(asked)
    assert len(asked) == 6


def test_off_takes_what_comes():
    asked, found = run([1, 102, 0], [103], dynamic_sampling=0)
    assert asked == [[1, 102, 0]]
    assert prompts_of(found) == [1, 102, 0]
    assert found.tables[2] is None


def test_the_end_of_rounds_and_of_prompts_is_an_error():
    with pytest.raises(
        RuntimeError, match=r"expected 2 groups .*, got 1 of 6 prompts in 3 rounds.*\(dynamic_sampling\)"
    ):
        run([101, 2], range(3, 99), dynamic_sampling=3, dynamic_sampling_part="accuracy")
    with pytest.raises(RuntimeError, match="got 1 of 3 prompts in 2 rounds, all there are"):
        run([101, 2], [3])


def test_which_reward_says_what_is_right():
    _, found = run([1, 2], dynamic_sampling_part="total")
    assert prompts_of(found) == [1, 2]
    with pytest.raises(ValueError, match=r"\['accuracy', 'length', 'total'\], got 'right' \(dynamic_sampling_part\)"):
        run([1, 2], dynamic_sampling_part="right")

    def unscored(group):
        return RewardTable({"accuracy": [1.0, 0.0]}, [1.0, None])

    with pytest.raises(RuntimeError, match="got 0 of"):
        run([101, 102], reward=unscored)


def test_replacements_have_seeds_of_their_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(collect, "seed_of", lambda *parts: seeds.append(parts) or len(seeds))
    run([101, 2], [3, 104])
    assert seeds == [(0, 3, 0), (0, 3, 1), (0, 3, 2), (0, 3, 3)]


# In training


def requests(count):
    generator = torch.Generator().manual_seed(5)
    params = SamplingParams(max_tokens=4)
    ids = [torch.randint(256, (3 + index,), generator=generator).tolist() for index in range(count)]
    return [Request(prompt, n=2, sampling=params, request_id=f"p{index}") for index, prompt in enumerate(ids)]


def by_tokens(group):
    right = [float(int(rollout.token_ids[0]) % 2) for rollout in group.rollouts]
    return RewardTable({"accuracy": right}, right)


def trainer(steps, **options):
    model = tiny_model("qwen3")
    config = GRPOConfig(**QUIET, kind="dapo", prompts_per_step=2, max_steps=steps, dynamic_sampling=30, **options)
    return Trainer(model, Engine(model, config=EngineConfig(page_size=16, kv_memory=4 << 20)), by_tokens, config)


def test_a_resumed_run_draws_the_same_prompts(tmp_path):
    def kept(records):
        return [
            [(g.request_id, [r.token_ids.tolist() for r in g.rollouts]) for g in record.groups] for record in records
        ]

    records, again = [], []
    whole = trainer(4)
    whole.callbacks.append(records.append)
    whole.train(requests(40))
    assert any(record.metrics["group/rounds"] > 1 for record in records[2:])
    assert all(len(record.groups) == 2 for record in records)
    assert all(len({*table.totals}) == 2 for record in records for table in record.tables)
    assert whole.num_prompts == sum(record.metrics["group/drawn"] for record in records)
    first = trainer(2)
    first.train(requests(40))
    first.save_checkpoint(tmp_path / "two")
    resumed = trainer(4)
    resumed.load_checkpoint(tmp_path / "two")
    resumed.callbacks.append(again.append)
    resumed.train(requests(40))
    assert kept(again) == kept(records[2:])
    assert resumed.num_prompts == whole.num_prompts
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name))


def test_every_epoch_still_has_each_prompt_once_first():
    asked = []
    drawn = trainer(6)
    stream = drawn.engine.stream
    drawn.engine.stream = lambda batch: asked.append([request.request_id for request in batch]) or stream(batch)
    starts = []
    step = drawn.train_step
    drawn.train_step = lambda *a: starts.append(len(asked)) or step(*a)
    drawn.train(requests(12))
    first = [name for start in starts for name in asked[start]]
    assert sorted(first) == sorted(f"p{index}" for index in range(12))
    for start, end in zip(starts, [*starts[1:], len(asked)], strict=True):
        one_step = [name for batch in asked[start:end] for name in batch]
        assert len(set(one_step)) == len(one_step)


def test_an_iterator_hands_over_what_it_takes():
    drawn = trainer(3)
    left = iter(requests(60))
    drawn.train(left)
    assert 60 - drawn.num_prompts == len(list(left))
    assert drawn.num_prompts > 6
