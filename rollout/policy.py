"""The trainer's forward: log-probabilities of rollouts under a transformers module, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveate.kernels.policy_loss import LinearLogprobs, linear_logprobs
from foveate.rollout.config import require
from foveate.rollout.models import ModelSpec
from foveate.rollout.types import Request, Rollout, RolloutGroup


@dataclass(frozen=True, eq=False)
class Sample:
    """One rollout with its group: what the trainer learns from."""

    group: RolloutGroup
    rollout: Rollout

    @property
    def num_inputs(self) -> int:
        """Tokens that are fed: the prompt and the completion but its last token, which predicts nothing."""
        return len(self.group.prompt_ids) + len(self.rollout.token_ids) - 1


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Samples padded on the right to L tokens, and the N completion tokens in them, sample by sample.

    input_ids, attention_mask: int64 [B, L]. positions: int64 [3, B, L], 0 on padding. is_prompt: bool [B, L].
    rows, columns: int64 [N], where a completion token is predicted. targets: int64 [N]. temperatures: float32 [N].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    is_prompt: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    temperatures: torch.Tensor


def policy_logprobs(spec: ModelSpec, samples: Sequence[Sample]) -> LinearLogprobs:
    """Log-softmax(logits / T) of every completion token over the whole vocabulary, and its entropy.

    Each float32 [N], the samples' completions one after another; T is the request's temperature, 1 for 0. The images
    of a group pass the vision tower once however many of its samples are here, and gradients reach the tower. Token t
    of a completion stands at group.next_position + t in every plane. Raises ValueError for a pruned group, and for
    one whose request has penalties or biases.
    """
    for sample in samples:
        check_trainable(sample.group.request, sample.group.request_id)
        if sample.group.keep is not None:
            raise ValueError(f"expected a group without pruning, got a KeepPlan (request {sample.group.request_id!r})")
    batch = pad(samples, spec.lm_head.weight.device)
    embeds = spec.decoder.embed_tokens(batch.input_ids)
    deepstack: dict[str, Any] = {}
    if spec.vision is not None:
        embeds, deepstack = _put_images(spec, embeds, batch, samples)
    # Explicit positions and mask: what the model would infer depends on the pad id and on its last generate().
    positions = batch.positions if spec.rope_planes is not None else batch.positions[0]
    inputs = {"inputs_embeds": embeds, "attention_mask": batch.attention_mask, "position_ids": positions}
    hidden = spec.decoder(**inputs, **deepstack, use_cache=False).last_hidden_state  # [B, L, hidden]
    chosen = hidden[batch.rows, batch.columns]  # [N, hidden]
    head = spec.lm_head
    return linear_logprobs(chosen, head.weight, batch.targets, temperature=batch.temperatures, bias=head.bias)


def check_trainable(request: Request, name: str) -> None:
    """ValueError for penalties and biases: their log-probs are not those of the model, which is what is trained."""
    for parameter in request.sampling.adjustments:
        value = getattr(request.sampling, parameter)
        require(False, f"request {name!r} to be sampled from the model's own logits", value, parameter)


def pad(samples: Sequence[Sample], device: torch.device | str = "cpu") -> PaddedBatch:
    """Lays samples out side by side; a padding token repeats id 0 and is masked."""
    shape = len(samples), max(sample.num_inputs for sample in samples)
    input_ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    is_prompt = torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(3, *shape, dtype=torch.int64)
    rows, columns, targets, temperatures = [], [], [], []
    for row, sample in enumerate(samples):
        group, tokens = sample.group, sample.rollout.token_ids
        start, end, count = len(group.prompt_ids), sample.num_inputs, len(tokens)
        input_ids[row, :start], input_ids[row, start:end] = group.prompt_ids, tokens[:-1]
        mask[row, :end] = 1
        is_prompt[row, :start] = True
        positions[:, row, :start] = group.prompt_positions
        positions[:, row, start:end] = group.next_position + torch.arange(count - 1)
        rows.append(torch.full((count,), row))
        columns.append(torch.arange(start - 1, end))
        targets.append(tokens)
        temperatures.append(torch.full((count,), group.request.sampling.temperature or 1.0))
    flat = (torch.cat(parts).to(device) for parts in (rows, columns, targets, temperatures))
    return PaddedBatch(*(x.to(device) for x in (input_ids, mask, positions, is_prompt)), *flat)


def micro_batches(samples: Sequence[Sample], size: int, tokens: int | None) -> Iterator[slice]:
    """Cuts samples, in order, into runs of at most `size` samples and `tokens` padded tokens, at least one sample."""
    start, longest = 0, 0
    for end, sample in enumerate(samples):
        longest = max(longest, sample.num_inputs)
        count = end - start + 1
        if end > start and (count > size or (tokens is not None and count * longest > tokens)):
            yield slice(start, end)
            start, longest = end, sample.num_inputs
    if samples:
        yield slice(start, len(samples))


def _put_images(
    spec: ModelSpec, embeds: torch.Tensor, batch: PaddedBatch, samples: Sequence[Sample]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Replaces the prompts' image placeholders by the tower's output: one pass over the distinct groups.

    Returns the embeddings, and what a decoder that adds image features to its first layers' outputs takes for them.
    """
    assert spec.vision is not None
    images = {
        id(s.group): (s.group.pixel_values, s.group.image_grid_thw)
        for s in samples
        if s.group.pixel_values is not None and s.group.image_grid_thw is not None
    }
    if not images:
        return embeds, {}
    pixels = torch.cat([pixels for pixels, _ in images.values()]).to(embeds.device)
    grids = torch.cat([grids for _, grids in images.values()]).to(embeds.device)
    features = iter(spec.vision.encode(pixels, grids))
    encoded = {key: torch.cat([next(features) for _ in grids]) for key, (_, grids) in images.items()}
    rows = torch.cat([encoded[id(s.group)] for s in samples if id(s.group) in encoded]).to(embeds.dtype)
    # A policy may draw the placeholder's id itself: it then is an ordinary token of the completion.
    is_image = (batch.input_ids == spec.vision.image_token_id) & batch.is_prompt
    assert int(is_image.sum()) == len(rows), (int(is_image.sum()), len(rows))
    embeds = embeds.masked_scatter(is_image[..., None], rows[:, 0])
    if spec.vision.num_deepstack == 0:
        return embeds, {}
    return embeds, {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(rows[:, 1:].unbind(1))}
