"""The trainer's forward: log-probabilities of rollouts under a transformers module, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from foveate.kernels.policy_loss import LinearLogprobs, linear_logprobs
from foveate.rollout.checks import require
from foveate.rollout.models import ModelSpec
from foveate.rollout.models.spec import VisionSpec
from foveate.rollout.prefix_groups import PADDING, Packer, Sample, attention_mask, row_inputs, score_dtype
from foveate.rollout.replay_layers import Stage, make_stages, staged
from foveate.rollout.replay_plan import PromptView, prompt_view
from foveate.rollout.types import Request, RolloutGroup


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """R rows of samples padded on the right to L tokens, and the N completion tokens in them, sample by sample.

    input_ids: int64 [R, L]. positions: int64 [3, R, L], 0 on padding. segments: int64 [R, L], 0 on the prompt, c on
    completion c of the row, -1 on padding. rows, columns: int64 [N], where a completion token is predicted; the first
    ones of a row's samples all at the end of their prompt. targets: int64 [N]. temperatures: float32 [N].
    views: of each row's prompt; pruned tokens that do not enter the decoder are not in the row. stages: what later
    layers compute.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    temperatures: torch.Tensor
    views: tuple[PromptView, ...]
    stages: tuple[Stage, ...]

    @property
    def attention_mask(self) -> torch.Tensor:
        """int64 [R, L], 0 on padding: what rows of one sample need."""
        return (self.segments != PADDING).long()

    @property
    def is_prompt(self) -> torch.Tensor:
        """bool [R, L]"""
        return self.segments == 0


