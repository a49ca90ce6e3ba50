"""How rollouts become an update: the options of a run, and what each kind of policy loss means here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from foveate.kernels.policy_loss import KINDS, PolicyLossOptions
from foveate.kernels.policy_loss.advantage import ADVANTAGE_KINDS
from foveate.rollout.checks import is_int, plain_scalars, require

Kind = Literal["kind"]  # as the kind of loss has it
DYNAMIC_SAMPLING_ROUNDS = 10  # of verl's DAPO

# What a kind means where the options say "kind": the published values, of `foveate.kernels.policy_loss.KINDS`, but for
# what stands here. "grpo" is the released recipe of Perception-R1 (arXiv 2506.07218), not the paper's own.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "aggregation": "token"},
        "dapo": {"dynamic_sampling": True},
    }
)
# Whose arguments are None where the kind has no such bound, or where its published value stands.
OF_KIND = ("clip_low", "clip_high", "dual_clip", "aggregation")
OF_LOSS = (
    "delta",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "entropy_coef",
    "kl_kind",
    "kl_gradient",
    "kl_ratio_weighted",
    "correction",
    "correction_low",
    "correction_high",
    "rejection",
    "rejection_low",
    "rejection_high",
    "off_policy_limit",
)


@dataclass(frozen=True)
class GRPOConfig:
    """How rollouts become an update. An option that is "kind" is what `kind` says; any other value stands.

    prompts_per_step: groups of one rollout batch. max_steps: rollout batches of the whole run; None is one pass.
    dynamic_sampling: rounds in which a step may draw prompts until it has prompts_per_step groups that are neither all
    right nor all wrong; the others are left out. 0 or False is off, True is 10. dynamic_sampling_part: the reward that
    says what is right, or "total": a group stays whose values of it differ. "kind": on for "dapo" alone.
    learning_rate, betas, adam_eps, weight_decay: AdamW; matrices alone decay. warmup_steps: linear, in rollout
    batches. schedule: after the warm-up, constant, or down to 0 at max_steps on a line or a cosine.
    max_grad_norm: None is off. num_updates: optimiser steps on each rollout batch, each on all of it.
    micro_batch_size: samples of one forward. micro_batch_tokens: its tokens, padding included; None is no limit.
    prefix_grouping: the samples of a group share one run of their prompt in a micro-batch's forward, see
    `foveate.rollout.prefix_groups`; not possible with flash attention.
    pruned_policy: what the forwards of the update see of a prompt whose images the engine pruned: "replay" what it saw,
    "dense" all of it; the rollouts are then another policy's, for which correction and rejection are there.
    pruned_share: of the groups that may be pruned, at step 0; the others are rolled out whole. pruned_share_end: on a
    line to this at max_steps, None is constant. A share below 1 needs an engine that prunes at the encoder.
    kind: of policy loss. "kind" for clip_low, clip_high, dual_clip, aggregation, advantage are then its paper's values,
    but for "grpo": 0.2, 0.3, 3.0, "token", as in Perception-R1. "dapo" has its soft overlong penalty from a reward,
    `foveate.rollout.rewards.Overlong`.
    clip_low to off_policy_limit: see `foveate.kernels.policy_loss.PolicyLossOptions`; dual_clip None is off.
    aggregation_length: the constant of aggregation "constant", as of "dr_grpo": the most tokens of a completion.
    kl_coef, kl_schedule, kl_min, kl_max, kl_turn: see `foveate.rollout.schedules.kl_coef`; "grpo_d" goes from the
    middle of kl_min and kl_max down to kl_min after the share kl_turn of max_steps, and then up to kl_max.
    kl_in: "loss" adds the penalty to each token's loss; "reward" subtracts it, summed over the completion, from the
    sample's reward before the advantages, with the old log-probs in the place of the current ones (kl_kind "k1" is that
    of RLOO, arXiv 2402.14740): recomputed, a forward more. Dynamic sampling sees rewards without it.
    old_logprobs: "recompute" by the trainer's own forward before the first update, or the "engine"'s.
    advantage, advantage_eps, advantage_ddof: see `foveate.kernels.policy_loss.group_advantage`. "reinforce++" kinds
    whiten over tokens; "gdpo" takes the parts of the reward, which must have `weights`.
    reward_workers: groups whose reward is computed at a time, on threads, while others decode; with more than one the
    reward must be safe to share between threads, as those of `foveate.rollout.rewards` are. 0: in the main thread, when
    all have ended, for a reward that works nowhere else. The numbers are the same.
    precision: "bf16" runs the forward under autocast, parameters and log-probs stay as they are.
    eval_every, save_every: in steps, 0 is never. log_every: of printed lines. seed: of the order of prompts and of
    the requests that bring none. progress: "rich" (needs rich), "plain", "none", or "auto": rich where it is installed
    and stderr is a terminal, else plain. tensorboard: write event files too (needs tensorboard).
    A resumed run has the same options; what moves numbers by rounding alone, and eval_every, save_every, log_every,
    progress, tensorboard, reward_workers may change, and max_steps where the schedules are constant.
    """

    prompts_per_step: int = 8
    max_steps: int | None = None
    dynamic_sampling: bool | int | Kind = "kind"
    dynamic_sampling_part: str = "accuracy"
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float | None = 1.0
    num_updates: int = 1
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    prefix_grouping: bool = True
    pruned_policy: Literal["replay", "dense"] = "replay"
    pruned_share: float = 1.0
    pruned_share_end: float | None = None
    kind: Literal["grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "cispo_max", "sapo"] = "grpo"
    clip_low: float | Kind = "kind"
    clip_high: float | Kind = "kind"
    dual_clip: float | Kind | None = "kind"
    delta: float | None = None
    sapo_temperature_pos: float | None = None
    sapo_temperature_neg: float | None = None
    aggregation: Literal["kind", "token", "sequence", "constant"] = "kind"
    aggregation_length: int | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    kl_gradient: Literal["value", "straight_through"] = "straight_through"
    kl_ratio_weighted: bool = False
    kl_schedule: Literal["constant", "grpo_d"] = "constant"
    kl_min: float | None = None
    kl_max: float | None = None
    kl_turn: float = 0.3
    kl_in: Literal["loss", "reward"] = "loss"
    correction: Literal["tis", "tis_sequence", "mis", "mis_sequence"] | None = None
    correction_low: float | None = None
    correction_high: float | None = None
    rejection: Literal["geometric", "k3"] | None = None
    rejection_low: float | None = None
    rejection_high: float | None = None
    off_policy_limit: float | None = None
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    advantage: Literal["kind", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gdpo"] = "kind"
    advantage_eps: float = 1e-6
    advantage_ddof: int = 1
    reward_workers: int = 1
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 1
    seed: int = 0
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        plain_scalars(self)
        for name in ("prompts_per_step", "num_updates", "micro_batch_size", "log_every"):
            self._check(name, "an int >= 1", lambda v: is_int(v) and v >= 1)
        for name in ("warmup_steps", "eval_every", "save_every", "reward_workers"):
            self._check(name, "an int >= 0", lambda v: is_int(v) and v >= 0)
        for name in ("max_steps", "micro_batch_tokens", "aggregation_length"):
            self._check(name, "an int >= 1 or None", lambda v: v is None or (is_int(v) and v >= 1))
        for name in ("prefix_grouping", "kl_ratio_weighted", "gradient_checkpointing", "tensorboard"):
            self._check(name, "True or False", lambda v: isinstance(v, bool))
        self._check("seed", "an int", is_int)
        for name in ("learning_rate", "weight_decay", "advantage_eps", "adam_eps"):
            self._check(name, "a number >= 0", lambda v: 0 <= v < math.inf)
        self._check("dynamic_sampling", "a bool, an int >= 0 or 'kind'", lambda v: v == "kind" or _is_count(v))
        self._check("max_grad_norm", "a number > 0 or None", lambda v: v is None or v > 0)
        self._check("betas", "two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
        self._check("advantage_ddof", "0 or 1", lambda v: v in (0, 1))
        self._check_choices()
        self._check_kl_schedule()
        self._check_kl_in_reward()
        self._check_pruned_share()
        self._check_kind()

    def _check_choices(self) -> None:
        choices = {
            "schedule": ("constant", "linear", "cosine"),
            "kl_schedule": ("constant", "grpo_d"),
            "kl_in": ("loss", "reward"),
            "kl_kind": ("k1", "k2", "k3"),
            "kind": tuple(KINDS),
            "aggregation": ("kind", "token", "sequence", "constant"),
            "advantage": ("kind", *ADVANTAGE_KINDS),
            "old_logprobs": ("recompute", "engine"),
            "pruned_policy": ("replay", "dense"),
            "precision": ("no", "bf16"),
            "progress": ("auto", "rich", "plain", "none"),
        }
        for name, values in choices.items():
            self._check(name, f"one of {values}", values.__contains__)
        if self.schedule != "constant":
            self._check("max_steps", f"an int for schedule={self.schedule!r}", lambda v: v is not None)

    def _check_kl_schedule(self) -> None:
        if self.kl_schedule == "constant":
            for name in ("kl_min", "kl_max"):
                self._check(name, "None for kl_schedule='constant'", lambda v: v is None)
            self._check("kl_turn", "0.3 for kl_schedule='constant', which has no turn", lambda v: v == 0.3)
            return
        self._check("max_steps", f"an int for kl_schedule={self.kl_schedule!r}", lambda v: v is not None)
        self._check("kl_coef", f"0, which kl_schedule={self.kl_schedule!r} replaces", lambda v: v == 0)
        self._check("kl_min", "a number >= 0", lambda v: v is not None and 0 <= v < math.inf)
        self._check(
            "kl_max", f"a number >= kl_min, {self.kl_min}", lambda v: v is not None and self.kl_min <= v < math.inf
        )
        self._check("kl_turn", "a number in (0, 1)", lambda v: 0 < v < 1)

    def _check_kl_in_reward(self) -> None:
        if self.kl_in == "loss":
            return
        self._check(
            "kl_in", "'loss' without a weight of the penalty (kl_coef, kl_schedule)", lambda _: self.needs_reference
        )
        straight = "'straight_through' for kl_in='reward', which has no gradient"
        self._check("kl_gradient", straight, lambda v: v == "straight_through")
        self._check("kl_ratio_weighted", "False for kl_in='reward': it knows no current policy", lambda v: not v)
        rounding = "'recompute' for kl_in='reward': the rounding between engine and trainer would become advantages"
        self._check("old_logprobs", rounding, lambda v: v == "recompute")
        advantage = self.of_kind("advantage")
        by_token = (
            "'loss' for advantage 'reinforce++': its return differs between the tokens of a sample, which have one"
        )
        require(advantage != "reinforce++", f"{by_token} advantage here", self.kl_in, "kl_in")
        by_part = "'loss' for advantage 'gdpo': it normalises each part of the reward, of which KL is none"
        require(advantage != "gdpo", by_part, self.kl_in, "kl_in")

    def _check_pruned_share(self) -> None:
        self._check("pruned_share", "a number in [0, 1]", lambda v: 0 <= v <= 1)
        self._check("pruned_share_end", "a number in [0, 1] or None", lambda v: v is None or 0 <= v <= 1)
        if self.pruned_share_end is not None:
            self._check("max_steps", "an int for pruned_share_end", lambda v: v is not None)

    def _check_kind(self) -> None:
        if self.old_logprobs == "engine":
            for name in ("correction", "rejection"):
                self._check(name, "None for old_logprobs='engine', which leaves no mismatch", lambda v: v is None)
        aggregation = self.loss_options.resolve(self.kind).aggregation
        constant = aggregation == "constant"
        expected = f"{'an int' if constant else 'None'} for aggregation={aggregation!r}"
        self._check("aggregation_length", expected, lambda v: (v is not None) == constant)
        advantage = self.of_kind("advantage")
        if advantage in ("dr_grpo", "rloo"):
            for name, default in (("advantage_eps", 1e-6), ("advantage_ddof", 1)):
                self._check(name, f"{default} for {advantage!r}, which divides by no std", lambda v, d=default: v == d)

    def _check(self, name: str, expected: str, holds) -> None:
        value = getattr(self, name)
        try:
            fits = holds(value)
        except TypeError:  # a value that cannot even be compared, such as a number as text
            fits = False
        require(fits, expected, value, name)

    def of_kind(self, name: str) -> Any:
        """The value of an option that may be "kind"."""
        value = getattr(self, name)
        if value == "kind":
            published = getattr(KINDS[self.kind], name, None)
            value = PRESETS.get(self.kind, {}).get(name, published)
        return value

    @property
    def loss_options(self) -> PolicyLossOptions:
        """For the loss; its kl_coef is that of a constant schedule, 0 for a penalty in the reward."""
        return PolicyLossOptions(
            **{name: self.of_kind(name) for name in OF_KIND},
            **{name: getattr(self, name) for name in OF_LOSS},
            kl_coef=self.kl_coef if self.kl_in == "loss" else 0.0,
        )

    @property
    def prunes_all(self) -> bool:
        """Whether every group is rolled out as the engine and its request say."""
        return self.pruned_share == 1 and self.pruned_share_end in (None, 1)

    @property
    def needs_reference(self) -> bool:
        """Whether a step weighs the KL penalty."""
        return self.kl_coef > 0 or self.kl_schedule != "constant"

    @property
    def sampling_rounds(self) -> int:
        """Rounds of dynamic sampling, 0 where it is off."""
        rounds = self.of_kind("dynamic_sampling")
        return DYNAMIC_SAMPLING_ROUNDS if rounds is True else int(rounds or 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0
