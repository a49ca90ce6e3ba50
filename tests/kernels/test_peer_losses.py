"""Equality with the loss functions of TRL and verl, called as they are, where conventions agree; skipped without them.

Where they do not agree is written down in docs/policy_losses.md.
"""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from foveate.kernels.policy_loss import PolicyLossOptions, logprob_policy_loss
from foveate.kernels.policy_loss.reference.loss import kl_penalty

LENGTHS = (7, 13, 9, 1, 5)
LOW, HIGH = 0.15, 0.25


def problem():
    """Padded [B, T] as they take it, in float64; the padding holds numbers that must not count."""
    draw = torch.Generator().manual_seed(11)
    shape = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(shape[1])[None, :] < torch.tensor(LENGTHS)[:, None]
    noise = [torch.randn(shape, generator=draw).double() * scale for scale in (0.3, 0.2, 0.5)]
    logprobs = -torch.rand(shape, generator=draw).double() * 4 - 0.05
    old = logprobs + noise[0]
    noise[1][3] += 0.6  # a sequence of negative advantage that is off policy
    advantages = torch.randn(shape[0], generator=draw).double().abs() * torch.tensor([1, -1, 1, -1, 1])
    entropy = torch.rand(shape, generator=draw).double()
    return SimpleNamespace(
        logprobs=logprobs, old=old, rollout=old + noise[1], ref=logprobs + noise[2], advantages=advantages, mask=mask,
        entropy=entropy,
    )  # fmt: skip


def ours(p, kind, options, aggregation, rollout=False, ref=False, constant=20):
    """Loss and gradient [B, T] by log-probs."""
    leaf = p.logprobs.clone().requires_grad_()
    ids = torch.arange(len(LENGTHS), dtype=torch.int32)[:, None].expand_as(p.mask)
    denominator = {"token": sum(LENGTHS), "sequence": len(LENGTHS), "constant": len(LENGTHS) * constant}[aggregation]
    out = logprob_policy_loss(
        leaf[p.mask], p.entropy[p.mask], advantages=p.advantages, sequence_ids=ids[p.mask].contiguous(),
        denominator=denominator, old_logprobs=p.old[p.mask], rollout_logprobs=p.rollout[p.mask] if rollout else None,
        ref_logprobs=p.ref[p.mask] if ref else None, kind=kind,
        options=PolicyLossOptions(**options, aggregation=aggregation),
    )  # fmt: skip
    out.loss.backward()
    return out.loss.detach(), leaf.grad, out.metrics


def assert_same(ours, theirs, rtol=1e-12):
    for x, y in zip(ours[:2], theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-14)
    assert ours[1].any()


# verl

VERL_MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
CLIP = {"clip_low": LOW, "clip_high": HIGH}


def verl(p, name, aggregation, weights=None, dual_clip=3.0):
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    config = pytest.importorskip("verl.workers.config", exc_type=ImportError).ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, ppo_max_token_len_per_gpu=100, clip_ratio=LOW,
        clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=dual_clip, tau_pos=1.0, tau_neg=1.05,
    )  # fmt: skip
    config.global_batch_info["loss_scale_factor"] = 20
    leaf = p.logprobs.clone().requires_grad_()
    loss, metrics = algorithms.get_policy_loss_fn(name)(
        p.old, leaf, p.advantages[:, None].expand_as(leaf), p.mask.double(), VERL_MODES[aggregation], config, weights
    )
    loss.backward()
    return loss.detach(), leaf.grad, metrics


VERL_LOSSES = [
    *itertools.product(["grpo"], ["vanilla"], [{**CLIP, "dual_clip": 1.3}], VERL_MODES),
    *itertools.product(["gspo", "gspo_token"], ["gspo"], [CLIP], VERL_MODES),
    *itertools.product(["cispo"], ["cispo"], [CLIP], VERL_MODES),
    ("sapo", "sapo", {}, "sequence"),  # it has one aggregation
]


@pytest.mark.parametrize(("kind", "name", "options", "aggregation"), VERL_LOSSES)
def test_verl_policy_losses(kind, name, options, aggregation):
    p = problem()
    theirs = verl(p, name, aggregation, dual_clip=options.get("dual_clip", 3.0))
    # Its mean over a sequence divides by the length + 1e-8.
    assert_same(ours(p, kind, options, aggregation), theirs[:2], rtol=2e-8 if aggregation == "sequence" else 1e-12)


def test_verl_clip_fractions():
    p = problem()
    *_, sums = ours(p, "grpo", {**CLIP, "dual_clip": 1.3}, "token")
    *_, theirs = verl(p, "vanilla", "token", dual_clip=1.3)
    count = sum(LENGTHS)
    assert float(sums["clip_low"] + sums["clip_high"]) / count == pytest.approx(theirs["actor/pg_clipfrac"], rel=1e-6)
    assert float(sums["clip_dual"]) / count == pytest.approx(theirs["actor/pg_clipfrac_lower"], rel=1e-6)
    assert sums["clip_dual"] > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["tis", "mis"])
def test_verl_importance_weights(level, correction):
    corrections = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
    p = problem()
    limits = {"tis": ("1.1", {}), "mis": ("0.8_1.1", {"correction_low": 0.8})}
    spec, low = limits[correction]
    weights, _ = corrections.compute_rollout_correction_weights(p.old - p.rollout, p.mask.double(), level, spec)
    name = correction + ("_sequence" if level == "sequence" else "")
    options = {**CLIP, "correction": name, "correction_high": 1.1, "dual_clip": 3.0, **low}
    assert_same(ours(p, "grpo", options, "token", rollout=True), verl(p, "vanilla", "token", weights)[:2])


