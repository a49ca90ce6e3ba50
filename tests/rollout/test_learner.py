"""One update on the engine's own rollouts: exactness of the gradient, options, what is reported."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from foveate.kernels.policy_loss import linear_policy_loss
from foveate.rollout import learner as learner_module
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.learner import Batch, Learner
from foveate.rollout.prefix_groups import Sample
from foveate.rollout.testing import special_id, tiny_model
from foveate.rollout.types import Request, VisionInputs

TOLERANCE = 5e-5  # of log-probs, engine against trainer, at initializer_range 0.2
SMALL = EngineConfig(page_size=16, kv_memory=4 << 20)


def prompts(count, vision=False, n=3, **sampling):
    generator = torch.Generator().manual_seed(5)
    requests = []
    for index in range(count):
        ids = torch.randint(256, (3 + index,), generator=generator).tolist()
        inputs = None
        if vision:
            grid = torch.tensor([[1, 4, 6], [1, 8, 4]] if index % 2 else [[1, 2, 4]])
            for _, height, width in grid.tolist():
                ids += [special_id("<|vision_start|>")] + [special_id("<|image_pad|>")] * (height * width // 4)
                ids += [special_id("<|vision_end|>"), 66]
            inputs = VisionInputs(torch.randn(int(grid.prod(-1).sum()), 1176, generator=generator), grid)
        params = SamplingParams(**{"max_tokens": 6, "temperature": 1.0, **sampling})
        requests.append(Request(ids, vision=inputs, n=n, sampling=params, request_id=f"p{index}"))
    return requests


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def batch_of(model, vision, **kwargs):
    engine = Engine(model, config=SMALL)
    groups = engine.generate(prompts(3, vision, seed=1), progress=False)
    samples = [Sample(g, r) for g in groups for r in g.rollouts]
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(len(samples), generator=generator)
    return Batch(samples, advantages, torch.ones(len(samples), dtype=torch.bool), 37.5)


def gradient_after(model, batch, config):
    learner = Learner(model, None, config)
    learner.optimizer.step = lambda: None
    report = learner.update(batch, 1e-3)
    return {name: p.grad.double() for name, p in model.named_parameters()}, report


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_micro_batches_add_up_to_the_whole(family):
    """The gradient of any cut is as close to float64 as that of the whole batch, up to twice its error."""
    model = tiny_model(family)
    batch = batch_of(model, family == "qwen2_5_vl")
    limits = {"max_grad_norm": None, "micro_batch_size": 64}
    truth, _ = gradient_after(copy.deepcopy(model).double(), batch, GRPOConfig(**limits))
    whole, whole_report = gradient_after(model, batch, GRPOConfig(**limits))
    norm = sum(float(g.square().sum()) for g in truth.values()) ** 0.5

    def error(got):
        return sum(float((got[n] - truth[n]).square().sum()) for n in truth) ** 0.5

    assert error(whole) < 1e-4 * norm
    for cut in ({"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 40}):
        got, report = gradient_after(model, batch, GRPOConfig(**{**limits, **cut}))
        assert error(got) <= 2 * error(whole) + torch.finfo(torch.float32).eps * norm
        assert report["policy/loss"] == pytest.approx(whole_report["policy/loss"], rel=1e-5, abs=1e-7)


def test_the_first_update_is_the_policy_gradient():
    """On policy the clipped loss has the gradient of -sum A logprob / denominator, whatever the clips are."""
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    got, report = gradient_after(model, batch, GRPOConfig(max_grad_norm=None))
    model.zero_grad()
    for sample, advantage in zip(batch.samples, batch.advantages, strict=True):
        ids = torch.cat([sample.group.prompt_ids, sample.rollout.token_ids])[None]
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(sample.group.prompt_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, sample.rollout.token_ids[:, None])
        (-advantage * chosen.sum() / batch.denominator).backward()
    norm = sum(float(g.square().sum()) for g in got.values()) ** 0.5
    error = sum(float((p.grad - got[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5
    assert error < 1e-4 * norm
    assert report["policy/clip_low"] == report["policy/clip_high"] == report["policy/clip_dual"] == 0
    assert report["optim/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("vision", [False, True])
def test_checkpointing_changes_no_gradient(vision):
    family = "qwen2_5_vl" if vision else "qwen3"
    model = tiny_model(family)
    batch = batch_of(model, vision)
    calls = []
    for name, module in model.named_modules():
        if name.endswith(".mlp") and "merger" not in name:
            module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    plain, _ = gradient_after(copy.deepcopy(model), batch, GRPOConfig())
    once = sorted(calls)
    calls.clear()
    saved, _ = gradient_after(model, batch, GRPOConfig(gradient_checkpointing=True))
    assert sorted(calls) == sorted(once * 2)  # each block again in the backward pass
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert not model.training


def test_old_policy_of_later_updates_is_that_of_the_first():
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    config = GRPOConfig(num_updates=3, clip_low=0.01, clip_high=0.01, learning_rate=1e-2)
    report = Learner(model, None, config).update(batch, 1e-2)
    assert report["policy/clip_low"] > 0
    assert report["policy/clip_high"] > 0
    assert report["policy/logprob_difference_max"] < TOLERANCE  # taken before the first update


def test_engine_old_logprobs_and_importance_weights():
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    shifted = [replace(s, rollout=replace(s.rollout, logprobs=s.rollout.logprobs + math.log(2))) for s in batch.samples]
    shifted = replace(batch, samples=shifted)
    engine = GRPOConfig(old_logprobs="engine", dual_clip=None, max_grad_norm=None)
    _, report = gradient_after(model, shifted, engine)  # ratio 1/2: clips where A < 0
    negative = sum(len(s.rollout.token_ids) for s, a in zip(batch.samples, batch.advantages, strict=True) if a < 0)
    count = sum(len(s.rollout.token_ids) for s in batch.samples)
    assert report["policy/clip_low"] == pytest.approx(negative / count)
    assert report["policy/logprob_difference_mean"] == pytest.approx(math.log(2), abs=TOLERANCE)
    plain, _ = gradient_after(model, batch, GRPOConfig(max_grad_norm=None))
    halved, report = gradient_after(model, shifted, GRPOConfig(max_grad_norm=None, correction="tis"))
    assert report["policy/correction"] == pytest.approx(0.5, abs=TOLERANCE)
    for name in plain:
        torch.testing.assert_close(halved[name], plain[name] / 2, rtol=1e-3, atol=float(plain[name].abs().max()) * 1e-4)


def test_the_mismatch_is_that_of_the_draws_and_the_old_policy_that_of_the_model():
    """log_kept separates the two: the engine's model gave `logprobs`, the tokens were drawn from what was kept."""
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    kept = [replace(s, rollout=replace(s.rollout, log_kept=s.rollout.log_kept - 0.5)) for s in batch.samples]
    kept = replace(batch, samples=kept)
    config = GRPOConfig(max_grad_norm=None, correction="tis")
    _, report = gradient_after(model, kept, config)  # behaviour = logprobs + 0.5
    assert report["policy/correction"] == pytest.approx(math.exp(-0.5), abs=TOLERANCE)
    assert report["policy/mismatch_k1"] == pytest.approx(0.5, abs=TOLERANCE)
    _, report = gradient_after(model, kept, GRPOConfig(max_grad_norm=None, old_logprobs="engine"))
    assert report["policy/ratio"] == pytest.approx(1.0, abs=TOLERANCE)


