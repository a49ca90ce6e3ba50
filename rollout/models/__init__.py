"""Which model families the engine runs: one short file each, found by the config's `model_type`."""

from __future__ import annotations

from typing import Any

from foveate.rollout.models import llama, qwen2, qwen2_5_vl, qwen2_vl, qwen3, qwen3_vl
from foveate.rollout.models.adapters import register_adapter, unwrap
from foveate.rollout.models.spec import ModelSpec, VisionSpec

__all__ = ["FAMILIES", "ModelSpec", "VisionSpec", "describe", "register_adapter"]

FAMILIES = {
    "llama": llama.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
    "qwen2_vl": qwen2_vl.describe,
    "qwen2_5_vl": qwen2_5_vl.describe,
    "qwen3_vl": qwen3_vl.describe,
}


def describe(model: Any) -> ModelSpec:
    """Finds the parts of a transformers model, also inside a LoRA model of `peft`.

    Raises ValueError for a family that is not supported, and for a model in another wrapper.
    """
    from transformers import PreTrainedModel

    model = unwrap(model)
    # Wrappers hand on the attributes of what they hold.
    model_type = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    if model_type not in FAMILIES:
        raise ValueError(f"expected a model of one of {sorted(FAMILIES)}, got {model_type!r} (model)")
    return FAMILIES[model_type](model)
