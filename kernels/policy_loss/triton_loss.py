"""The policy losses in Triton: everything per token in one launch, from log-probs to gradient and partial sums.

`loss_kernel` gives a block of tokens to a program: it looks up the advantage of each token's sequence, and writes the
gradient and one row of partial sums, which `total_kernel` adds up in float64, in a fixed order: nothing is atomic.
Where a sequence counts as a whole (GSPO, aggregation by sequence, sequence-level corrections), `run_kernel` finds its
run of tokens and `sequence_kernel`, a program a sequence, its sums.

A sequence id out of range, or one whose tokens are not one run where that is needed, makes the loss NaN: nothing
waits for the GPU to report it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from foveate.kernels.policy_loss.options import Formula, PolicyLossOptions
from foveate.kernels.policy_loss.reference.loss import METRICS, Tokens
from foveate.kernels.policy_loss.triton_terms import loss_kernel, run_kernel, sequence_kernel, total_kernel
from foveate.kernels.targets import TritonTarget

BLOCK = 256  # tokens of a program
SEQUENCE_BLOCK = 512  # tokens of a sequence at once; fixed, as the order of the sums is
NUM_MAXIMA = 2  # the last metrics
NUM_COLUMNS = len(METRICS) + 1  # of a row of partial sums: the metrics, and the loss
COLUMN_TILE = triton.next_power_of_2(NUM_COLUMNS)
TOTAL_ROWS = 64
NUM_SUMS = 4  # of a sequence: active tokens, mean log-ratio, factor, mean of its tokens' factors
_TOKEN_NUMBERS = ("floor", "ceiling", "dual_clip", "delta", "tau_pos", "tau_neg", "entropy_coef", "kl_coef",
                  "correction_low", "correction_high")  # fmt: skip
_SEQUENCE_NUMBERS = ("correction_low", "correction_high", "rejection_low", "rejection_high", "off_policy_limit")


def policy_loss(
    tokens: Tokens, formula: Formula, denominator: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Loss, its gradient by logprobs and by entropy (None without entropy_coef), and the metrics' sums.

    tokens: float32 vectors, contiguous; sequence_ids int32. denominator: float64 scalar.
    """
    logprobs, count, size = tokens.logprobs, tokens.logprobs.numel(), tokens.advantages.numel()
    device = logprobs.device
    d_logprobs = torch.empty_like(logprobs)
    d_entropy = torch.empty_like(logprobs) if formula.entropy_coef else None
    loss = torch.empty((), dtype=torch.float32, device=device)
    metrics = torch.empty(len(METRICS), dtype=torch.float64, device=device)
    programs = triton.cdiv(count, BLOCK)
    partials = torch.empty(programs, NUM_COLUMNS, dtype=torch.float32, device=device)
    with torch.cuda.device_of(logprobs):
        if count:
            starts, ends, sums = _sequence_sums(tokens, formula) if _by_sequence(formula) else [tokens.advantages] * 3
            flags = _flags(tokens, formula)
            loss_kernel[(programs,)](
                logprobs, tokens.entropy, *_sources(tokens), tokens.sequence_ids, tokens.active.view(torch.uint8),
                tokens.advantages, starts, ends, sums, denominator.reciprocal().float(), d_logprobs,
                d_logprobs if d_entropy is None else d_entropy, partials, count, size,
                *_numbers(formula, _TOKEN_NUMBERS), **flags,
            )  # fmt: skip
        total_kernel[(1,)](
            partials, denominator, loss, metrics, programs,
            NUM_COLUMNS=NUM_COLUMNS, NUM_MAXIMA=NUM_MAXIMA, TILE=COLUMN_TILE, ROWS=TOTAL_ROWS,
        )  # fmt: skip
    return loss, d_logprobs, d_entropy, metrics


def _by_sequence(formula: Formula) -> bool:
    """Whether a token's loss needs sums over its sequence."""
    corrected = (formula.correction or "").endswith("_sequence") or formula.rejection is not None
    whole = formula.ratio != "token" or formula.aggregation == "sequence"
    return whole or corrected or formula.off_policy_limit is not None


def _sequence_sums(tokens: Tokens, formula: Formula) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count, size = tokens.logprobs.numel(), tokens.advantages.numel()
    starts, ends = torch.zeros(2, size, dtype=torch.int32, device=tokens.logprobs.device).unbind()
    sums = torch.empty(size, NUM_SUMS, dtype=torch.float32, device=tokens.logprobs.device)
    if size == 0:
        return starts, ends, sums
    run_kernel[(triton.cdiv(count, BLOCK),)](tokens.sequence_ids, starts, ends, count, size, BLOCK=BLOCK)
    old, rollout, _ = _sources(tokens)
    sequence_kernel[(size,)](
        tokens.logprobs, old, rollout, tokens.sequence_ids, tokens.active.view(torch.uint8),
        tokens.advantages, starts, ends, sums,
        *_numbers(formula, _SEQUENCE_NUMBERS), **_sequence_flags(tokens, formula),
    )  # fmt: skip
    return starts, ends, sums


