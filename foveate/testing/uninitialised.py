"""Memory that shows when it is read before it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What hands out memory without writing it, from Python. Allocations inside torch's own operators are not seen.
ALLOCATORS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Meanwhile `torch.empty` and its kin return NaN (floating), True (bool) or a large number (integers).

    For every thread of the process; may be nested. Leaves all functions as they were.
    """
    before = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name in ALLOCATORS]
    try:
        for owner, name, allocate, _ in before:
            setattr(owner, name, _poisoned(allocate))
        yield
    finally:
        for owner, name, allocate, own in before:
            if own:
                setattr(owner, name, allocate)
            else:
                delattr(owner, name)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_garbage(*args, **kwargs) -> torch.Tensor:
        return fill_with_garbage(allocate(*args, **kwargs))

    return allocate_garbage


def fill_with_garbage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, any dtype and shape, overwritten as `poisoned_empty` does; those on "meta" are left alone."""
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        else:
            # Large, yet index arithmetic on it does not wrap around to something small.
            tensor.fill_(torch.iinfo(tensor.dtype).max // 2 + 1)
    return tensor
