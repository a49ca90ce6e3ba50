"""The kinds of policy loss, the options that shape each, and which combinations have no meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from foveate.kernels.dispatch import require

Surrogate = Literal["clip", "cispo", "sapo"]
Ratio = Literal["token", "sequence", "sequence_token"]
Aggregation = Literal["token", "sequence", "constant"]


class Kind(NamedTuple):
    """surrogate: the formula of a token. ratio: that of a token or of its sequence, where "sequence_token" has the
    sequence's value and the token's gradient. Then the published values: clip_low, clip_high (None where there is no
    such bound), aggregation, and the kind of advantage that goes with it. The bounds of "cispo" are verl's
    defaults: its paper (MiniMax-M1, arXiv 2506.13585) imposes no lower bound, and prints no number.
    """

    surrogate: Surrogate
    ratio: Ratio
    clip_low: float | None
    clip_high: float | None
    aggregation: Aggregation
    advantage: str = "grpo"


KINDS: dict[str, Kind] = {
    "grpo": Kind("clip", "token", 0.2, 0.2, "sequence"),
    "dr_grpo": Kind("clip", "token", 0.2, 0.2, "constant", "dr_grpo"),
    "dapo": Kind("clip", "token", 0.2, 0.28, "token"),
    "gspo": Kind("clip", "sequence", 3e-4, 4e-4, "sequence"),
    "gspo_token": Kind("clip", "sequence_token", 3e-4, 4e-4, "sequence"),
    "cispo": Kind("cispo", "token", 0.2, 0.2, "token"),
    "cispo_max": Kind("cispo", "token", None, 5.0, "token"),
    "sapo": Kind("sapo", "token", None, None, "sequence"),
}

# Published bounds (low, high) of the mismatch corrections and of the rejections of whole sequences.
CORRECTIONS: dict[str, tuple[float, float]] = {
    "tis": (0.0, 2.0),
    "tis_sequence": (0.0, 2.0),
    "mis": (0.5, 5.0),
    "mis_sequence": (0.0, 3.0),
}
REJECTIONS: dict[str, tuple[float, float]] = {"geometric": (0.999, 1.001), "k3": (0.0, 0.01)}


class Formula(NamedTuple):
    """One loss with every number in place; what is off is inf. floor, ceiling: bounds of the ratio itself."""

    surrogate: Surrogate
    ratio: Ratio
    floor: float
    ceiling: float
    dual_clip: float
    delta: float
    tau_pos: float
    tau_neg: float
    entropy_coef: float
    kl_coef: float
    kl_kind: str
    kl_gradient: str
    kl_ratio_weighted: bool
    correction: str | None
    correction_low: float
    correction_high: float
    rejection: str | None
    rejection_low: float
    rejection_high: float
    off_policy_limit: float | None
    aggregation: Aggregation
    advantage: str

    def needs_sequences(self, on_policy: bool) -> bool:
        """Whether the gradient of a token depends on the current log-probs of other tokens of its sequence.

        on_policy: old log-probs are the current ones. Every ratio then is 1, whatever they are; but what corrects old
        against behaviour policy is not known beforehand, and weighs a ratio whose gradient all tokens share.
        """
        if not on_policy:
            return self.ratio != "token" or self.off_policy_limit is not None
        corrected = (self.correction or "").endswith("_sequence") or self.rejection is not None
        shared = self.ratio == "sequence" and self.correction is not None
        return corrected or shared or self.off_policy_limit is not None


@dataclass(frozen=True)
class PolicyLossOptions:
    """What shapes the loss beside its kind; None is the kind's published value, or off.

    clip_low, clip_high: bounds of the ratio, [1 - clip_low, 1 + clip_high]; "cispo_max" clips above at clip_high.
    dual_clip: bounds the loss of a token of advantage A < 0 by -dual_clip A (arXiv 1912.09729); > 1. delta: bounds the
    ratio itself where A < 0 (INTELLECT-2); > 1 + clip_high. sapo_temperature_pos, sapo_temperature_neg: of "sapo", for
    A > 0 and the rest; 1.0 and 1.05.
    entropy_coef: weight of the entropy, which is maximised. kl_coef: weight of the KL penalty against the reference.
    kl_kind: k1, k2, k3. kl_gradient: "value" differentiates that estimate; "straight_through" keeps its value and has
    the gradient of k2, the one that is right on policy. kl_ratio_weighted: multiplies k3 by the token's ratio,
    gradient included (DeepSeek-V3.2).
    correction: weight of the policy term for the mismatch of old and behaviour policy, w = e^(old - rollout):
    "tis" min(w, high), "tis_sequence" the same for the product over the sequence, "mis" (IcePop) w where
    low <= w <= high, else 0, "mis_sequence" the same for the product. correction_low belongs to mis alone.
    rejection: drops a sequence's policy term unless "geometric" its geometric mean of w, "k3" its mean of
    w - log w - 1, lies in [rejection_low, rejection_high]. off_policy_limit: drops it if A < 0 and the mean of
    rollout - current log-probs exceeds the limit (DeepSeek-V3.2, 0.5 is usual).
    aggregation: "token" and "constant" sum over tokens, "sequence" over the means of sequences; the sum is divided by
    the denominator of the call.
    """

    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float | None = None
    sapo_temperature_neg: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    kl_gradient: Literal["value", "straight_through"] = "straight_through"
    kl_ratio_weighted: bool = False
    correction: Literal["tis", "tis_sequence", "mis", "mis_sequence"] | None = None
    correction_low: float | None = None
    correction_high: float | None = None
    rejection: Literal["geometric", "k3"] | None = None
    rejection_low: float | None = None
    rejection_high: float | None = None
    off_policy_limit: float | None = None
    aggregation: Aggregation | None = None

    def __post_init__(self) -> None:
        positive = ("sapo_temperature_pos", "sapo_temperature_neg", "correction_high", "rejection_high")
        for name in positive:
            self._check(name, "a number > 0 or None", lambda v: v is None or v > 0)
        for name in ("clip_high", "correction_low", "rejection_low", "off_policy_limit"):
            self._check(name, "a number >= 0 or None", lambda v: v is None or 0 <= v < math.inf)
        for name in ("entropy_coef", "kl_coef"):
            self._check(name, "a number >= 0", lambda v: 0 <= v < math.inf)
        self._check("clip_low", "0 <= clip_low <= 1 or None", lambda v: v is None or 0 <= v <= 1)
        self._check("dual_clip", "a number > 1 or None", lambda v: v is None or v > 1)
        choices = {
            "kl_kind": ("k1", "k2", "k3"),
            "kl_gradient": ("value", "straight_through"),
            "correction": (None, *CORRECTIONS),
            "rejection": (None, *REJECTIONS),
            "aggregation": (None, "token", "sequence", "constant"),
        }
        for name, values in choices.items():
            self._check(name, f"one of {values}", values.__contains__)

    def _check(self, name: str, expected: str, holds) -> None:
        value = getattr(self, name)
        try:
            fits = holds(value)
        except TypeError:  # a value that cannot even be compared, such as a number as text
            fits = False
        require(fits, expected, value, name)

    def resolve(self, kind: str) -> Formula:
        """The formula of `kind` with these options, the published value wherever None means that.

        Raises ValueError for an unknown kind and for a combination without meaning, and says why.
        """
        require(kind in KINDS, f"one of {tuple(KINDS)}", kind, "kind")
        _check_surrogate(self, kind)
        _check_kl(self, kind)
        _check_corrections(self)
        chosen = KINDS[kind]
        floor, ceiling = _ratio_bounds(self, chosen)
        if self.delta is not None:
            require(self.delta > ceiling, f"a number > 1 + clip_high, {ceiling}", self.delta, "delta")
        correction = _bounds("correction", self, CORRECTIONS)
        rejection = _bounds("rejection", self, REJECTIONS)
        return Formula(
            surrogate=chosen.surrogate,
            ratio=chosen.ratio,
            floor=floor,
            ceiling=ceiling,
            dual_clip=math.inf if self.dual_clip is None else self.dual_clip,
            delta=math.inf if self.delta is None else self.delta,
            tau_pos=1.0 if self.sapo_temperature_pos is None else self.sapo_temperature_pos,
            tau_neg=1.05 if self.sapo_temperature_neg is None else self.sapo_temperature_neg,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
            kl_kind=self.kl_kind,
            kl_gradient=self.kl_gradient,
            kl_ratio_weighted=self.kl_ratio_weighted,
            correction=self.correction,
            correction_low=correction[0],
            correction_high=correction[1],
            rejection=self.rejection,
            rejection_low=rejection[0],
            rejection_high=rejection[1],
            off_policy_limit=self.off_policy_limit,
            aggregation=self.aggregation or chosen.aggregation,
            advantage=chosen.advantage,
        )


def _check_surrogate(options: PolicyLossOptions, kind: str) -> None:
    surrogate = KINDS[kind].surrogate
    both = options.dual_clip is None or options.delta is None
    require(both, "one of dual_clip and delta: they bound the same loss", options.delta, "delta")
    for name in ("dual_clip", "delta"):
        value = getattr(options, name)
        unbounded = f"None for {kind!r}: its loss is not a ratio times the advantage"
        require(value is None or surrogate == "clip", unbounded, value, name)
    for name in ("clip_low", "clip_high"):
        value = getattr(options, name)
        require(
            value is None or getattr(KINDS[kind], name) is not None, f"None for {kind!r}: no such bound", value, name
        )
    for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
        value = getattr(options, name)
        require(value is None or kind == "sapo", f"None for {kind!r}: it belongs to 'sapo'", value, name)
    fixed = {"dr_grpo": "constant", "dapo": "token"}.get(kind)
    own = fixed is None or options.aggregation in (None, fixed)
    require(own, f"{fixed!r}, which is what {kind!r} means; 'grpo' takes any", options.aggregation, "aggregation")


def _check_kl(options: PolicyLossOptions, kind: str) -> None:
    if not options.kl_ratio_weighted:
        return
    require(
        options.kl_kind == "k3", "'k3' for kl_ratio_weighted: that is the weighted estimate", options.kl_kind, "kl_kind"
    )
    reason = "'value' for kl_ratio_weighted: its gradient runs through value and ratio"
    require(options.kl_gradient == "value", reason, options.kl_gradient, "kl_gradient")
    token = KINDS[kind].ratio == "token"
    require(token, f"False for {kind!r}: the weight is the ratio of a token", True, "kl_ratio_weighted")


def _check_corrections(options: PolicyLossOptions) -> None:
    for name in ("correction", "rejection"):
        chosen, low, high = (getattr(options, name + end) for end in ("", "_low", "_high"))
        if chosen is None:
            require(low is None, f"None without {name}", low, f"{name}_low")
            require(high is None, f"None without {name}", high, f"{name}_high")
        elif chosen in ("tis", "tis_sequence", "k3"):
            require(low is None, f"None for {chosen!r}: it has an upper bound alone", low, f"{name}_low")


def _ratio_bounds(options: PolicyLossOptions, kind: Kind) -> tuple[float, float]:
    low = kind.clip_low if options.clip_low is None else options.clip_low
    high = kind.clip_high if options.clip_high is None else options.clip_high
    if high is None:
        return 0.0, math.inf
    return (0.0, high) if low is None else (1 - low, 1 + high)


def _bounds(name: str, options: PolicyLossOptions, published: dict[str, tuple[float, float]]) -> tuple[float, float]:
    chosen = getattr(options, name)
    if chosen is None:
        return 0.0, math.inf
    given = getattr(options, f"{name}_low"), getattr(options, f"{name}_high")
    low, high = (default if value is None else value for value, default in zip(given, published[chosen], strict=True))
    require(low <= high, f"at most {name}_high, {high}", low, f"{name}_low")
    return low, high