@pytest.mark.parametrize(("name", "spec", "options"), [
    # Its geometric mean is that of rollout over old: the bounds turn over.
    ("seq_mean_k1", "0.95_1.1", {"rejection": "geometric", "rejection_low": 1 / 1.1, "rejection_high": 1 / 0.95}),
    ("seq_mean_k3", "0.035", {"rejection": "k3", "rejection_high": 0.035}),
])  # fmt: skip
def test_verl_rejections(name, spec, options):
    corrections = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
    p = problem()
    kept, _ = corrections.compute_rollout_rejection_mask(p.old - p.rollout, p.mask.double(), name, spec)
    mine = ours(p, "grpo", {**CLIP, **options, "dual_clip": 3.0}, "token", rollout=True)
    assert 0 < mine[2]["dropped"] < sum(LENGTHS)
    assert_same(mine, verl(p, "vanilla", "token", kept)[:2])  # as weights: as a mask they would change its denominator


@pytest.mark.parametrize("gradient", ["value", "straight_through"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_verl_kl(kind, gradient):
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    p = problem()
    results = []
    for function in (
        lambda x: kl_penalty(x, p.ref, kind, gradient),
        lambda x: algorithms.kl_penalty(x, p.ref, kind + ("+" if gradient == "straight_through" else "")),
    ):
        leaf = p.logprobs.clone().requires_grad_()
        value = function(leaf)
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


# TRL


def trl(p, loss_type, level="token", **change):
    """GRPOTrainer's own loss, on a trainer that holds nothing but its options."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError).GRPOTrainer
    leaf = p.logprobs.clone().requires_grad_()
    known = dict(use_bias_correction_kl=False, delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                 steps_per_generation=1)  # fmt: skip
    known |= {name: change.pop(name) for name in list(change) if name in known}
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    options = dict(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, use_vllm=False,
        importance_sampling_level=level, args=SimpleNamespace(**known), loss_type=loss_type, epsilon_low=LOW,
        epsilon_high=HIGH, vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=20, accelerator=accelerator, _entropy_bonus_enabled=False, use_adaptive_entropy=False,
        entropy_coef=0.0,
    )  # fmt: skip
    own = SimpleNamespace(
        **{**options, **{name: x for name, x in change.items() if name in options}},
        get_off_policy_mask=trainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, p.entropy, None),
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
    )
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": p.mask.long(), "advantages": p.advantages, "old_per_token_logps": p.old,
        "ref_per_token_logps": p.ref, "sampling_per_token_logps": p.rollout,
        "num_items_in_batch": torch.tensor(float(sum(LENGTHS))), **change.get("inputs", {}),
    }  # fmt: skip
    loss = trainer._compute_loss(own, own.model, batch)
    loss.backward()
    return loss.detach(), leaf.grad


TRL_AGGREGATION = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "cispo": "token", "sapo": "sequence"}


@pytest.mark.parametrize(
    ("kind", "loss_type", "options", "change"),
    [
        ("grpo", "grpo", CLIP, {}),
        ("dr_grpo", "dr_grpo", CLIP, {}),
        ("dapo", "dapo", CLIP, {}),
        ("grpo", "dapo", {**CLIP, "delta": 1.3}, {"delta": 1.3}),
        ("grpo", "dapo", {**CLIP, "dual_clip": 1.3}, {"delta": 1.3}),  # the same arithmetic beyond 1 + clip_high
        ("gspo", "grpo", CLIP, {"level": "sequence"}),
        ("gspo", "dapo", CLIP, {"level": "sequence"}),
        ("cispo_max", "cispo", {"clip_high": 1.1}, {"epsilon_high": 1.1}),
        # Its temperatures are rounded to float32.
        ("sapo", "sapo", {"sapo_temperature_neg": 1.25}, {"sapo_temperature_neg": 1.25}),
        ("grpo", "grpo", {**CLIP, "kl_coef": 0.3, "kl_gradient": "value"}, {"beta": 0.3}),
        ("grpo", "grpo", {**CLIP, "kl_coef": 0.3, "kl_gradient": "value", "kl_ratio_weighted": True},
         {"beta": 0.3, "use_bias_correction_kl": True}),
        ("grpo", "dapo", {**CLIP, "entropy_coef": 0.1}, {"_entropy_bonus_enabled": True, "entropy_coef": 0.1}),
        ("grpo", "dapo", {**CLIP, "off_policy_limit": 0.05}, {"off_policy_mask_threshold": 0.05}),
    ],
)  # fmt: skip
def test_trl_losses(kind, loss_type, options, change):
    p = problem()
    ref, rollout = "kl_coef" in options, "off_policy_limit" in options
    mine = ours(p, kind, options, TRL_AGGREGATION[loss_type], rollout=rollout, ref=ref)
    assert_same(mine, trl(p, loss_type, **change))
    if rollout:
        assert mine[2]["dropped"] > 0


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_trl_importance_weights(kind, sequence):
    """Its loss takes them from the batch; they are made of its formula for the four modes, clipped to (0.8, 1.2)."""
    p = problem()
    difference = (p.old - p.rollout) * p.mask
    ratio = (difference.sum(-1, keepdim=True) if sequence else difference).exp()
    if kind == "tis":
        ratio, low = ratio.clamp(max=1.2), {}
    else:
        ratio, low = ratio.masked_fill((ratio < 0.8) | (ratio > 1.2), 0.0), {"correction_low": 0.8}
    change = {"use_vllm": True, "vllm_importance_sampling_correction": True,
              "inputs": {"importance_sampling_ratio": ratio}}  # fmt: skip
    correction = kind + ("_sequence" if sequence else "")
    options = {**CLIP, "correction": correction, "correction_high": 1.2, **low}
    assert_same(ours(p, "grpo", options, "token", rollout=True), trl(p, "dapo", **change))
