"""Llama: grouped-query attention, optional biases."""

from __future__ import annotations

from torch import nn

from foveate.rollout.models.spec import ModelSpec, text_spec


def describe(model: nn.Module) -> ModelSpec:
    return text_spec(model, model.model, model.config)
