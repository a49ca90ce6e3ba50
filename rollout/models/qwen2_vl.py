"""Qwen2-VL: as Qwen2.5-VL, with a tower that attends to whole images."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.qwen_vl import consecutive_planes, vl_spec
from foveate.rollout.models.spec import Classes, ModelSpec

CLASSES = Classes(
    source="transformers.models.qwen2_vl.modeling_qwen2_vl",
    decoder="Qwen2VLTextModel",
    layer="Qwen2VLDecoderLayer",
    attention="Qwen2VLAttention",
    mlp="Qwen2MLP",
    norm="Qwen2VLRMSNorm",
    rotary="Qwen2VLRotaryEmbedding",
    outer="Qwen2VLModel",
)


def describe(model: Any) -> ModelSpec:
    section = model.config.text_config.rope_parameters["mrope_section"]
    return vl_spec(model, consecutive_planes(section), CLASSES)
