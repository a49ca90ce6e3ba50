"""Tensors given by name, on their way into a model's parameters: checked whole first, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from foveate.rollout.models.names import resolve_name

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
Manifest = Mapping[str, tuple[Iterable[int], torch.dtype]]
Write = Callable[[nn.Parameter, torch.Tensor], None]
IsEqual = Callable[[nn.Parameter, torch.Tensor], bool]


class NamedUpdate:
    """What one update names, checked as far as it is known before the first tensor is copied.

    named: a mapping, list or tuple is checked whole here; any other iterable is read by `write` alone, one item at a
    time, and no tensor of it is kept. manifest: {name: (shape, dtype)} of all that comes, checked whole here; every
    item must then be in it, with this dtype. partial: parameters may be missing. refused: ids of parameters that must
    not be named. Raises ValueError for a name that is unknown or comes twice, a tensor that is not floating, strided
    and of the parameter's shape, tied names with different values, and names that are missing.
    """

    def __init__(
        self,
        model: nn.Module,
        named: NamedTensors,
        manifest: Manifest | None = None,
        partial: bool = False,
        refused: Container[int] = (),
    ):
        self._params = dict(model.named_parameters(remove_duplicate=False))
        self._partial, self._refused = partial, refused
        self._promised: dict[str, torch.dtype] | None = None
        self._given: dict[str, nn.Parameter] = {}  # by the module's own name, so far
        self._first: dict[int, str] = {}  # by id of a parameter, the name under which it came first
        if manifest is not None:
            self._promised = self._read_manifest(manifest)
        self._whole: list[tuple[nn.Parameter, torch.Tensor]] | None = None
        if not isinstance(named, Iterable):
            raise ValueError(f"expected names with tensors, got {type(named).__name__} (update_weights)")
        self._items = named.items() if isinstance(named, Mapping) else named
        if isinstance(named, (Mapping, list, tuple)):
            self._whole = self._check_whole()
        self.is_empty = manifest is None and self._whole is not None and not self._whole

    @property
    def is_complete(self) -> bool:
        """Whether every parameter was named."""
        return all(id(param) in self._first for param in self._params.values())

    def write(self, write: Write, is_equal: IsEqual) -> None:
        """Hands out each parameter with its tensor; is_equal decides where a tied parameter comes again.

        Items that were not checked before are checked here, each before it is handed out, so a ValueError may come
        when others have been written.
        """
        for param, tensor in self._whole or ():
            write(param, tensor)
        if self._whole is not None:
            return
        for item in self._items:
            name, tensor = _pair(item)
            param, other = self._take_tensor(name, tensor)
            if other is None:
                write(param, tensor)
            elif not is_equal(param, tensor):
                raise _tied(other, name)
            del item, tensor  # or it would live on while the next one is made
        self._require_all()

    def _check_whole(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        tensors: dict[int, torch.Tensor] = {}
        params: list[nn.Parameter] = []
        for name, tensor in map(_pair, self._items):
            param, other = self._take_tensor(name, tensor)
            if other is None:
                params.append(param)
            value = tensors.setdefault(id(param), tensor)
            if other is not None and value is not tensor and not torch.equal(value.to(tensor), tensor):
                raise _tied(other, name)
        if self._given or self._promised is not None:
            self._require_all()
        return [(param, tensors[id(param)]) for param in params]

    def _read_manifest(self, manifest: Manifest) -> dict[str, torch.dtype]:
        if not isinstance(manifest, Mapping):
            raise ValueError(
                f"expected a mapping from names to (shape, dtype), got {type(manifest).__name__} (manifest)"
            )
        promised: dict[str, torch.dtype] = {}
        for name, entry in manifest.items():
            try:
                shape, dtype = entry
                sizes = tuple(shape)
            except (TypeError, ValueError) as error:
                raise ValueError(f"expected (shape, dtype), got {entry!r} (manifest, {name})") from error
            self._take(name, sizes, dtype, f"(manifest, {name})")
            promised[next(reversed(self._given))] = dtype
        self._require_all()
        self._given, self._first = {}, {}
        return promised

    def _take_tensor(self, name: str, tensor: Any) -> tuple[nn.Parameter, str | None]:
        """As `_take`, for a tensor that has come."""
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"expected a floating tensor, got {type(tensor).__name__} ({name})")
        param, other = self._take(name, tuple(tensor.shape), tensor.dtype, f"on {tensor.device} ({name})")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"expected a tensor with data, got {tensor.layout} on {tensor.device} ({name})")
        promised = self._promised and self._promised[next(reversed(self._given))]
        if promised and tensor.dtype != promised:
            raise ValueError(f"expected {promised} as in the manifest, got {tensor.dtype} ({name})")
        return param, other

    def _take(self, name: str, shape: tuple[int, ...], dtype: Any, where: str) -> tuple[nn.Parameter, str | None]:
        """The parameter, now the last of those given, and another name under which it came before."""
        own = resolve_name(name, self._params)
        param = self._params[own]
        if own in self._given:
            raise ValueError(f"expected each parameter once, got {own!r} twice (update_weights)")
        if self._promised is not None and own not in self._promised:
            raise ValueError(f"expected names of the manifest alone, got {name!r} (update_weights)")
        if id(param) in self._refused:
            raise ValueError(f"expected no weights of the vision tower, got {name!r} (vision_changed=False)")
        is_floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if shape != tuple(param.shape) or not is_floating:
            expected = f"a floating tensor of shape {list(param.shape)}"
            raise ValueError(f"expected {expected}, got {dtype} {list(shape)} {where}")
        self._given[own] = param
        first = self._first.setdefault(id(param), own)
        return param, None if first == own else first

    def _require_all(self) -> None:
        if self._promised is not None:
            missing = [name for name in self._promised if name not in self._given]
            count = len(self._promised)
        else:
            missing = [n for n, param in self._params.items() if id(param) not in self._first and not self._partial]
            count = len(self._params)
        if missing:
            raise ValueError(f"expected all {count} parameters, got none for {missing[:5]} (missing: {len(missing)})")


def _pair(item: Any) -> tuple[str, Any]:
    if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)):
        raise ValueError(f"expected pairs of a name and a tensor, got {type(item).__name__} (update_weights)")
    return item[0], item[1]


def _tied(other: str, name: str) -> ValueError:
    return ValueError(f"expected equal values for tied parameters, got different ones ({other}, {name})")
