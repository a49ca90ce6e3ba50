"""Qwen2: as Llama, with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.spec import Classes, ModelSpec, text_spec

CLASSES = Classes(
    source="transformers.models.qwen2.modeling_qwen2",
    decoder="Qwen2Model",
    layer="Qwen2DecoderLayer",
    attention="Qwen2Attention",
    mlp="Qwen2MLP",
    norm="Qwen2RMSNorm",
    rotary="Qwen2RotaryEmbedding",
)


def describe(model: Any) -> ModelSpec:
    return text_spec(model, model.model, model.config, CLASSES)
