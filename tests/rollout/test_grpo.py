"""The options of a run: what a kind means, what is refused, and the schedules."""

import math
from dataclasses import asdict, fields, replace

import pytest

from foveate.kernels.policy_loss import KINDS, PolicyLossOptions
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.resumption import settings_of
from foveate.rollout.schedules import kl_coef, learning_rate


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


def test_grpo_d_falls_and_then_rises():
    """OThink-MR1's counting task: 0.04 to 0.1, turned at 0.3 of 20 steps."""
    config = GRPOConfig(kl_schedule="grpo_d", kl_min=0.04, kl_max=0.1, max_steps=20)
    values = [kl_coef(config, step) for step in range(21)]
    assert values[:7] == pytest.approx([0.07, 0.065, 0.06, 0.055, 0.05, 0.045, 0.04])
    assert values[6:] == pytest.approx([0.04 + 0.06 * step / 14 for step in range(15)])
    assert config.needs_reference
    assert not GRPOConfig().needs_reference
    # A run that is resumed must end at the same step: the weights of all steps follow it.
    assert "max_steps" in settings_of(config)
    assert "max_steps" not in settings_of(GRPOConfig(max_steps=20, kl_coef=0.1))
    assert [kl_coef(GRPOConfig(kl_coef=0.5), step) for step in (0, 7)] == [0.5, 0.5]


# What a kind means


def resolved(**options):
    config = GRPOConfig(**options)
    return config.loss_options.resolve(config.kind)


def test_grpo_is_the_recipe_it_was():
    formula = resolved()
    assert (formula.floor, formula.ceiling, formula.dual_clip) == (0.8, 1.3, 3.0)
    assert (formula.aggregation, formula.kl_kind, formula.kl_gradient) == ("token", "k3", "straight_through")
    assert GRPOConfig().of_kind("advantage") == "grpo"
    assert GRPOConfig().sampling_rounds == 0


def test_dapo_is_the_papers():
    """Clip-higher, every token alike, no KL, no dual clip, groups that are all right or all wrong replaced."""
    formula, config = resolved(kind="dapo"), GRPOConfig(kind="dapo")
    assert (formula.floor, formula.ceiling, formula.dual_clip) == (0.8, 1.28, math.inf)
    assert (formula.aggregation, formula.kl_coef, config.of_kind("advantage")) == ("token", 0.0, "grpo")
    assert config.sampling_rounds == GRPOConfig(dynamic_sampling=True).sampling_rounds == 10


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"grpo"}))
def test_other_kinds_are_as_published(kind):
    more = {"aggregation_length": 9} if kind == "dr_grpo" else {}
    assert resolved(kind=kind, **more) == PolicyLossOptions().resolve(kind)
    assert GRPOConfig(kind=kind, **more).of_kind("advantage") == ("dr_grpo" if kind == "dr_grpo" else "grpo")


def test_an_option_that_is_given_stands():
    formula = resolved(kind="dapo", clip_high=0.4, dual_clip=5.0, kl_coef=0.1)
    assert (formula.floor, formula.ceiling, formula.dual_clip, formula.kl_coef) == (0.8, 1.4, 5.0, 0.1)
    assert GRPOConfig(kind="dapo", dynamic_sampling=0).sampling_rounds == 0
    assert GRPOConfig(kind="dapo", dynamic_sampling=3).sampling_rounds == 3
    assert GRPOConfig(kind="gspo", advantage="rloo").of_kind("advantage") == "rloo"
    assert resolved(dual_clip=None).dual_clip == math.inf
    # Another kind later is that kind, not what the first one filled in.
    assert replace(GRPOConfig(), kind="gspo").loss_options.resolve("gspo") == PolicyLossOptions().resolve("gspo")