class Predictions(NamedTuple):
    """The N completion tokens of some samples, one sample after another.

    hidden: float [N, hidden_size], the last hidden state that predicts each. targets: int64 [N]. temperatures: float32
    [N], 1 for a request's 0.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    temperatures: torch.Tensor


def policy_logprobs(spec: ModelSpec, samples: Sequence[Sample], *, prefix_grouping: bool = False) -> LinearLogprobs:
    """Log-softmax(logits / T) of every completion token over the whole vocabulary, and its entropy.

    Each float32 [N], the samples' completions one after another. See `predict`.
    """
    hidden, targets, temperatures = predict(spec, samples, Packer.of(spec, prefix_grouping))
    return linear_logprobs(hidden, spec.lm_head.weight, targets, temperature=temperatures, bias=spec.lm_head.bias)


def predict(spec: ModelSpec, samples: Sequence[Sample], packer: Packer) -> Predictions:
    """The hidden states from which each completion token is predicted, with gradients.

    The images of a group pass the vision tower once however many of its samples are here, and gradients reach the
    tower. Token t of a completion stands at group.next_position + t in every plane. Of a pruned group the decoder sees
    what its plan kept, layer by layer; nothing is selected anew. Raises ValueError for a plan that is not the prompt's,
    for an attention that cannot replay it, and for a request with penalties or biases.
    """
    for sample in samples:
        check_trainable(sample.group.request, sample.group.request_id)
    rows = packer.rows(samples)
    batch = pad(rows, spec.lm_head.weight.device, spec.vision)
    embeds = spec.decoder.embed_tokens(batch.input_ids)
    deepstack: dict[str, Any] = {}
    if spec.vision is not None:
        embeds, deepstack = _put_images(spec, embeds, batch, [row[0].group for row in rows])
    # Explicit positions and mask: what the model would infer depends on the pad id and on its last generate().
    positions = batch.positions if spec.rope_planes is not None else batch.positions[0]
    shared = any(len(row) > 1 for row in rows)
    mask = attention_mask(spec, batch.segments, score_dtype(embeds)) if shared else batch.attention_mask
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    with staged(spec, batch.stages):
        hidden = spec.decoder(**inputs, **deepstack, use_cache=False).last_hidden_state  # [R, L, hidden]
    return Predictions(hidden[batch.rows, batch.columns], batch.targets, batch.temperatures)


def check_trainable(request: Request, name: str) -> None:
    """ValueError for penalties and biases: their log-probs are not those of the model, which is what is trained."""
    for parameter in request.sampling.adjustments:
        value = getattr(request.sampling, parameter)
        require(False, f"request {name!r} to be sampled from the model's own logits", value, parameter)


def pad(
    rows: Sequence[Sequence[Sample]], device: torch.device | str = "cpu", vision: VisionSpec | None = None
) -> PaddedBatch:
    """Lays rows of samples of one group out one below the other; a padding token repeats id 0 and is masked.

    vision: finds the image tokens of pruned groups.
    """
    shape = len(rows), max(map(row_inputs, rows))
    input_ids, segments = torch.zeros(shape, dtype=torch.int64, device="cpu"), torch.full(shape, PADDING, device="cpu")
    positions = torch.zeros(3, *shape, dtype=torch.int64, device="cpu")
    of_group = {id(row[0].group): prompt_view(row[0].group, vision) for row in rows}
    views = tuple(of_group[id(row[0].group)] for row in rows)
    flat: tuple[list[torch.Tensor], ...] = ([], [], [], [])
    for index, (row, view) in enumerate(zip(rows, views, strict=True)):
        group, start = row[0].group, len(view.rows)
        input_ids[index, :start], segments[index, :start] = group.prompt_ids[view.rows], 0
        positions[:, index, :start] = view.positions
        last = torch.tensor([start - 1], device="cpu")  # of the prompt; predicts the first token of each completion
        for number, sample in enumerate(row, 1):
            tokens, count, end = sample.rollout.token_ids, len(sample.rollout.token_ids), start + sample.num_own_inputs
            input_ids[index, start:end], segments[index, start:end] = tokens[:-1], number
            positions[:, index, start:end] = group.next_position + torch.arange(count - 1, device="cpu")
            columns = torch.cat([last, torch.arange(start, end, device="cpu")])
            temperature = torch.full((count,), group.request.sampling.temperature or 1.0, device="cpu")
            at_row = torch.full((count,), index, device="cpu")
            for parts, part in zip(flat, (at_row, columns, tokens, temperature), strict=True):
                parts.append(part)
            start = end
    at_rows, at_columns, targets, temperatures = (torch.cat(parts).to(device) for parts in flat)
    return PaddedBatch(
        input_ids.to(device),
        positions.to(device),
        segments.to(device),
        at_rows,
        at_columns,
        targets,
        temperatures,
        views,
        make_stages(segments, views, device),
    )


def _put_images(
    spec: ModelSpec, embeds: torch.Tensor, batch: PaddedBatch, groups: Sequence[RolloutGroup]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Replaces the prompts' image placeholders by the tower's output: one pass over the distinct groups.

    groups: of each row. Returns the embeddings, and what a decoder that adds image features to its first layers'
    outputs takes for them.
    """
    assert spec.vision is not None
    images = {
        id(group): (group.pixel_values, group.image_grid_thw)
        for group in groups
        if group.pixel_values is not None and group.image_grid_thw is not None
    }
    if not images:
        return embeds, {}
    pixels = torch.cat([pixels for pixels, _ in images.values()]).to(embeds.device)
    grids = torch.cat([grids for _, grids in images.values()]).to(embeds.device)
    features = iter(spec.vision.encode(pixels, grids))
    encoded = {key: [next(features) for _ in grids] for key, (_, grids) in images.items()}
    views = {id(group): view for group, view in zip(groups, batch.views, strict=True)}
    entering = {key: views[key].image_rows(parts) for key, parts in encoded.items()}
    rows = torch.cat([entering[id(group)] for group in groups if id(group) in entering]).to(embeds.dtype)
    # A policy may draw the placeholder's id itself: it then is an ordinary token of the completion.
    is_image = (batch.input_ids == spec.vision.image_token_id) & batch.is_prompt
    assert int(is_image.sum()) == len(rows), (int(is_image.sum()), len(rows))
    embeds = embeds.masked_scatter(is_image[..., None], rows[:, 0])
    if spec.vision.num_deepstack == 0:
        return embeds, {}
    return embeds, {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(rows[:, 1:].unbind(1))}
