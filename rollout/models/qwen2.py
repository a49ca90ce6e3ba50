"""Qwen2: as Llama, with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.spec import ModelSpec, text_spec


def describe(model: Any) -> ModelSpec:
    return text_spec(model, model.model, model.config)
