"""What the policy loss reports, how its parts are named and bounded, and which combinations it refuses."""

import math

import pytest
import torch

from foveate.kernels.policy_loss import (
    KINDS,
    PolicyLossOptions,
    kl_in_reward,
    linear_policy_loss,
    logprob_policy_loss,
    loss_denominator,
    mean_metrics,
    sequence_sums,
)


def problem():
    """Vectors of 4 sequences, the third without tokens, in float64."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 4, 0, 12])
    logprobs, entropy, *spread = (torch.randn(25, generator=draw).double() for _ in range(5))
    logprobs, entropy = -logprobs.abs() - 0.1, entropy.abs()
    old = logprobs + 0.3 * spread[0]
    return (logprobs, entropy), {
        "advantages": torch.tensor([1.0, -2.0, 3.0, -0.5]).double(),
        "sequence_ids": torch.arange(4, dtype=torch.int32).repeat_interleave(lengths),
        "denominator": 8.0,
        "old_logprobs": old,
        "rollout_logprobs": old + 0.2 * spread[1],
        "ref_logprobs": logprobs + 0.5 * spread[2],
        "mask": torch.rand(25, generator=draw) < 0.8,
    }


def test_metrics_are_those_of_the_tokens():
    (logprobs, entropy), data = problem()
    options = PolicyLossOptions(
        clip_high=0.3, dual_clip=1.35, correction="mis", correction_low=0.8, correction_high=1.2
    )
    out = logprob_policy_loss(logprobs, entropy, **data, options=options)
    active = data["mask"]
    ratio = (logprobs - data["old_logprobs"]).exp()
    advantages = data["advantages"][data["sequence_ids"].long()]
    log_w = data["old_logprobs"] - data["rollout_logprobs"]
    w, d = log_w.exp(), logprobs - data["ref_logprobs"]
    kept = (w >= 0.8) & (w <= 1.2)
    expected = {
        "clip_low": (advantages < 0) & (ratio < 0.8),
        "clip_high": (advantages > 0) & (ratio > 1.3),
        "clip_dual": (advantages < 0) & (ratio > 1.35),
        "dropped": ~kept,
        "ratio": ratio,
        "entropy": entropy,
        "kl": torch.exp(-d) + d - 1,
        "correction": w * kept,
        "mismatch_k1": -log_w,
        "mismatch_k3": w - log_w - 1,
        "mismatch_abs": log_w.abs(),
    }
    means = mean_metrics(out.metrics)
    for name, values in expected.items():
        torch.testing.assert_close(means[name], values[active].double().mean(), rtol=1e-12, atol=1e-14)
    assert means["tokens"] == active.sum()
    assert means["ratio_max"] == ratio[active].max()
    torch.testing.assert_close(means["mismatch_abs_max"], log_w[active].abs().max())
    w = w[active]
    torch.testing.assert_close(means["ess"], w.sum() ** 2 / (w.numel() * (w**2).sum()))
    assert set(means) == {*expected, "tokens", "ratio_max", "mismatch_abs_max", "ess"}
    assert all(means[name] > 0 for name in ("clip_low", "clip_high", "clip_dual", "dropped"))
    data.update(rollout_logprobs=None, ref_logprobs=None)
    assert set(mean_metrics(logprob_policy_loss(logprobs, entropy, **data).metrics)) == {
        "tokens", "clip_low", "clip_high", "clip_dual", "dropped", "ratio", "ratio_max", "entropy",
    }  # fmt: skip


def test_what_delta_bounds_is_counted():
    (logprobs, entropy), data = problem()
    out = logprob_policy_loss(logprobs, entropy, **data, options=PolicyLossOptions(delta=1.25))
    over = (logprobs - data["old_logprobs"]).exp() > 1.25
    bounded = over & (data["advantages"][data["sequence_ids"].long()] < 0) & data["mask"]
    assert out.metrics["clip_dual"] == bounded.sum() > 0


def test_denominators():
    lengths = torch.tensor([3, 0, 5])
    assert loss_denominator(lengths, "token") == 8
    assert loss_denominator(lengths, "sequence") == 3
    assert loss_denominator(lengths, "constant", 100) == 300
    vectors, data = problem()
    expected = logprob_policy_loss(*vectors, **data).loss
    data["denominator"] = loss_denominator(lengths, "token")
    assert torch.equal(logprob_policy_loss(*vectors, **data).loss, expected)
    with pytest.raises(ValueError, match=r"\(constant\)"):
        loss_denominator(lengths, "constant")


def test_kl_in_the_reward():
    rewards, kl = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 4.0])
    got = kl_in_reward(rewards, kl, torch.tensor([0, 0, 2], dtype=torch.int32), 0.5)
    assert torch.equal(got, torch.tensor([0.625, 2.0, 1.0]))


def test_sums_of_sequences():
    """In float64: 1 is lost beside 2^25 in float32. A sequence without tokens has 0."""
    values = torch.tensor([2.0**25, 1.0, -3.0], requires_grad=True)
    got = sequence_sums(values, torch.tensor([2, 2, 0], dtype=torch.int32), 4)
    assert torch.equal(got, torch.tensor([-3.0, 0.0, 2.0**25 + 1, 0.0], dtype=torch.float64))
    assert not got.requires_grad
    assert sequence_sums(values[:0], torch.zeros(0, dtype=torch.int32), 0).shape == (0,)


def test_log_ratios_are_clamped_and_have_no_gradient_beyond():
    logprobs = torch.tensor([-1.0, -30.0, -1.0, -50.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-30.0, -1.0, -1.5, -50.0], dtype=torch.float64)
    out = logprob_policy_loss(logprobs, torch.zeros(4).double(), advantages=torch.tensor([-1.0]).double(),
                              sequence_ids=torch.zeros(4, dtype=torch.int32), denominator=1.0, old_logprobs=old,
                              options=PolicyLossOptions(clip_low=1.0, aggregation="token"))  # fmt: skip
    exps = torch.tensor([20.0, -20.0, 0.5, 0.0], dtype=torch.float64).exp()
    torch.testing.assert_close(out.loss.detach(), exps.sum(), rtol=1e-15, atol=0)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.stack([0 * exps[0], 0 * exps[1], exps[2], exps[3]]))


@pytest.mark.parametrize("shift", [30.0, -30.0])
@pytest.mark.parametrize("kind", ["gspo", "gspo_token"])
def test_the_log_ratio_of_a_sequence_is_clamped(kind, shift):
    logprobs = torch.linspace(-40.0, -35.0, 7, dtype=torch.float64, requires_grad=True)
    advantage = -math.copysign(1.0, shift)  # of the sign whose bound the ratio does not pass
    out = logprob_policy_loss(logprobs, torch.zeros(7).double(), advantages=torch.tensor([advantage]).double(),
                              sequence_ids=torch.zeros(7, dtype=torch.int32), denominator=1.0, kind=kind,
                              old_logprobs=logprobs.detach() - shift)  # fmt: skip
    ratio = math.exp(math.copysign(20.0, shift))
    assert float(out.loss.detach()) == pytest.approx(-advantage * ratio, rel=1e-14)
    assert float(out.metrics["ratio_max"]) == pytest.approx(ratio, rel=1e-14)
    out.loss.backward()
    assert not logprobs.grad.any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_correction_of_a_sequence_is_clamped(sign):
    logprobs = torch.full((40,), -3.0, dtype=torch.float64, requires_grad=True)
    options = PolicyLossOptions(correction="tis_sequence", correction_high=math.inf)
    out = logprob_policy_loss(logprobs, torch.zeros(40).double(), advantages=torch.tensor([-1.0]).double(),
                              sequence_ids=torch.zeros(40, dtype=torch.int32), denominator=1.0, options=options,
                              old_logprobs=logprobs.detach(), rollout_logprobs=logprobs.detach() - sign)  # fmt: skip
    factor = math.exp(20.0 * sign)
    assert float(out.loss.detach()) == pytest.approx(factor, rel=1e-14)
    assert float(mean_metrics(out.metrics)["correction"]) == pytest.approx(factor, rel=1e-14)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.full_like(logprobs, factor / 40), rtol=1e-14, atol=0)


ILLEGAL = [
    ("ppo", {}, "kind", "one of"),
    ("grpo", {"dual_clip": 3.0, "delta": 4.0}, "delta", "bound the same loss"),
    ("grpo", {"delta": 1.1}, "delta", "1 \\+ clip_high"),
    ("cispo", {"dual_clip": 3.0}, "dual_clip", "not a ratio times"),
    ("sapo", {"delta": 3.0}, "delta", "not a ratio times"),
    ("sapo", {"clip_low": 0.1}, "clip_low", "no such bound"),
    ("cispo_max", {"clip_low": 0.1}, "clip_low", "no such bound"),
    ("grpo", {"sapo_temperature_pos": 1.0}, "sapo_temperature_pos", "belongs to 'sapo'"),
    ("dr_grpo", {"aggregation": "token"}, "aggregation", "what 'dr_grpo' means"),
    ("dapo", {"aggregation": "sequence"}, "aggregation", "what 'dapo' means"),
    ("grpo", {"kl_ratio_weighted": True, "kl_kind": "k1"}, "kl_kind", "weighted estimate"),
    ("grpo", {"kl_ratio_weighted": True}, "kl_gradient", "value and ratio"),
    ("gspo", {"kl_ratio_weighted": True, "kl_gradient": "value"}, "kl_ratio_weighted", "ratio of a token"),
    ("grpo", {"correction_high": 2.0}, "correction_high", "None without correction"),
    ("grpo", {"correction": "tis", "correction_low": 0.5}, "correction_low", "upper bound alone"),
    ("grpo", {"correction": "mis", "correction_high": 0.2}, "correction_low", "at most correction_high"),
    ("grpo", {"rejection_low": 0.5}, "rejection_low", "None without rejection"),
    ("grpo", {"rejection": "k3", "rejection_low": 0.5}, "rejection_low", "upper bound alone"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "argument", "reason"), ILLEGAL)
def test_combinations_without_meaning_say_why(kind, options, argument, reason):
    vectors, data = problem()
    with pytest.raises(ValueError, match=rf"{reason}.*\({argument}\)"):
        logprob_policy_loss(*vectors, **data, kind=kind, options=PolicyLossOptions(**options))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"kl_coef": math.inf}, "kl_coef"),
        ({"kl_kind": "k4"}, "kl_kind"),
        ({"kl_gradient": "none"}, "kl_gradient"),
        ({"correction": "icepop"}, "correction"),
        ({"correction": "tis", "correction_high": 0.0}, "correction_high"),
        ({"rejection": "k1"}, "rejection"),
        ({"off_policy_limit": -1.0}, "off_policy_limit"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg"),
        ({"aggregation": "mean"}, "aggregation"),
    ],
)
def test_options_refuse_by_name(options, argument):
    with pytest.raises(ValueError, match=rf"\({argument}\)"):
        PolicyLossOptions(**options)


@pytest.mark.parametrize(
    ("change", "options", "argument"),
    [
        ({"rollout_logprobs": None}, {"correction": "tis"}, "rollout_logprobs"),
        ({"rollout_logprobs": None}, {"rejection": "k3"}, "rollout_logprobs"),
        ({"rollout_logprobs": None}, {"off_policy_limit": 0.5}, "rollout_logprobs"),
        ({"ref_logprobs": None}, {"kl_coef": 0.1}, "ref_logprobs"),
        ({"old_logprobs": torch.zeros(24)}, {}, "old_logprobs"),
        ({"old_logprobs": torch.zeros(25).long()}, {}, "old_logprobs"),
        ({"mask": torch.ones(25)}, {}, "mask"),
        ({"logprobs": torch.zeros(25).half()}, {}, "logprobs"),
        ({"entropy": torch.zeros(25)}, {}, "entropy"),
        ({"sequence_ids": torch.zeros(25, dtype=torch.int32, device="meta")}, {}, "sequence_ids"),
        ({"denominator": 0.0}, {}, "denominator"),
        ({"denominator": math.inf}, {}, "denominator"),
        ({"denominator": math.nan}, {}, "denominator"),
        ({"denominator": torch.tensor(math.inf)}, {}, "denominator"),
        ({"denominator": torch.tensor(0.0)}, {}, "denominator"),
        ({"denominator": torch.ones(2)}, {}, "denominator"),
        ({"advantages": torch.ones(2, 2)}, {}, "advantages"),
        ({"sequence_ids": torch.zeros(25).long()}, {}, "sequence_ids"),
        ({"sequence_ids": torch.full((25,), 4, dtype=torch.int32)}, {}, "sequence_ids"),
        ({"sequence_ids": torch.full((25,), -1, dtype=torch.int32)}, {}, "sequence_ids"),
        ({"sequence_ids": torch.arange(25, dtype=torch.int32) % 2}, {}, "sequence_ids"),
        ({"backend": "cpp"}, {}, "backend"),
    ],
)
def test_arguments_refuse_by_name(change, options, argument):
    vectors, data = problem()
    given = {"logprobs": vectors[0], "entropy": vectors[1], **data, **change}
    with pytest.raises(ValueError, match=rf"\({argument}\)"):
        logprob_policy_loss(**given, options=PolicyLossOptions(**options))


def test_the_engines_own_logprobs_need_no_correction():
    vectors, data = problem()
    data["old_logprobs"] = data["rollout_logprobs"]
    assert logprob_policy_loss(*vectors, **data).loss.isfinite()
    for options in ({"correction": "tis"}, {"rejection": "k3"}):
        with pytest.raises(ValueError, match=rf"needs no correction.*\({next(iter(options))}\)"):
            logprob_policy_loss(*vectors, **data, options=PolicyLossOptions(**options))


def test_a_mask_of_the_wrong_shape_is_refused_before_it_broadcasts():
    ids = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(mask\)"):
        linear_policy_loss(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3).long(), advantages=torch.ones(1),
                           sequence_ids=ids, denominator=1.0, mask=torch.ones(1, dtype=torch.bool))  # fmt: skip


def test_published_values_of_each_kind():
    """What None means; the table in docs/policy_losses.md."""
    assert {kind: KINDS[kind][2:5] for kind in KINDS} == {
        "grpo": (0.2, 0.2, "sequence"),
        "dr_grpo": (0.2, 0.2, "constant"),
        "dapo": (0.2, 0.28, "token"),
        "gspo": (3e-4, 4e-4, "sequence"),
        "gspo_token": (3e-4, 4e-4, "sequence"),
        "cispo": (0.2, 0.2, "token"),
        "cispo_max": (None, 5.0, "token"),
        "sapo": (None, None, "sequence"),
    }
    vectors, data = problem()
    for kind, bounds in KINDS.items():
        given = {n: v for n, v in (("clip_low", bounds.clip_low), ("clip_high", bounds.clip_high)) if v is not None}
        written = PolicyLossOptions(**given, aggregation=bounds.aggregation)
        losses = [
            logprob_policy_loss(*vectors, **data, kind=kind, options=o).loss for o in (PolicyLossOptions(), written)
        ]
        assert torch.equal(*losses)


def test_gspo_and_gspo_token_have_one_gradient_without_token_corrections():
    """The advantage is that of the sequence: the paper's two forms then differ in nothing (arXiv 2507.18071, 4.3)."""
    (logprobs, entropy), data = problem()
    grads = []
    for kind in ("gspo", "gspo_token"):
        leaf = logprobs.clone().requires_grad_()
        options = PolicyLossOptions(clip_low=0.2, clip_high=0.2)
        logprob_policy_loss(leaf, entropy, **data, kind=kind, options=options).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert grads[0].any()


