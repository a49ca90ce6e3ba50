"""Qwen2.5-VL: the Qwen2 decoder with three-plane rotary positions, and transformers' own vision tower."""

from __future__ import annotations

from typing import Any

import torch

from foveate.rollout.models.spec import ModelSpec, VisionSpec, text_spec


def describe(model: Any) -> ModelSpec:
    config, inner = model.config, model.model
    text, vision = config.text_config, config.vision_config
    pads = [getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision")]

    def encode(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[torch.Tensor]:
        return list(inner.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output)

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
        text,
        mrope_section=tuple(text.rope_parameters["mrope_section"]),
        vision=VisionSpec(
            tower=inner.visual,
            encode=encode,
            positions=positions,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            pad_ids=tuple(sorted({i for i in pads if i is not None})),
            merge_size=vision.spatial_merge_size,
            patch_dim=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        ),
    )
