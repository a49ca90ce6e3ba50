"""The values that cross the engine's border: requests in, groups of rollouts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from foveate.rollout.checks import is_int, plain_scalars, require
from foveate.rollout.config import SamplingParams
from foveate.rollout.pruning import PruneConfig

MAX_SAMPLES = 1 << 16  # of a request; each takes memory even if the request is refused
LONGEST_ID = 1000  # characters; errors repeat the id

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]


@dataclass(frozen=True, eq=False)
class VisionInputs:
    """A trainer's own image inputs, as its processor made them.

    pixel_values: float [patches, channels * temporal_patch * patch * patch], all images concatenated.
    image_grid_thw: int [images, 3], patches of each image in time, height and width.
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt with its images, to be completed `n` times: one group.

    prompt: text, chat messages, or token ids whose image placeholders are already expanded.
    images: PIL images, arrays uint8 [height, width, 3], paths or files' bytes, in the order of their placeholders.
    vision: ready image inputs instead of `images`. prefix_len: tokens at the start of the prompt that other
    requests share; None takes the end of a leading system message. request_id: None lets the engine name it.
    prune: how the images are pruned before the language model; "default" is `EngineConfig.prune`, None not at all. What
    prunes inside the language model is the engine's alone. metadata: the caller's own, handed back with the group
    (rewards read it).
    """

    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]] | torch.Tensor | np.ndarray
    images: Sequence[Any] = ()
    vision: VisionInputs | None = None
    n: int = 1
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str | None = None
    prefix_len: int | None = None
    prune: PruneConfig | Literal["default"] | None = "default"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain_scalars(self)
        request_id, n, images = self.request_id, self.n, self.images
        named = request_id is None or (isinstance(request_id, str) and len(request_id) <= LONGEST_ID)
        require(named, f"a str of at most {LONGEST_ID} characters, or None", request_id, "request_id")
        name = "" if request_id is None else f"request {request_id!r}: "
        require(is_int(n) and 1 <= n <= MAX_SAMPLES, f"{name}an int >= 1, at most {MAX_SAMPLES}", n, "n")
        are_many = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
        require(are_many, f"{name}a sequence of images", images, "images")
        sampling, vision = self.sampling, self.vision
        require(isinstance(sampling, SamplingParams), f"{name}SamplingParams", sampling, "sampling")
        require(vision is None or isinstance(vision, VisionInputs), f"{name}VisionInputs or None", vision, "vision")
        one_kind = vision is None or len(images) == 0
        require(one_kind, f"{name}images or vision, not both", len(images), "images")
        prefix = self.prefix_len
        require(prefix is None or (is_int(prefix) and prefix >= 0), f"{name}an int >= 0", prefix, "prefix_len")
        prune = self.prune
        known = prune is None or isinstance(prune, PruneConfig) or (isinstance(prune, str) and prune == "default")
        require(known, f"{name}a PruneConfig, 'default' or None", prune, "prune")
        require(isinstance(self.metadata, Mapping), f"{name}a mapping", self.metadata, "metadata")


@dataclass(frozen=True, eq=False)
class Rollout:
    """One completion. All tensors are contiguous CPU tensors of length T, the number of tokens drawn.

    token_ids: int64 [T], the stop token that ended it included. logprobs: float32 [T], log-softmax(logits /
    temperature) of the drawn token over the whole vocabulary. log_kept: float32 [T], log mass of the set it
    was drawn from. entropy: float32 [T], nats. The behaviour log-probability is `logprobs - log_kept`.
    stop_token_id: the id that ended it, if one did. weight_versions: (start, end, version), which tokens were drawn
    with which version of the weights; the spans cover 0..T, and two neighbours differ.
    text: without stop string and special tokens ("" when the engine has no tokenizer).
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    log_kept: torch.Tensor
    entropy: torch.Tensor
    finish_reason: FinishReason
    stop_token_id: int | None = None
    weight_versions: tuple[tuple[int, int, int], ...] = ()
    text: str = ""

    @property
    def behaviour_logprobs(self) -> torch.Tensor:
        """float32 [T], log-probability under the distribution that was really sampled."""
        return self.logprobs - self.log_kept