def _sources(tokens: Tokens) -> list[torch.Tensor]:
    """A kernel that has no such log-probs never reads what stands in their place."""
    return [tokens.logprobs if x is None else x for x in (tokens.old, tokens.rollout, tokens.ref)]


def _numbers(formula: Formula, names: tuple[str, ...]) -> list[float]:
    """As Triton must see them: an int 1 would be compiled in."""
    return [float(getattr(formula, name) or 0) for name in names]


def _sequence_flags(tokens: Tokens, formula: Formula) -> dict[str, Any]:
    return {
        "HAS_OLD": tokens.old is not None,
        "CORRECTION": formula.correction,
        "REJECTION": formula.rejection,
        "OFF_POLICY": formula.off_policy_limit is not None,
        "HAS_ROLLOUT": tokens.rollout is not None,
        "NUM_SUMS": NUM_SUMS,
        "BLOCK": SEQUENCE_BLOCK,
    }


def _flags(tokens: Tokens, formula: Formula) -> dict[str, Any]:
    return {
        "SURROGATE": formula.surrogate,
        "RATIO": formula.ratio,
        "KL_KIND": formula.kl_kind,
        "KL_STRAIGHT": formula.kl_gradient == "straight_through",
        "KL_WEIGHTED": formula.kl_ratio_weighted,
        "CORRECTION": formula.correction,
        "BY_SEQUENCE": formula.aggregation == "sequence",
        "HAS_SUMS": _by_sequence(formula),
        "HAS_OLD": tokens.old is not None,
        "HAS_ROLLOUT": tokens.rollout is not None,
        "HAS_REF": tokens.ref is not None,
        "HAS_ENTROPY": bool(formula.entropy_coef),
        "NUM_SUMS": NUM_SUMS,
        "NUM_COLUMNS": NUM_COLUMNS,
        "BLOCK": BLOCK,
    }


def _targets() -> list[TritonTarget]:
    vectors = ("logprobs", "entropy", "old", "rollout", "ref", "advantages", "sums", "scale", "d_logprobs", "d_entropy")
    token = dict.fromkeys((*vectors, "partials"), "*fp32") | dict.fromkeys(_TOKEN_NUMBERS, "fp32")
    token |= {"sequence_ids": "*i32", "active": "*u8", "starts": "*i32", "ends": "*i32"}
    token |= {"count": "i32", "num_sequences": "i32"}
    pointers = ("logprobs", "old", "rollout", "sequence_ids", "active", "advantages", "starts", "ends", "sums")
    sequence = {name: token[name] for name in pointers} | dict.fromkeys(_SEQUENCE_NUMBERS, "fp32")
    targets = []
    for name, kind, options, given in _SPECIALISATIONS:
        formula = PolicyLossOptions(**options).resolve(kind)
        some = torch.empty(0, device="cpu")
        old, rollout, ref = (some if x == "1" else None for x in given)
        tokens = Tokens(some, some, old, rollout, ref, some, some, some)
        targets.append(TritonTarget(f"loss_{name}", loss_kernel, token, _flags(tokens, formula)))
        if _by_sequence(formula):
            flags = _sequence_flags(tokens, formula)
            targets.append(TritonTarget(f"loss_sequence_{name}", sequence_kernel, sequence, flags))
    runs = dict.fromkeys(("sequence_ids", "starts", "ends"), "*i32") | {"count": "i32", "num_sequences": "i32"}
    totals = {"partials": "*fp32", "denominator": "*fp64", "loss": "*fp32", "metrics": "*fp64", "rows": "i32"}
    sizes = {"NUM_COLUMNS": NUM_COLUMNS, "NUM_MAXIMA": NUM_MAXIMA, "TILE": COLUMN_TILE, "ROWS": TOTAL_ROWS}
    return [
        *targets,
        TritonTarget("loss_run", run_kernel, runs, {"BLOCK": BLOCK}),
        TritonTarget("loss_total", total_kernel, totals, sizes),
    ]


# Name, kind, options, and which of old, rollout, ref are given: every formula, from the barest to the fullest.
_FULL = {"entropy_coef": 0.01, "kl_coef": 0.1}
_BY_SEQUENCE = {**_FULL, "aggregation": "sequence", "kl_gradient": "value", "off_policy_limit": 0.5}
_SPECIALISATIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("bare", "grpo", {"aggregation": "token"}, "000"),
    ("k1", "grpo", {**_FULL, "aggregation": "token", "correction": "tis", "kl_kind": "k1"}, "111"),
    ("weighted", "grpo", {**_BY_SEQUENCE, "kl_ratio_weighted": True, "rejection": "k3"}, "111"),
    ("gspo", "gspo", {**_BY_SEQUENCE, "correction": "tis_sequence", "kl_kind": "k2"}, "111"),
    ("gspo_token", "gspo_token", {**_BY_SEQUENCE, "correction": "mis_sequence", "rejection": "geometric"}, "111"),
    ("cispo", "cispo", {**_BY_SEQUENCE, "correction": "mis"}, "111"),
    ("sapo", "sapo", {**_BY_SEQUENCE, "correction": "tis"}, "111"),
)
TARGETS = _targets()