def test_every_option_of_the_loss_reaches_it():
    given = dict(
        kl_coef=0.25, kl_kind="k3", kl_gradient="value", kl_ratio_weighted=True, entropy_coef=0.5, delta=7.0,
        dual_clip=None, clip_low=0.125, clip_high=0.5, aggregation="sequence", correction="mis", correction_low=0.25,
        correction_high=4.0, rejection="geometric", rejection_low=0.5, rejection_high=2.0, off_policy_limit=1.5,
    )  # fmt: skip
    own = {f.name for f in fields(PolicyLossOptions)}
    assert own - set(given) == {"sapo_temperature_pos", "sapo_temperature_neg"}
    options = asdict(GRPOConfig(**given).loss_options)
    assert {name: options[name] for name in given} == given
    sapo = GRPOConfig(kind="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=3.0).loss_options
    assert (sapo.sapo_temperature_pos, sapo.sapo_temperature_neg) == (2.0, 3.0)


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
        ({"kind": "ppo"}, "kind"),
        ({"kind": "sapo", "clip_low": 0.1}, "clip_low"),
        ({"kind": "dapo", "aggregation": "sequence"}, "aggregation"),
        ({"kind": "dr_grpo"}, "aggregation_length"),
        ({"kind": "dr_grpo", "aggregation_length": 9, "advantage_ddof": 0}, "advantage_ddof"),
        ({"advantage": "rloo", "advantage_eps": 1e-4}, "advantage_eps"),
        ({"advantage": "gae"}, "advantage"),
        ({"delta": 4.0}, "delta"),  # beside the dual clip of "grpo"
        ({"correction": "mean"}, "correction"),
        ({"correction_high": 2.0}, "correction_high"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"dynamic_sampling": -1}, "dynamic_sampling"),
        ({"dynamic_sampling": "yes"}, "dynamic_sampling"),
        ({"kl_schedule": "linear"}, "kl_schedule"),
        ({"kl_schedule": "grpo_d"}, "max_steps"),
        ({"kl_schedule": "grpo_d", "max_steps": 9, "kl_min": 0.1}, "kl_max"),
        ({"kl_schedule": "grpo_d", "max_steps": 9, "kl_min": 0.1, "kl_max": 0.05}, "kl_max"),
        ({"kl_schedule": "grpo_d", "max_steps": 9, "kl_min": 0.1, "kl_max": 0.2, "kl_coef": 0.1}, "kl_coef"),
        ({"kl_schedule": "grpo_d", "max_steps": 9, "kl_min": 0.1, "kl_max": 0.2, "kl_turn": 0.0}, "kl_turn"),
        ({"kl_max": 0.1}, "kl_max"),
        ({"kl_in": "advantage"}, "kl_in"),
        ({"kl_in": "reward"}, "kl_in"),  # nothing weighs it
        ({"kl_in": "reward", "kl_coef": 0.1, "kl_gradient": "value"}, "kl_gradient"),
        ({"kl_in": "reward", "kl_coef": 0.1, "old_logprobs": "engine"}, "old_logprobs"),
        ({"kl_in": "reward", "kl_coef": 0.1, "advantage": "reinforce++"}, "kl_in"),
        ({"kl_in": "reward", "kl_coef": 0.1, "advantage": "gdpo"}, "kl_in"),
        ({"advantage_ddof": 2}, "advantage_ddof"),
        ({"precision": "fp16"}, "precision"),
        ({"schedule": "cosine"}, "max_steps"),
        ({"schedule": "step"}, "schedule"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"progress": "yes"}, "progress"),
        ({"learning_rate": "1e-5"}, "learning_rate"),
        ({"weight_decay": None}, "weight_decay"),
        ({"betas": 0.9}, "betas"),
        ({"max_grad_norm": "1"}, "max_grad_norm"),
        ({"pruned_share": "all"}, "pruned_share"),
        ({"clip_low": "0.2"}, "clip_low"),
        ({"entropy_coef": "0"}, "entropy_coef"),
        ({"prompts_per_step": True}, "prompts_per_step"),
        ({"seed": "a"}, "seed"),
        ({"tensorboard": "yes"}, "tensorboard"),
    ],
)
def test_config_refuses_by_name(kwargs, name):
    with pytest.raises(ValueError, match=rf"\({name}\)"):
        GRPOConfig(**kwargs)
