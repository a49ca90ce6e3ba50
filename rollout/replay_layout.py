"""A trainer's padded batch of prompts with completions, laid out as the decoder computes it under the groups' plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.rollout.models.spec import VisionSpec
from foveate.rollout.prefix_groups import PADDING
from foveate.rollout.replay_layers import Stage, keep_columns, make_stages
from foveate.rollout.replay_plan import PromptView
from foveate.rollout.types import RolloutGroup


@dataclass(frozen=True, eq=False)
class Layout:
    """R rows of L tokens, of which at most L' in a row enter the decoder. CPU tensors.

    views, sizes: of each row, and of its images the numbers of tokens before pruning. positions: int64 [3, R, L], of
    all tokens. is_image: bool [R, L], image tokens of the prompts before pruning. columns: int64 [R, L'], see `Stage`.
    segments: int64 [R, L'], 0 on the prompt, 1 on the completion, PADDING on what is not computed. rows, slots, places:
    int64 [N], of the tokens that the last layer sees: row, column of L', and the caller's column for the result.
    """

    views: list[PromptView]
    sizes: list[list[int]]
    positions: torch.Tensor
    is_image: torch.Tensor
    columns: torch.Tensor
    segments: torch.Tensor
    stages: tuple[Stage, ...]
    rows: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor


def lay_out(
    pairs: Sequence[tuple[RolloutGroup, PromptView]], ids: torch.Tensor, there: torch.Tensor, vision: VisionSpec
) -> Layout:
    """The layout of a batch. pairs: the group of each row. ids: int64 [R, L]. there: bool [R, L], False on padding."""
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64, device="cpu")
    entering, is_prompt = there.clone(), torch.zeros_like(there)
    ends = []  # of each prompt, its last token's column
    for row, (group, view) in enumerate(pairs):
        own = there[row].nonzero()[:, 0]
        prompt, completion = own[: len(group.prompt_ids)], own[len(group.prompt_ids) :]
        positions[:, row, prompt] = group.prompt_positions.long().cpu()
        positions[:, row, completion] = group.next_position + torch.arange(len(completion), device="cpu")
        entering[row, prompt] = False
        entering[row, prompt[view.rows]] = True
        is_prompt[row, prompt] = True
        ends.append(prompt[-1])
    views = [view for _, view in pairs]
    columns = keep_columns(entering)
    segments = (~is_prompt).long().masked_fill(~entering, PADDING).gather(1, columns)
    stages = make_stages(segments, views)
    seen, places = segments != PADDING, columns.clone()
    if stages:
        seen = torch.zeros_like(seen).scatter(1, stages[-1].columns, stages[-1].segments != PADDING)
    for row, (view, end) in enumerate(zip(views, ends, strict=True)):
        places[row, len(view.rows) - 1] = end  # whoever predicts the completion's first token
    rows, slots = seen.nonzero().unbind(1)
    is_image = is_prompt & (ids == vision.image_token_id)
    sizes = [[t * h * w // vision.merge_size**2 for t, h, w in grids_of(group)] for group, _ in pairs]
    return Layout(views, sizes, positions, is_image, columns, segments, stages, rows, slots, places[rows, slots])


def grids_of(group: RolloutGroup) -> list[list[int]]:
    """Patches of each image of a group in time, height and width."""
    return [] if group.image_grid_thw is None else group.image_grid_thw.tolist()


def begins_with(ids: torch.Tensor, group: RolloutGroup) -> bool:
    """Whether tokens, int64 [T], begin with a group's prompt."""
    prompt = group.prompt_ids.cpu()
    return len(ids) >= len(prompt) and torch.equal(ids[: len(prompt)], prompt)
