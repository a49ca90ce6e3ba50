"""Qwen2.5-VL: the Qwen2 decoder with three-plane rotary positions; the tower attends within windows."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models.qwen_vl import consecutive_planes, vl_spec
from foveate.rollout.models.spec import ModelSpec


def describe(model: Any) -> ModelSpec:
    return vl_spec(model, consecutive_planes(model.config.text_config.rope_parameters["mrope_section"]))
