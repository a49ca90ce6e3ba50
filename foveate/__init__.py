"""A rollout engine for multimodal GRPO: group-shared image prefill, exact log-probs, the trainer's own weights.

Public names are loaded on first use, so that `import foveate` needs no extra and imports nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.rollout.config import EngineConfig, PruneConfig, SamplingParams
    from foveate.rollout.engine import Engine
    from foveate.rollout.grpo import GRPOConfig
    from foveate.rollout.replay import replay
    from foveate.rollout.tagged import TaggedSpan
    from foveate.rollout.trainer import Trainer
    from foveate.rollout.types import KeepPlan, Request, RequestError, Rollout, RolloutGroup, VisionInputs

    __version__: str

__all__ = [
    "Engine",
    "EngineConfig",
    "GRPOConfig",
    "KeepPlan",
    "PruneConfig",
    "Request",
    "RequestError",
    "Rollout",
    "RolloutGroup",
    "SamplingParams",
    "TaggedSpan",
    "Trainer",
    "VisionInputs",
    "__version__",
    "replay",
]

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "GRPOConfig": "grpo",
    "KeepPlan": "types",
    "PruneConfig": "config",
    "Request": "types",
    "RequestError": "types",
    "Rollout": "types",
    "RolloutGroup": "types",
    "SamplingParams": "config",
    "TaggedSpan": "tagged",
    "Trainer": "trainer",
    "VisionInputs": "types",
    "replay": "replay",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.metadata.version("foveate")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"foveate.rollout.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