@pytest.mark.parametrize("option", [{"correction": "tis"}, {"rejection": "geometric"}])
def test_the_engines_own_log_probs_leave_no_mismatch(option):
    with pytest.raises(ValueError, match=r"expected None for old_logprobs='engine'"):
        GRPOConfig(old_logprobs="engine", **option)


def test_kl_to_a_reference():
    model = tiny_model("qwen3")
    batch = replace(batch_of(model, False), advantages=torch.zeros(9))
    config = GRPOConfig(kl_coef=0.5, kl_kind="k3")
    same = Learner(model, copy.deepcopy(model), config).update(batch, 0.0)
    other = Learner(model, tiny_model("qwen3", seed=1), config).update(batch, 0.0)
    assert same["policy/kl"] == 0
    assert same["optim/grad_norm"] == 0
    assert other["policy/kl"] > 0.01
    assert other["optim/grad_norm"] > 0
    assert other["policy/loss"] > 0


def test_bf16_forward_is_close_and_parameters_stay():
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    plain, _ = gradient_after(model, batch, GRPOConfig(max_grad_norm=None))
    mixed, _ = gradient_after(model, batch, GRPOConfig(max_grad_norm=None, precision="bf16"))
    norm = sum(float(g.square().sum()) for g in plain.values()) ** 0.5
    error = sum(float((mixed[n] - plain[n]).square().sum()) for n in plain) ** 0.5
    assert 0 < error < 0.3 * norm
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_rate_and_decay_of_a_step():
    """Without a gradient a step is the decay alone: matrices shrink by rate x decay, biases and norms stay."""
    model = tiny_model("qwen2")
    batch = replace(batch_of(model, False), advantages=torch.zeros(9))
    before = weights_of(model)
    Learner(model, None, GRPOConfig(weight_decay=0.5, learning_rate=1.0)).update(batch, 0.25)
    for name, value in weights_of(model).items():
        expected = before[name] * (1 - 0.25 * 0.5) if value.dim() > 1 else before[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_a_non_finite_gradient_stops_before_the_step():
    model = tiny_model("qwen3")
    batch = replace(batch_of(model, False), advantages=torch.full((9,), float("inf")))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"expected a finite loss and gradient norm.*\(step 7, update 1 of 1\)"):
        Learner(model, None, GRPOConfig()).update(batch, 1e-3, step=7)
    assert_same_weights(before, weights_of(model))
    batch = replace(batch, advantages=torch.ones(9))
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))  # the loss stays what it is
    with pytest.raises(RuntimeError, match=r"got -?[\d.e-]+ and (inf|nan) \(step 1"):
        Learner(model, None, GRPOConfig()).update(batch, 1e-3)
    assert_same_weights(before, weights_of(model))


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_a_loss_that_is_not_finite_stops_though_its_gradient_is(kind, monkeypatch):
    """That of a token which the policy cannot draw."""
    model = tiny_model("qwen3")
    batch, before = batch_of(model, False), weights_of(model)
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    allowed[batch.samples[0].rollout.token_ids[0]] = False
    monkeypatch.setattr(learner_module, "linear_policy_loss", partial(linear_policy_loss, allowed=allowed))
    learner = Learner(model, None, GRPOConfig(kind=kind, num_updates=2))
    with pytest.raises(RuntimeError, match=r"finite loss.*got (nan|-?inf) and \d.*\(step 7, update 1 of 2\)"):
        learner.update(batch, 1e-3, step=7)
    assert_same_weights(before, weights_of(model))


