"""Samples of one group in one row of the trainer's forward: their prompt, images included, runs once for all of them.

A row is [prompt, completion 1, completion 2, ...]. Every completion starts at the position that follows the prompt, and
sees the prompt and itself, causally; a mask of four dimensions says so. Source: Prefix Grouper (arXiv 2506.05433).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

from foveate.rollout.models import ModelSpec
from foveate.rollout.replay_plan import num_entering
from foveate.rollout.types import Rollout, RolloutGroup

PADDING = -1  # the segment of tokens that stand for nothing


@dataclass(frozen=True, eq=False)
class Sample:
    """One rollout with its group: what the trainer learns from."""

    group: RolloutGroup
    rollout: Rollout

    @property
    def num_own_inputs(self) -> int:
        """Tokens of the completion that are fed: all but the last, which predicts nothing."""
        return len(self.rollout.token_ids) - 1


class Packer:
    """Lays samples out in rows, in their order.

    With a `row_cost` consecutive samples of one group object share a row as long as its completions hold at most
    S = sqrt(P^2 + P row_cost) tokens, P those of the prompt; else, and with None, each sample has a row of its own.
    A row of S completion tokens costs (P + S) W + 2 (P + S)^2 h multiplications a layer of W parameters and h =
    heads x head size, scores being computed for masked pairs too; S makes that least per completion token, with
    row_cost = W / (2 h).
    """

    def __init__(self, row_cost: float | None):
        self.row_cost = row_cost

    @classmethod
    def of(cls, spec: ModelSpec, prefix_grouping: bool) -> Packer:
        """Raises ValueError where the model's attention takes no mask of four dimensions."""
        if not prefix_grouping:
            return cls(None)
        check_attention(spec)
        layer = sum(parameter.numel() for parameter in spec.decoder.layers[0].parameters())
        return cls(layer / (2 * spec.num_heads * spec.head_dim))

    def add(self, rows: Sequence[list[Sample]], sample: Sample) -> list[list[Sample]]:
        """The rows with one sample more."""
        if rows and self._fits(rows[-1], sample):
            return [*rows[:-1], [*rows[-1], sample]]
        return [*rows, [sample]]

    def rows(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """All samples, at least one in each row."""
        rows: list[list[Sample]] = []
        for sample in samples:
            rows = self.add(rows, sample)
        return rows

    def _fits(self, row: Sequence[Sample], sample: Sample) -> bool:
        if self.row_cost is None or row[0].group is not sample.group:
            return False
        return own_inputs([*row, sample]) <= row_capacity(num_entering(sample.group), self.row_cost)


def row_capacity(prompt: int, row_cost: float) -> float:
    """Completion tokens of a row, see `Packer`; prompt: tokens."""
    return math.sqrt(prompt**2 + prompt * row_cost)


def own_inputs(row: Sequence[Sample]) -> int:
    """Tokens of a row beside those of its prompt."""
    return sum(sample.num_own_inputs for sample in row)


def row_inputs(row: Sequence[Sample]) -> int:
    """Tokens of a row."""
    return num_entering(row[0].group) + own_inputs(row)


def micro_batches(samples: Sequence[Sample], size: int, tokens: int | None, packer: Packer) -> Iterator[slice]:
    """Cuts samples, in order, into runs of at most `size` samples and `tokens` padded tokens, at least one sample."""
    start = 0
    rows: list[list[Sample]] = []
    for end, sample in enumerate(samples):
        grown = packer.add(rows, sample)
        padded = len(grown) * max(map(row_inputs, grown))
        if end > start and (end - start >= size or (tokens is not None and padded > tokens)):
            yield slice(start, end)
            start, grown = end, packer.add([], sample)
        rows = grown
    if samples:
        yield slice(start, len(samples))


def check_attention(spec: ModelSpec) -> None:
    """ValueError naming the attention that takes no mask of four dimensions."""
    kind = attention_kind(spec)
    if "flash" in kind:
        raise ValueError(
            f"expected eager, sdpa or flex_attention for shared prompts, or prefix_grouping=False: flash attention "
            f"takes no mask of four dimensions, got {kind!r} (attn_implementation)"
        )
    if kind not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(f"expected eager, sdpa or flex_attention for shared prompts, got {kind!r} (prefix_grouping)")


def attention_mask(spec: ModelSpec, segments: torch.Tensor, dtype: torch.dtype) -> Any:
    """Who sees whom in grouped rows, in the form that the model's attention takes.

    segments: int64 [R, L], 0 on the prompt, c on completion c of the row, PADDING beyond. For flex a BlockMask, for
    eager and sdpa `dtype` [R, 1, L, L], 0 or the smallest value; a bool would be turned into one by every layer anew,
    and kept for its backward. dtype: that of the scores. Raises ValueError for other attentions, and for flex on the
    CPU with gradients, which it cannot do.
    """
    check_attention(spec)
    rows, length = segments.shape
    if attention_kind(spec) == "flex_attention":
        if segments.device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError("expected eager or sdpa: flex attention has no backward on the CPU (attn_implementation)")

        def sees(row: Any, _head: Any, query: Any, key: Any) -> Any:
            return _sees(segments[row, query], segments[row, key], query, key)

        return create_block_mask(sees, rows, None, length, length, device=segments.device)
    places = torch.arange(length, device=segments.device)
    seen = _sees(segments[:, :, None], segments[:, None, :], places[:, None], places[None, :])[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _sees(own: Any, other: Any, query: Any, key: Any) -> Any:
    """Whether the token at place `query`, of segment `own`, sees the one at `key`, of segment `other`.

    Padding sees the prompt and padding: every row of a softmax has something to see.
    """
    return (key <= query) & ((other == 0) | (other == own))


def score_dtype(x: torch.Tensor) -> torch.dtype:
    """Of attention scores made from x: that of matrix products, which autocast changes."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attention_kind(spec: ModelSpec) -> str:
    """transformers' name of the decoder's attention."""
    return str(spec.decoder.config._attn_implementation)
