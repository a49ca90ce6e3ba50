"""Qwen2.5-VL: the Qwen2 decoder with three-plane rotary positions; the tower attends within windows."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.qwen_vl import consecutive_planes, vl_spec
from foveate.rollout.models.spec import Classes, ModelSpec

CLASSES = Classes(
    source="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    decoder="Qwen2_5_VLTextModel",
    layer="Qwen2_5_VLDecoderLayer",
    attention="Qwen2_5_VLAttention",
    mlp="Qwen2MLP",
    norm="Qwen2_5_VLRMSNorm",
    rotary="Qwen2_5_VLRotaryEmbedding",
    outer="Qwen2_5_VLModel",
)


def describe(model: Any) -> ModelSpec:
    section = model.config.text_config.rope_parameters["mrope_section"]
    return vl_spec(model, consecutive_planes(section), CLASSES)