@dataclass(frozen=True, eq=False)
class SiteKeep:
    """What one pruning site kept of a prompt's image tokens. CPU tensors.

    kind: "patch", "encoder" or "layer". layer: first decoder layer that no longer sees the dropped tokens, 0 for the
    encoder. num_tokens: int32 [images], an image's tokens before any pruning. kept: int32 [K], image-local indices of
    merged tokens in raster order, ascending; kept_offsets: int32 [images + 1].

    Where tokens were merged, else None: merge_offsets: int32 [K + 1], merge_source: int32, image-local, merge_weight:
    float32. Kept token j has the features sum of weight * features[source] over its stretch of sources, in float32 and
    of every deepstack level alike, and its own where that stretch is empty.
    """

    kind: Literal["patch", "encoder", "layer"]
    layer: int
    num_tokens: torch.Tensor
    kept: torch.Tensor
    kept_offsets: torch.Tensor
    merge_offsets: torch.Tensor | None = None
    merge_source: torch.Tensor | None = None
    merge_weight: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class KeepPlan:
    """The policy that pruning chose for one prompt, to be replayed by a trainer and never recomputed.

    config_hash: `PruneConfig.config_hash`. positions: int32 [3, P'], original positions of the prompt tokens that enter
    layer 0: all of them, or without those that an encoder site dropped. next_position: where text continues, as without
    pruning. language_version, vision_version: weights with which the last of its tokens were selected.
    """

    config_hash: str
    method: str
    sites: tuple[SiteKeep, ...]
    positions: torch.Tensor
    next_position: int
    language_version: int
    vision_version: int


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """The n rollouts of one request, and the prompt exactly as the model saw it.

    prompt_ids: int64 [P], placeholders expanded. prompt_positions: int32 [3, P] (time, height, width; equal planes for
    text). next_position: position of the first completion token. image_grid_thw: int64 [images, 3]. pixel_values: the
    patches the tower saw, None without images. segments: int32, lengths of the prompt's segments. All of them are those
    of the whole prompt, as a trainer's processor makes it, whatever was pruned. A forward of one's own needs these
    positions; `foveate.replay` gives them to it (transformers' Qwen2.5-VL takes others where `mm_token_type_ids` is
    missing). keep: what pruning kept of it (all, of a prompt without images), None without pruning, after an error, and
    where an abort came before everything was selected. error: why this request failed, else None.
    kept_versions: versions of the weights before updates over which its keys and values were kept.
    """

    request: Request
    request_id: str
    prompt_ids: torch.Tensor
    prompt_positions: torch.Tensor
    next_position: int
    segments: torch.Tensor
    rollouts: tuple[Rollout, ...]
    image_grid_thw: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    keep: KeepPlan | None = None
    error: ValueError | None = None
    kept_versions: tuple[int, ...] = ()

    @property
    def weight_version(self) -> int | None:
        """The one version of the weights that computed all of it; None if there were several, or no tokens."""
        drawn = {version for rollout in self.rollouts for _, _, version in rollout.weight_versions}
        return drawn.pop() if len(drawn | set(self.kept_versions)) == 1 and drawn else None


@dataclass
class Versions:
    """How often an engine's weights were updated, and those of its vision tower."""

    weights: int = 0
    vision: int = 0

    @property
    def pair(self) -> tuple[int, int]:
        return self.weights, self.vision


class RequestError(ValueError):
    """Raised by `Engine.generate(strict=True)` after all requests have ended; `groups` holds every group."""

    def __init__(self, message: str, groups: list[RolloutGroup]):
        super().__init__(message)
        self.groups = groups
