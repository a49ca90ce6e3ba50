"""The objective against arithmetic by hand and closed forms."""

import math

import pytest
import torch

from foveate.rollout.grpo import (
    GRPOConfig,
    importance_weights,
    kl_penalty,
    learning_rate,
    sample_weights,
    token_terms,
)

CONFIG = GRPOConfig()  # clip 0.2 / 0.3, dual clip 3


def terms_of(ratio, advantage, config=CONFIG, **extra):
    """Terms of one token, and d loss / d logprob."""
    old = torch.tensor([-1.25], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    terms = token_terms(logprobs, old, torch.tensor([advantage], dtype=torch.float64), config, **extra)
    terms.loss.sum().backward()
    return terms, terms.loss.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "bound"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.0, -2.0, 2.0, 2.0, None),
        (1.25, 2.0, -2.5, -2.5, None),  # inside 1.3
        (1.5, 2.0, -2.6, 0.0, "clip_high"),  # 1.3 * 2
        (0.5, 2.0, -1.0, -1.0, None),  # a good token that became rare is pulled back
        (0.9, -2.0, 1.8, 1.8, None),
        (0.5, -2.0, 1.6, 0.0, "clip_low"),  # 0.8 * 2
        (1.5, -2.0, 3.0, 3.0, None),  # a bad token that became likely is pushed down
        (2.9, -2.0, 5.8, 5.8, None),
        (4.0, -2.0, 6.0, 0.0, "clip_dual"),  # 3 * 2
        (4.0, 2.0, -2.6, 0.0, "clip_high"),
        (4.0, 0.0, 0.0, 0.0, None),
        (0.1, 0.0, 0.0, 0.0, None),
    ],
)
def test_clipped_loss_and_gradient(ratio, advantage, loss, gradient, bound):
    terms, got_loss, got_gradient = terms_of(ratio, advantage)
    assert got_loss == pytest.approx(loss, rel=1e-12, abs=1e-15)
    assert got_gradient == pytest.approx(gradient, rel=1e-12, abs=1e-15)
    marked = [name for name in ("clip_low", "clip_high", "clip_dual") if getattr(terms, name).item()]
    assert marked == ([bound] if bound else [])


def test_without_dual_clip():
    terms, loss, gradient = terms_of(4.0, -2.0, GRPOConfig(dual_clip=None))
    assert (loss, gradient) == (pytest.approx(8.0), pytest.approx(8.0))
    assert not terms.clip_dual.any()


