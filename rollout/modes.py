"""Torch's modes while the engine works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Torch as the engine needs it, whatever modes its caller is in: ordinary tensors, no gradient, no autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), device:
        yield
