"""Llama: grouped-query attention, optional biases."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.spec import Classes, ModelSpec, text_spec

CLASSES = Classes(
    source="transformers.models.llama.modeling_llama",
    decoder="LlamaModel",
    layer="LlamaDecoderLayer",
    attention="LlamaAttention",
    mlp="LlamaMLP",
    norm="LlamaRMSNorm",
    rotary="LlamaRotaryEmbedding",
)


def describe(model: Any) -> ModelSpec:
    return text_spec(model, model.model, model.config, CLASSES)