def test_dropout_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no dropout.*self_attn"):
        Learner(tiny_model("qwen3", attention_dropout=0.1), None, GRPOConfig())


def logprobs_of(model, sample):
    ids = torch.cat([sample.group.prompt_ids, sample.rollout.token_ids])[None]
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(sample.group.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, sample.rollout.token_ids[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_a_later_update_off_policy(kind):
    """Ratios around 1, a reference, a sample without reward: against the formula, in float64, on single sequences."""
    model, reference = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    batch = batch_of(model, False)
    generator = torch.Generator().manual_seed(4)
    moved = []
    for sample in batch.samples:
        shift = torch.randn(len(sample.rollout.token_ids), generator=generator)
        moved.append(replace(sample, rollout=replace(sample.rollout, logprobs=sample.rollout.logprobs + shift)))
    batch = replace(batch, samples=moved, taught=torch.arange(len(moved)) != 4)
    more = {"clip_low": 0.3, "clip_high": 0.3} if kind == "gspo" else {}
    config = GRPOConfig(kind=kind, old_logprobs="engine", max_grad_norm=None, kl_coef=0.25, micro_batch_size=4, **more)
    learner = Learner(model, reference, config)
    learner.optimizer.step = lambda: None
    learner.update(batch, 1e-3)
    double, ref = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    double.zero_grad()
    total = 0.0
    for sample, advantage, taught in zip(batch.samples, batch.advantages.double(), batch.taught, strict=True):
        if not taught:
            continue
        logprobs = logprobs_of(double, sample)
        difference = logprobs - sample.rollout.logprobs.double()
        ratio = (difference.mean().expand(len(difference)) if kind == "gspo" else difference).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(*((0.7, 1.3) if more else (0.8, 1.3))))
        if kind == "grpo" and advantage < 0:
            loss = loss.clamp(max=-3 * advantage)
        d = logprobs - logprobs_of(ref, sample).detach()
        loss = loss + 0.25 * d.detach() * logprobs  # the gradient of the penalty on policy
        total = total + (loss.mean() if kind == "gspo" else loss.sum())
    (total / batch.denominator).backward()
    truth = {name: p.grad for name, p in double.named_parameters()}
    norm = sum(float(g.square().sum()) for g in truth.values()) ** 0.5
    error = sum(float((p.grad - truth[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5
    assert error < 1e-4 * norm


@pytest.mark.parametrize("kind", ["dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "cispo_max", "sapo"])
def test_every_kind_takes_two_updates(kind):
    """The second one is off the policy of the first; on policy all but "gspo"'s means are the policy gradient."""
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    more = {"aggregation_length": 6} if kind == "dr_grpo" else {}
    config = GRPOConfig(kind=kind, num_updates=2, max_grad_norm=None, entropy_coef=0.01, **more)
    report = Learner(model, None, config).update(batch, 1e-2)
    assert report["policy/ratio"] != 1
    assert report["policy/logprob_difference_max"] < TOLERANCE  # taken before the first update
    assert all(math.isfinite(value) for value in report.values())


def test_a_batch_without_rewards_moves_nothing():
    model = tiny_model("qwen3")
    batch = batch_of(model, False)
    report = Learner(model, None, GRPOConfig()).update(replace(batch, taught=torch.zeros(9, dtype=torch.bool)), 1e-3)
    assert report["optim/grad_norm"] == report["policy/loss"] == 0
    assert "policy/entropy" not in report
    assert report["policy/logprob_difference_max"] < TOLERANCE


def test_the_kl_weight_of_the_step_replaces_the_constant_one():
    model, reference = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    batch = replace(batch_of(model, False), advantages=torch.zeros(9))
    config = GRPOConfig(kl_schedule="grpo_d", kl_min=0.1, kl_max=0.3, max_steps=10, max_grad_norm=None)
    norms = []
    for weight in (0.1, 0.2, 0.0):
        learner = Learner(copy.deepcopy(model), reference, config)
        norms.append(learner.update(batch, 0.0, weight)["optim/grad_norm"])
    assert norms[0] > 1e-3
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)
    assert norms[2] == 0
