"""Qwen3 (text): as Llama, with RMS norms on each head of q and k."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.spec import Classes, ModelSpec, text_spec

CLASSES = Classes(
    source="transformers.models.qwen3.modeling_qwen3",
    decoder="Qwen3Model",
    layer="Qwen3DecoderLayer",
    attention="Qwen3Attention",
    mlp="Qwen3MLP",
    norm="Qwen3RMSNorm",
    rotary="Qwen3RotaryEmbedding",
)


def describe(model: Any) -> ModelSpec:
    return text_spec(model, model.model, model.config, CLASSES)
