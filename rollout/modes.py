"""Torch's modes while the engine works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

CPU = torch.device("cpu")


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Torch as the engine needs it, whatever modes its caller is in: ordinary tensors, no gradient, no autocast on the
    device. The default device is the CPU, for an engine on a GPU too: what is to lie there says so."""
    # A default device is a mode through which every call of torch goes, 2 us each: not where it is the default already.
    default = nullcontext() if torch.get_default_device() == CPU else CPU
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), default:
        yield
