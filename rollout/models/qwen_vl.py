"""What Qwen's vision-language families share: three-plane rotary positions and transformers' own vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from foveate.rollout.models.spec import Classes, ModelSpec, VisionSpec, text_spec
from foveate.rollout.models.tower_attention import attended
from foveate.rollout.pruners.protocol import TowerAttention


def vl_spec(model: Any, rope_planes: tuple[int, ...], classes: Classes, num_deepstack: int = 0) -> ModelSpec:
    """ModelSpec of a model made of `model.language_model` and `model.visual`."""
    config, inner = model.config, model.model
    vision = config.vision_config
    pads = [getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision")]

    def positions(ids: torch.Tensor, image_grid_thw: torch.Tensor) -> tuple[torch.Tensor, int]:
        # One text token more shows where the completion goes on; transformers before 5.6 gives image tokens
        # time positions beyond the text that follows, so the largest position says nothing.
        is_image = torch.cat([ids == config.image_token_id, torch.zeros(1, dtype=torch.bool, device=ids.device)]).int()
        longer = torch.cat([ids, ids.new_zeros(1)])
        planes, _ = inner.get_rope_index(longer[None], mm_token_type_ids=is_image[None], image_grid_thw=image_grid_thw)
        return planes[:, 0, :-1], int(planes[0, 0, -1])

    return text_spec(
        model,
        inner.language_model,
        config.text_config,
        classes,
        path="model.language_model",
        rope_planes=rope_planes,
        vision=VisionSpec(
            tower=inner.visual,
            encode=partial(_encode, inner, num_deepstack),
            encode_attended=partial(_encode_attended, inner, num_deepstack, classes.source),
            positions=positions,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            pad_ids=tuple(sorted({i for i in pads if i is not None})),
            merge_size=vision.spatial_merge_size,
            patch_dim=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            num_deepstack=num_deepstack,
        ),
    )


def _encode(
    inner: Any, num_deepstack: int, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor
) -> list[torch.Tensor]:
    output = inner.get_image_features(pixel_values, image_grid_thw, return_dict=True)
    sizes = [len(image) for image in output.pooler_output]
    levels = [output.pooler_output]
    for level in output.deepstack_features if num_deepstack else ():
        # All images in one tensor until some release of transformers, one tensor an image since.
        levels.append(level.split(sizes) if isinstance(level, torch.Tensor) else level)
    return [torch.stack(image, dim=1) for image in zip(*levels, strict=True)]


def _encode_attended(
    inner: Any,
    num_deepstack: int,
    source: str,
    pixel_values: torch.Tensor,
    image_grid_thw: torch.Tensor,
    backend: str | None,
) -> tuple[torch.Tensor, TowerAttention]:
    with attended(inner.visual, source, image_grid_thw[0].tolist(), backend) as attention:
        (features,) = _encode(inner, num_deepstack, pixel_values, image_grid_thw)
        return features, attention()


def consecutive_planes(section: Sequence[int]) -> tuple[int, ...]:
    """The plane each rotary frequency follows: section[0] times time, section[1] times height, section[2] width."""
    return tuple(index % 3 for index, count in enumerate(section) for _ in range(count))


def interleaved_planes(section: Sequence[int]) -> tuple[int, ...]:
    """As `consecutive_planes`, for Qwen3-VL: frequency 3 t + 1 follows height while t < section[1], 3 t + 2 width while
    t < section[2], and all others time."""
    turns = (0, section[1], section[2])
    return tuple(i % 3 if i // 3 < turns[i % 3] else 0 for i in range(sum(section)))