def test_extreme_ratios_stay_finite():
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    terms = token_terms(logprobs, torch.tensor([-500.0, 0.0]), torch.tensor([-1.0, -1.0]), GRPOConfig(dual_clip=None))
    terms.loss.sum().backward()
    assert terms.loss[0].item() == pytest.approx(math.exp(20), rel=1e-6)
    assert terms.loss[1].item() == pytest.approx(0.8)
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "value"), [("k1", lambda d: d), ("k2", lambda d: d * d / 2), ("k3", lambda d: math.exp(-d) + d - 1)]
)
@pytest.mark.parametrize("d", [-1.5, 0.0, 0.7, 3.0])
def test_kl_values_and_gradient(kind, value, d):
    logprobs = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    penalty = kl_penalty(logprobs, logprobs.detach() - d, kind)
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(value(d), rel=1e-12, abs=1e-15)
    assert logprobs.grad.item() == pytest.approx(d, rel=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradient_in_expectation_is_that_of_the_kl(kind):
    """Summed over a whole vocabulary with the policy's probabilities as weights, against autograd of the KL."""
    generator = torch.Generator().manual_seed(3)
    logits, ref = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    ref = ref.log_softmax(-1)
    gradients = []
    for estimate in (False, True):
        leaf = logits.clone().requires_grad_()
        log_p = leaf.log_softmax(-1)
        exact = (log_p.exp() * (log_p - ref)).sum()
        loss = (log_p.exp().detach() * kl_penalty(log_p, ref, kind)).sum() if estimate else exact
        loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_kl_is_clamped():
    logprobs = torch.tensor([0.0, -100.0], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([-100.0, 0.0]), "k1")
    penalty.sum().backward()
    assert penalty.tolist() == [20.0, -20.0]
    assert logprobs.grad.tolist() == [20.0, -20.0]


def test_importance_weights():
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -1.0 - math.log(4), -1.0 + math.log(2)])
    weights = importance_weights(old, behaviour, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(importance_weights(old, behaviour, math.inf), torch.tensor([1.0, 4.0, 0.5]))
    assert not weights.requires_grad


def test_a_kept_set_weighs_by_its_mass():
    """Drawn from a set of mass 0.6 without any mismatch: the weight is 0.6, and it makes the estimate exact."""
    p = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    logprobs, log_kept = p.log()[:2], torch.tensor(math.log(0.6), dtype=torch.float64)
    weights = importance_weights(logprobs, logprobs - log_kept, 2.0)
    torch.testing.assert_close(weights, torch.full((2,), 0.6, dtype=torch.float64))
    value = torch.tensor([3.0, -1.0], dtype=torch.float64)
    drawn = p[:2] / 0.6
    torch.testing.assert_close((drawn * weights * value).sum(), (p[:2] * value).sum())


def test_tis_scales_the_loss_and_not_the_kl():
    behaviour = torch.tensor([-1.25 + math.log(2)], dtype=torch.float64)  # weight 1/2
    reference = torch.tensor([-2.25], dtype=torch.float64)
    config = GRPOConfig(tis_cap=2.0, kl_kind="k1")
    terms, loss, gradient = terms_of(1.0, 2.0, config, behaviour_logprobs=behaviour, ref_logprobs=reference)
    assert (loss, gradient) == (pytest.approx(-1.0), pytest.approx(-1.0))
    assert terms.kl.item() == pytest.approx(1.0)


def test_sample_weights_by_hand():
    lengths = torch.tensor([1, 3, 4])
    assert sample_weights(lengths, "token").tolist() == [0.125] * 3
    torch.testing.assert_close(sample_weights(lengths, "sequence"), torch.tensor([1 / 3, 1 / 9, 1 / 12]))
    torch.testing.assert_close(sample_weights(lengths, "constant", 10), torch.full((3,), 1 / 30))


def test_schedules():
    def rates(**kwargs):
        config = GRPOConfig(learning_rate=1.0, warmup_steps=2, **kwargs)
        return [round(learning_rate(config, step), 12) for step in range(7)]

    assert rates() == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates(schedule="linear", max_steps=6) == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    half = math.sqrt(0.5) / 2
    cosine = [0.5, 1, 1, round(0.5 + half, 12), 0.5, round(0.5 - half, 12), 0]
    assert rates(schedule="cosine", max_steps=6) == cosine
    assert learning_rate(GRPOConfig(learning_rate=1.0, schedule="linear", max_steps=4), 0) == 1.0


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"prompts_per_step": 0}, "prompts_per_step"),
        ({"num_updates": 1.5}, "num_updates"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_kind": "k4"}, "kl_kind"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"aggregation": "constant"}, "aggregation_length"),
        ({"aggregation_length": 5}, "aggregation_length"),
        ({"old_logprobs": "none"}, "old_logprobs"),
        ({"tis_cap": 0.0}, "tis_cap"),
        ({"advantage_ddof": 2}, "advantage_ddof"),
        ({"precision": "fp16"}, "precision"),
        ({"schedule": "cosine"}, "max_steps"),
        ({"schedule": "step"}, "schedule"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"progress": "yes"}, "progress"),
    ],
)
def test_config_refuses_by_name(kwargs, name):
    with pytest.raises(ValueError, match=rf"\({name}\)"):
        GRPOConfig(**kwargs)
