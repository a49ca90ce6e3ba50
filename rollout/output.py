"""From drawn tokens to finished rollouts: when a sample stops, and what its caller gets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from foveate.kernels.sampling import SampleOutput
from foveate.rollout.modes import own_modes
from foveate.rollout.pruned import plan_of
from foveate.rollout.scheduler import Batch, Group, Sequence
from foveate.rollout.segments import Segment
from foveate.rollout.types import Request, RequestError, Rollout, RolloutGroup, Versions


def record(sequences: list[Sequence], drawn: SampleOutput) -> int:
    """Appends row r of `drawn` to sequences[r], marks the samples that end with it, and returns the number of tokens.

    A row that could not be sampled ends its group with an error.
    """
    num_tokens = 0
    # Each of these waits for the device: two copies, where one a column would be four.
    token_ids, values = drawn.token_ids.tolist(), torch.stack(drawn[1:]).tolist()
    for sequence, token, logprob, log_kept, entropy in zip(sequences, token_ids, *values, strict=True):
        if token < 0:
            fail(sequence.group, "expected finite logits and an allowed token, got NaN, inf or none")
            continue
        sequence.token_ids.append(token)
        sequence.logprobs.append(logprob)
        sequence.log_kept.append(log_kept)
        sequence.entropy.append(entropy)
        num_tokens += 1
        _follow(sequence, token, logprob)
        _finish(sequence, token)
    return num_tokens


def fail(group: Group, message: str) -> None:
    """Ends all samples of a group with an error that names its request."""
    group.error = ValueError(f"request {group.request_id!r}: {message}")
    for sequence in group.sequences:
        sequence.finish_reason = "error"


def fail_images(batch: Batch, running: Iterable[Sequence], failed: dict[Segment, str]) -> None:
    """Ends the groups whose prompt holds an image that was not encoded, and takes what only they need off the batch.

    failed: segment -> who raised what (`Runner.encode`). Images of several groups in one segment end them all.
    """
    if not failed:
        return
    running = list(running)
    for group in dict.fromkeys(sequence.group for sequence in running):
        reasons = [failed[segment] for segment in group.path if segment in failed]
        if reasons:
            fail(group, f"expected images that {reasons[0]}")
    going_on = [sequence for sequence in running if sequence.group.error is None]
    needed = {segment for sequence in going_on for segment in (*sequence.group.path, sequence.leaf)}
    batch.chunks = [chunk for chunk in batch.chunks if chunk.segment in needed]
    batch.firsts = [sequence for sequence in batch.firsts if sequence.group.error is None]


def _follow(sequence: Sequence, token: int, logprob: float) -> None:
    """What is remembered of a sample from token to token."""
    group, sampling = sequence.group, sequence.group.request.sampling
    if group.spans is not None:
        sequence.place = group.spans.after(sequence.place, token)
    if sampling.max_certain is not None:
        certain = logprob > math.log(sampling.certain)
        sequence.num_certain = sequence.num_certain + 1 if certain else 0


def _finish(sequence: Sequence, token: int) -> None:
    group, sampling = sequence.group, sequence.group.request.sampling
    if sequence.decoder is not None:
        try:
            text = sequence.decoder.append(token)
        except Exception as error:  # whatever a tokenizer raises concerns this request alone
            fail(group, f"expected a tokenizer that decodes the drawn ids, got {error!r}")
            return
        if len(sequence.token_ids) >= sampling.min_tokens and any(stop in text for stop in sampling.stop):
            sequence.finish_reason = "stop"
    if token in group.stop_ids and not sequence.place.is_inside:
        sequence.finish_reason, sequence.stop_token_id = "stop", token
    elif sequence.finish_reason is None and sampling.max_certain == sequence.num_certain:
        sequence.finish_reason = "repetition"
    elif sequence.finish_reason is None and len(sequence.token_ids) == group.max_tokens:
        sequence.finish_reason = "length"
    if group.error is not None:
        sequence.finish_reason = "error"


def group_of(group: Group, tokenizer: Any, version: int) -> RolloutGroup:
    """The finished group as its caller gets it. version: of the weights now."""
    pruning, vision = group.prompt.pruning, group.prompt.vision
    prompt = pruning.full if pruning else group.prompt
    boundaries = torch.tensor((0, *prompt.boundaries), dtype=torch.int32, device="cpu")
    return RolloutGroup(
        request=group.request,
        request_id=group.request_id,
        prompt_ids=prompt.token_ids,
        prompt_positions=prompt.positions.to(torch.int32).contiguous(),
        next_position=prompt.next_position,
        segments=boundaries.diff(),
        rollouts=tuple(_rollout(sequence, tokenizer, version) for sequence in group.sequences),
        image_grid_thw=vision.image_grid_thw if vision else None,
        pixel_values=vision.pixel_values if vision else None,
        keep=None if group.error else plan_of(group.prompt),
        error=group.error,
        kept_versions=tuple(group.kept_versions),
    )


def finish(group: Group, tokenizer: Any, versions: Versions) -> RolloutGroup:
    """The group of a request that has ended, whatever the tokenizer does."""
    with own_modes(torch.device("cpu")):
        try:
            return group_of(group, tokenizer, versions.weights)
        except Exception as error:  # what a tokenizer raises concerns this group alone
            fail(group, f"expected a tokenizer that decodes the drawn ids, got {error!r}")
            return group_of(group, None, versions.weights)


def in_order(finished: dict[int, RolloutGroup], count: int, strict: bool) -> list[RolloutGroup]:
    """The groups of a call in request order; strict: RequestError if one of them failed."""
    groups = [finished[index] for index in range(count)]
    if strict and (errors := [group.error for group in groups if group.error]):
        raise RequestError(f"{len(errors)} of {count} requests failed, the first: {errors[0]}", groups)
    return groups


def failed_group(request: Request, request_id: str, error: ValueError) -> RolloutGroup:
    """The group of a request that could not be added."""
    return RolloutGroup(
        request=request,
        request_id=request_id,
        prompt_ids=torch.empty(0, dtype=torch.int64, device="cpu"),
        prompt_positions=torch.empty((3, 0), dtype=torch.int32, device="cpu"),
        next_position=0,
        segments=torch.empty(0, dtype=torch.int32, device="cpu"),
        rollouts=tuple(_empty_rollout() for _ in range(request.n)),
        error=error,
    )


def _rollout(sequence: Sequence, tokenizer: Any, version: int) -> Rollout:
    if sequence.finish_reason == "error":
        return _empty_rollout()
    assert sequence.finish_reason is not None, sequence.group.request_id
    sequence.mark(version)
    return Rollout(
        token_ids=torch.tensor(sequence.token_ids, dtype=torch.int64, device="cpu"),
        logprobs=torch.tensor(sequence.logprobs, dtype=torch.float32, device="cpu"),
        log_kept=torch.tensor(sequence.log_kept, dtype=torch.float32, device="cpu"),
        entropy=torch.tensor(sequence.entropy, dtype=torch.float32, device="cpu"),
        finish_reason=sequence.finish_reason,
        stop_token_id=sequence.stop_token_id,
        weight_versions=tuple(sequence.versions),
        text=_text(sequence, tokenizer),
    )


def _empty_rollout() -> Rollout:
    empty = torch.empty(0, dtype=torch.float32, device="cpu")
    return Rollout(torch.empty(0, dtype=torch.int64, device="cpu"), empty, empty.clone(), empty.clone(), "error")


def _text(sequence: Sequence, tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    ids = sequence.token_ids if sequence.stop_token_id is None else sequence.token_ids[:-1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if sequence.finish_reason == "stop" and sequence.stop_token_id is None:
        cuts = [text.find(stop) for stop in sequence.group.request.sampling.stop]
        text = text[: min((cut for cut in cuts if cut >= 0), default=len(text))]
    return text
