"""Qwen3 (text): as Llama, with RMS norms on each head of q and k."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.spec import ModelSpec, text_spec


def describe(model: Any) -> ModelSpec:
    return text_spec(model, model.model, model.config)
