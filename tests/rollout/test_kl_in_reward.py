"""KL in the reward: the penalty of each sample by transformers' own forward, and what training makes of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from foveate.rollout.batch import KLPenalty, make_batch
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Learner
from foveate.rollout.prefix_groups import Sample
from foveate.rollout.rewards import RewardTable
from foveate.rollout.testing import tiny_model
from foveate.rollout.trainer import Trainer
from foveate.rollout.types import Request

TOLERANCE = 5e-5  # of log-probs at initializer_range 0.2
SMALL = EngineConfig(page_size=16, kv_memory=4 << 20)
IN_REWARD = {"kl_in": "reward", "kl_coef": 0.2, "progress": "none"}
ESTIMATES = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: torch.exp(-d) + d - 1}


def requests(count=2, n=3):
    params = SamplingParams(max_tokens=5, temperature=0.7)
    return [Request([7 + i, 40, 99], n=n, sampling=params, request_id=f"p{i}") for i in range(count)]


def truth(model, group, rollout):
    """log-softmax(logits / T) of the completion by transformers' forward of the whole sequence alone."""
    ids, count = torch.cat([group.prompt_ids, rollout.token_ids]), len(rollout.token_ids)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, -count - 1 : -1].double() / 0.7
    return logits.log_softmax(-1).gather(1, rollout.token_ids[:, None])[:, 0]


def generated(model):
    groups = Engine(model, config=SMALL).generate(requests(), progress=False)
    return [Sample(group, rollout) for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1, "prefix_grouping": False}], ids=["whole", "alone"])
@pytest.mark.parametrize("kind", ESTIMATES)
def test_the_penalty_of_each_token(kind, options):
    """Between the model as it stands and the reference."""
    model, reference = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    samples = generated(model)
    learner = Learner(model, reference, GRPOConfig(**IN_REWARD, kl_kind=kind, **options))
    got = learner.kl(samples)
    d = torch.cat([truth(model, s.group, s.rollout) - truth(reference, s.group, s.rollout) for s in samples])
    assert d.abs().max() > 0.5
    # An estimate moves by its slope times what the two log-probs are off.
    slope = {"k1": torch.ones_like(d), "k2": d.abs(), "k3": (1 - torch.exp(-d)).abs()}[kind]
    assert ((got - ESTIMATES[kind](d)).abs() <= 2 * TOLERANCE * (slope + 2 * TOLERANCE)).all()
    assert not got.requires_grad
    assert learner.kl([]).shape == (0,)


def make(lengths, totals, penalty, **options):
    groups = [
        SimpleNamespace(
            rollouts=[SimpleNamespace(token_ids=torch.zeros(n, dtype=torch.int64)) for n in group], request_id="p"
        )
        for group in lengths
    ]
    return make_batch(groups, [RewardTable({}, t) for t in totals], GRPOConfig(**options), None, penalty)


def test_rewards_lose_the_sum_over_their_tokens():
    """r - 0.5 sum of KL: 0 - 0.5 * 3 = -1.5, 1 - 0.5 * 1 = 0.5; 0 - 0.5 * 2 = -1, and one that cannot be scored."""
    values = torch.tensor([1.0, 2.0, 0.25, 0.25, 0.5, 2.0, 9.0, 9.0])
    penalty = KLPenalty(lambda samples: values, 0.5)
    lengths, totals = [[2, 3], [1, 2]], [[0.0, 1.0], [0.0, None]]
    given = {"advantage": "rloo", "kl_in": "reward", "kl_coef": 0.5}
    batch = make(lengths, totals, penalty, **given)
    assert batch.advantages.tolist() == pytest.approx([-2.0, 2.0, 0.0, 0.0])
    assert batch.kl.tolist() == pytest.approx([3.0, 1.0, 2.0, 18.0])
    assert batch.taught.tolist() == [True, True, True, False]
    assert make(lengths, totals, None, advantage="rloo").advantages.tolist() == [-1.0, 1.0, 0.0, 0.0]
    # Equal rewards are no longer equal: KL alone says what to do.
    same = make([[2, 3]], [[1.0, 1.0]], KLPenalty(lambda samples: values[:5], 0.5), **given)
    assert same.advantages.tolist() == pytest.approx([-1.0, 1.0])


