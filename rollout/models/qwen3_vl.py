"""Qwen3-VL: the Qwen3 decoder with interleaved three-plane positions, image features added after its first layers."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.qwen_vl import interleaved_planes, vl_spec
from foveate.rollout.models.spec import Classes, ModelSpec

CLASSES = Classes(
    source="transformers.models.qwen3_vl.modeling_qwen3_vl",
    decoder="Qwen3VLTextModel",
    layer="Qwen3VLTextDecoderLayer",
    attention="Qwen3VLTextAttention",
    mlp="Qwen3VLTextMLP",
    norm="Qwen3VLTextRMSNorm",
    rotary="Qwen3VLTextRotaryEmbedding",
    outer="Qwen3VLModel",
)


def describe(model: Any) -> ModelSpec:
    inner = model.model
    section = inner.language_model.rotary_emb.mrope_section
    return vl_spec(model, interleaved_planes(section), CLASSES, len(inner.visual.deepstack_merger_list))
