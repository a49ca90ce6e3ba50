"""The states of this process's random generators, as tensors that a file can hold."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch

from foveate.rollout.checks import require

KINDS = ("python", "numpy", "cpu")  # and "cuda" where the model is on a GPU


def states(device: torch.device) -> dict[str, torch.Tensor]:
    """Python's, numpy's (the global one), torch's of the CPU, and of `device` if that is a GPU: uint8 [bytes] each."""
    legacy: Any = np.random.get_state(legacy=False)
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    found = {"python": _bytes(random.getstate()), "numpy": _bytes(legacy), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def check(states: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless `restore` can do its work."""
    missing = sorted(set(KINDS) - set(states))
    require(not missing, "the state of the generators of every rank", f"none of {missing}", "directory")


def restore(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Sets the generators to what `states` returned; that of a GPU only where the model is on one now."""
    version, numbers, gauss = _value(states["python"])
    random.setstate((version, tuple(numbers), gauss))
    legacy = _value(states["numpy"])
    legacy["state"]["key"] = np.array(legacy["state"]["key"], dtype=np.uint32)
    np.random.set_state(legacy)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _bytes(value: Any) -> torch.Tensor:
    """As JSON, which keeps ints and floats exactly."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(content: torch.Tensor) -> Any:
    return json.loads(bytes(content.tolist()))