def low(group):
    return RewardTable({}, [float((r.token_ids < 100).float().mean()) for r in group.rollouts])


def make_trainer(reference, reward, config):
    model = tiny_model("qwen3")
    return Trainer(model, Engine(model, config=SMALL), reward, config, ref_model=reference)


def trained(reference, reward, config):
    trainer = make_trainer(reference, reward, config)
    return trainer, trainer.train_step(requests())


def batches_of(trainer):
    """What its learner is given from here on."""
    update, batches = trainer.learner.update, []
    trainer.learner.update = lambda batch, *rates: (batches.append(batch), update(batch, *rates))[1]
    return batches


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_a_reference_that_is_a_copy_makes_no_advantage(advantage, precision):
    """Equal rewards and no KL: exactly 0, however small the std that it is divided by."""
    config = GRPOConfig(**IN_REWARD, kl_kind="k1", advantage=advantage, precision=precision)
    trainer = make_trainer(tiny_model("qwen3"), lambda group: RewardTable({}, [0.5] * len(group.rollouts)), config)
    batches = batches_of(trainer)
    record = trainer.train_step(requests())
    assert batches[0].advantages.tolist() == [0.0] * 6
    assert record.metrics["reward/kl"] == record.metrics["optim/grad_norm"] == 0
    assert record.metrics["policy/logprob_difference_max"] > 0  # what the engine's own log-probs would add


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce++_baseline"])
def test_a_step_is_that_of_rewards_without_the_penalty(advantage):
    """The same weights after a step as where the reward function itself subtracts transformers' KL; no term is left in
    the loss."""
    reference, before = tiny_model("qwen3", seed=1), tiny_model("qwen3")
    options = {"learning_rate": 1e-3, "advantage": advantage, "seed": 3}
    trainer, record = trained(reference, low, GRPOConfig(**IN_REWARD, kl_kind="k1", **options))
    sums = []

    def by_hand(group):
        kl = [float((truth(before, group, r) - truth(reference, group, r)).sum()) for r in group.rollouts]
        sums.extend(kl)
        return RewardTable({}, [t - 0.2 * x for t, x in zip(low(group).totals, kl, strict=True)])

    expected, by_hand_record = trained(None, by_hand, GRPOConfig(progress="none", **options))
    plain, _ = trained(None, low, GRPOConfig(progress="none", **options))
    gap, moved = (
        max(
            (p - q).abs().max().item()
            for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True)
        )
        for other in (expected, plain)
    )
    assert gap < 1e-5 < 1e-4 < moved  # Adam's first step is the rate times the gradient's sign, 1e-3, where it is not 0
    assert record.metrics["reward/kl"] == pytest.approx(sum(sums) / len(sums), abs=10 * TOLERANCE)
    assert record.metrics["reward/kl_coef"] == 0.2
    assert record.metrics["reward/total"] == pytest.approx(sum(sum(low(g).totals) for g in record.groups) / 6)
    assert record.metrics["policy/loss"] == pytest.approx(by_hand_record.metrics["policy/loss"], abs=1e-4)
    assert "policy/kl" not in record.metrics
    assert "reward/kl" not in by_hand_record.metrics


def test_a_sample_that_cannot_be_scored():
    """It has no advantage, is in no baseline, and its KL is not reported."""
    reference = tiny_model("qwen3", seed=1)

    def some(group):
        known = low(group).totals
        return RewardTable({}, [known[0], None, known[2]] if group.request_id == "p0" else known)

    trainer = make_trainer(reference, some, GRPOConfig(**IN_REWARD, advantage="rloo"))
    batches = batches_of(trainer)
    record = trainer.train_step(requests())
    kl, totals = batches[0].kl, [total for table in record.tables for total in table.totals]
    assert batches[0].taught.tolist() == [True, False, True, True, True, True]
    left = [None if total is None else total - 0.2 * x for total, x in zip(totals, kl.tolist(), strict=True)]
    first = left[0] - left[2]
    rest = [left[i] - (sum(left[3:]) - left[i]) / 2 for i in (3, 4, 5)]
    assert batches[0].advantages.tolist() == pytest.approx([first, 0, -first, *rest], rel=1e-5, abs=1e-7)
    assert kl[1] > 0.1
    assert record.metrics["reward/kl"] == pytest.approx((kl.sum() - kl[1]).item() / 5)
    assert record.metrics["sample/unscorable"] == 1