EVERY_OPTION = {
    "plain": {},
    "sequence": {"aggregation": "sequence"},
    "tis": {"correction": "tis"},
    "tis_sequence": {"correction": "tis_sequence"},
    "mis_sequence": {"correction": "mis_sequence", "correction_low": 0.5, "correction_high": 2.0},
    "geometric": {"rejection": "geometric", "rejection_low": 0.9, "rejection_high": 1.1},
    "k3": {"rejection": "k3", "rejection_high": 0.05},
    "off_policy": {"off_policy_limit": 0.1},
    "kl": {"kl_coef": 0.3, "entropy_coef": 0.1},
}


@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on_policy"])
@pytest.mark.parametrize("name", EVERY_OPTION)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dapo", "dr_grpo")])
def test_which_gradients_need_whole_sequences(kind, name, on_policy):
    """Whether other tokens' log-probs move a token's gradient, tried: those that come later are 0, or far away."""
    draw = torch.Generator().manual_seed(3)
    formula = PolicyLossOptions(**EVERY_OPTION[name]).resolve(kind)
    moved = False
    for _ in range(40):
        values = -3 * torch.rand(6, generator=draw, dtype=torch.float64)
        others = {n: values + 0.2 * torch.randn(6, generator=draw).double() for n in ("old", "rollout", "ref")}
        slopes = []
        for filled in (values, torch.cat([values[:2], torch.zeros(4)]), torch.cat([values[:2], values[2:] - 4])):
            leaf = filled.detach().requires_grad_()
            out = logprob_policy_loss(
                leaf, torch.ones(6).double(), advantages=torch.tensor([-1.0]).double(), denominator=1.0,
                sequence_ids=torch.zeros(6, dtype=torch.int32), old_logprobs=None if on_policy else others["old"],
                rollout_logprobs=others["rollout"], ref_logprobs=others["ref"], kind=kind,
                options=PolicyLossOptions(**EVERY_OPTION[name]),
            )  # fmt: skip
            slopes.append(torch.autograd.grad(out.loss, leaf)[0][:2])
        moved |= any(not torch.equal(slopes[0], x) for x in slopes[1:])
    assert formula.needs_sequences(on_policy) == moved
