"""Finds the places where a kernel makes the host wait for the device, without needing a device.

Every operation of torch passes a dispatch mode, which knows those that read a value on the host or copy between
devices; torch.cuda's own functions that wait are wrapped; on CUDA, torch's synchronisation warnings are added. What
waits without telling torch (a native extension) makes the capture of a graph fail, which the timer reports.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Their result, or its shape, depends on values: the host waits for them.
READS = {
    aten._local_scalar_dense,  # item, bool, int, float
    aten.item,  # the same, inside a registered kernel
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
COPIES = {aten._to_copy, aten.to, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_}  # a mask as index is turned into positions first
WAITING = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))


class HostSyncs(TorchDispatchMode):
    """While active, counts by name what would make the host wait for tensors on `device_type`."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        if self._waits(func, args, kwargs, result):
            self.found[str(func)] += 1
        return result

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func.namespace in ("aten", "prims", "prim"):
            return func(*args, **kwargs)
        # A kernel of our own is entered with the mode on, so that what it does in Python is seen too.
        key = torch._C.DispatchKey.CUDA if self._has("cuda", args, kwargs) else torch._C.DispatchKey.CPU
        with self:
            return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)

    def _waits(self, func: Any, args: tuple, kwargs: dict, result: Any) -> bool:
        op = func.overloadpacket
        if op in COPIES:
            source = args[1] if op is aten.copy_ else args[0]
            types = {source.device.type, result.device.type}
            return len(types) == 2 and self.device_type in types and not _argument(func, "non_blocking", args, kwargs)
        if not self._has(self.device_type, args, kwargs):
            return False
        if op in INDEXED:
            return any(x.dtype in (torch.bool, torch.uint8) for x in args[1] if isinstance(x, torch.Tensor))
        return op in READS or (op is aten.repeat_interleave and kwargs.get("output_size") is None)

    @staticmethod
    def _has(device_type: str, args: tuple, kwargs: dict) -> bool:
        return any(isinstance(x, torch.Tensor) and x.device.type == device_type for x in tree_leaves((args, kwargs)))


def _argument(func: Any, name: str, args: tuple, kwargs: dict) -> Any:
    """Value of an operator's argument, wherever it stands; None if it has no such argument."""
    places = [place for place, argument in enumerate(func._schema.arguments) if argument.name == name]
    return kwargs.get(name, args[places[0]] if places and places[0] < len(args) else None)


@contextmanager
def watch(device: torch.device) -> Iterator[Counter[str]]:
    """Counts, by name, what makes the host wait for `device` meanwhile; on the CPU, what would on a GPU."""
    mode = HostSyncs(device.type)
    with ExitStack() as stack:
        for owner, name in WAITING:
            label = f"{owner.__name__}.{name}"
            stack.enter_context(mock.patch.object(owner, name, _counted(getattr(owner, name), label, mode.found)))
        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", _counted_tolist(mode)))
        if device.type == "cuda":
            stack.enter_context(_cuda_warnings(mode.found))
        stack.enter_context(mode)
        yield mode.found


def _counted(function: Callable[..., Any], label: str, found: Counter[str]) -> Callable[..., Any]:
    def counted(*args, **kwargs) -> Any:
        found[label] += 1
        return function(*args, **kwargs)

    return counted


def _counted_tolist(mode: HostSyncs) -> Callable[..., Any]:
    """A tensor on the CPU hands its values over without an operation that a dispatch mode would see."""
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        if tensor.is_cpu and mode.device_type == "cpu":
            mode.found["Tensor.tolist"] += 1
        return tolist(tensor)

    return counted


@contextmanager
def _cuda_warnings(found: Counter[str]) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if count := sum("synchronizing CUDA operation" in str(warning.message) for warning in caught):
        found["torch.cuda.set_sync_debug_mode"] += count