def test_nothing_scored_reports_no_kl():
    config = GRPOConfig(**IN_REWARD)
    _, record = trained(tiny_model("qwen3", seed=1), lambda group: RewardTable({}, [None] * 3), config)
    assert "reward/kl" not in record.metrics
    assert record.metrics["optim/grad_norm"] == 0


def test_dynamic_sampling_sees_rewards_without_the_penalty():
    """A group of equal rewards goes, although KL would tell its samples apart; the penalty is of those that stay."""

    def some(group):
        return RewardTable({}, [0.0, 1.0, 1.0] if group.request_id in ("p1", "p3") else [1.0] * 3)

    config = GRPOConfig(**IN_REWARD, dynamic_sampling=True, dynamic_sampling_part="total", advantage="rloo")
    trainer = make_trainer(tiny_model("qwen3", seed=1), some, config)
    batches = batches_of(trainer)
    record = trainer.train_step(requests(), iter(requests(4)[2:]))
    assert [group.request_id for group in record.groups] == ["p1", "p3"]
    assert record.metrics["group/drawn"] == 4
    assert record.metrics["group/zero_variance_share"] == 0.5
    rewards = torch.tensor([[0.0, 1.0, 1.0]] * 2, dtype=torch.float64) - 0.2 * batches[0].kl.view(2, 3)
    expected = rewards - (rewards.sum(1, keepdim=True) - rewards) / 2
    torch.testing.assert_close(batches[0].advantages.double(), expected.flatten(), rtol=1e-5, atol=1e-7)
    assert record.metrics["reward/kl"] == pytest.approx(batches[0].kl.mean().item())


def test_a_resumed_run_has_the_same_penalty(tmp_path):
    """Between the weights at the step and the reference: the policy of the checkpoint, not the one it replaces."""
    schedule = {"kl_schedule": "grpo_d", "kl_min": 0.1, "kl_max": 0.3, "max_steps": 4}
    config = GRPOConfig(kl_in="reward", learning_rate=1e-3, progress="none", **schedule)
    trainer, resumed = (make_trainer(tiny_model("qwen3", seed=1), low, config) for _ in range(2))
    trainer.train_step(requests())
    trainer.save_checkpoint(tmp_path / "one")
    whole = trainer.train_step(requests())
    resumed.load_checkpoint(tmp_path / "one")
    again = resumed.train_step(requests())
    for name in ("reward/kl", "reward/kl_coef", "reward/total", "policy/loss", "optim/grad_norm"):
        assert again.metrics[name] == whole.metrics[name], name
    assert all(torch.equal(p, resumed.model.get_parameter(n)) for n, p in trainer.model.named_parameters())


def test_the_weight_follows_its_schedule():
    config = GRPOConfig(kl_in="reward", kl_schedule="grpo_d", kl_min=0.1, kl_max=0.3, max_steps=10, progress="none")
    trainer, record = trained(tiny_model("qwen3", seed=1), low, config)
    assert record.metrics["reward/kl_coef"] == pytest.approx(0.2)
    later = trainer.train_step(requests())
    assert later.metrics["reward/kl_coef"] == pytest.approx(0.2 - 0.1 / 3)


def test_no_reference_is_refused():
    with pytest.raises(ValueError, match=r"\(ref_model\)"):
        trained(None, low, GRPOConfig(**IN_REWARD))


def test_the_loss_has_no_kl_term():
    config = GRPOConfig(**IN_REWARD)
    assert config.loss_options.kl_coef == 0
    assert replace(config, kl_in="loss").loss_options.kl_coef == 0.2
