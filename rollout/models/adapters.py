"""Projections that are no plain `nn.Linear`: what each multiplies with, as one weight and one bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Linear = tuple[torch.Tensor, torch.Tensor | None]  # weight [out, in], bias [out]
Materialise = Callable[[Any], Linear]

_REGISTERED: dict[type, Materialise] = {}


def register_adapter(kind: type[nn.Module], materialise: Materialise) -> None:
    """Lets an engine run projections of exactly this type.

    materialise: module -> (weight [out, in], bias [out] or None), floating, so that the module's forward in eval mode
    is `x @ weight.T + bias`; it raises ValueError for a module in a state in which that is not so. An engine keeps a
    copy, made when it reads the model and by every `update_weights()`. Replaces what was registered for the type.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"expected a subclass of torch.nn.Module, got {kind!r} (kind)")
    _REGISTERED[kind] = materialise


def find_adapter(module: nn.Module) -> Materialise | None:
    """What was registered for the module's type, or what the engine knows of it: LoRA of `peft`."""
    kind = type(module)
    if kind not in _REGISTERED and (kind.__module__, kind.__qualname__) == ("peft.tuners.lora.layer", "Linear"):
        return lora_linear
    return _REGISTERED.get(kind)


def lora_linear(module: Any) -> Linear:
    """W + scaling * B @ A over the active adapters of a `peft` lora.Linear, in float32.

    Adapters that are merged into W, or disabled, add nothing. Raises ValueError for a variant of LoRA, a transposed or
    wrapped base layer, and adapters that are merged and disabled.
    """
    base, merged = module.base_layer, bool(module.merged)
    if type(base) is not nn.Linear or module.fan_in_fan_out:
        raise ValueError(f"expected a plain torch.nn.Linear below LoRA, got {type(base).__name__}")
    if merged and module.disable_adapters:
        raise ValueError("expected adapters that are not merged and disabled at once, got some that are")
    active = [] if merged or module.disable_adapters else [n for n in module.active_adapters if n in module.lora_A]
    weight = base.weight.float()
    bias = None if base.bias is None else base.bias.float()
    for name in active:
        if name in module.lora_variant:
            raise ValueError(f"expected plain LoRA, got {type(module.lora_variant[name]).__name__} ({name})")
        down, up, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        if not all(type(part) is nn.Linear for part in (down, up)):
            raise ValueError(f"expected plain torch.nn.Linear factors, got {type(down).__name__} ({name})")
        weight = weight + scaling * (up.weight.float() @ down.weight.float())
        if up.bias is not None:
            bias = scaling * up.bias.float() + (0 if bias is None else bias)
    return weight, bias


@dataclass(frozen=True, eq=False)
class _Adapted:
    """A projection's copies, and what they were made of: (owner, name, parameter, its address)."""

    name: str
    copies: Linear
    parts: list[tuple[nn.Module, str, nn.Parameter, int]]

    def is_made_of(self, parts: list[tuple[nn.Module, str, nn.Parameter, int]]) -> bool:
        """Whether these are the same modules and parameters, where they were; their values may have changed."""
        return len(parts) == len(self.parts) and all(
            owner is own and param is other and (name, pointer) == (key, address)
            for (owner, name, param, pointer), (own, key, other, address) in zip(parts, self.parts, strict=True)
        )


class AdaptedLinears:
    """The engine's copies of what projections of registered types multiply with.

    The model is read by `add` for each of them, then `finish`, as often as need be. A copy that was made before stays
    as it is, unless a module or parameter of the projection was replaced or moved: values are renewed by `refresh`.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.device = device
        self._adapted: dict[nn.Module, _Adapted] = {}
        self._reading: dict[nn.Module, _Adapted] = {}

    def __bool__(self) -> bool:
        return bool(self._adapted)

    def add(self, module: nn.Module, name: str) -> Linear:
        """Copies for one more projection; raises ValueError naming it if it cannot be read."""
        parts = []
        for child in module.modules():
            for key, param in child._parameters.items():
                if param is None:
                    continue
                if type(param) is not nn.Parameter or not param.is_floating_point():
                    got = f"{type(param).__name__} {param.dtype}"
                    raise ValueError(f"expected a plain floating nn.Parameter, got {got} ({name}, {key})")
                parts.append((child, key, param, param.data_ptr()))
        known = self._adapted.get(module)
        if known is not None and known.is_made_of(parts):
            copies = known.copies
        else:
            weight, bias = _read(module, name)
            copies = self._copy(weight), None if bias is None else self._copy(bias)
        self._reading[module] = _Adapted(name, copies, parts)
        return copies

    def finish(self) -> None:
        """Ends a reading of the model: projections that were not added are forgotten."""
        self._adapted, self._reading = self._reading, {}

    def refresh(self) -> None:
        """Fills the copies anew; raises ValueError naming the projection if one cannot be read, or changed shape."""
        for module, adapted in self._adapted.items():
            (weight, bias), (new_weight, new_bias) = adapted.copies, _read(module, adapted.name)
            if new_weight.shape != weight.shape or (new_bias is None) != (bias is None):
                got = list(new_weight.shape)
                raise ValueError(f"expected a weight {list(weight.shape)}, got {got} ({adapted.name})")
            weight.copy_(new_weight)
            if bias is not None and new_bias is not None:
                bias.copy_(new_bias)

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for adapted in self._adapted.values() for x in adapted.copies if x is not None)

    @property
    def parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """(owner, name, parameter) of all that the projections are made of."""
        return [part[:3] for adapted in self._adapted.values() for part in adapted.parts]

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        # Never the module's own memory, even where nothing was added to its parameter.
        return tensor.to(self.device, self.dtype, copy=True)


def _read(module: nn.Module, name: str) -> Linear:
    materialise = find_adapter(module)
    if materialise is None:
        raise ValueError(f"expected a registered type, got {type(module).__name__} ({name})")
    try:
        return materialise(module)
    except ValueError as error:
        raise ValueError(f"{error} ({name})") from error


def unwrap(model: Any) -> Any:
    """The transformers model inside a `peft` LoRA model, any other model itself.

    Raises ValueError for other models of `peft`: those may change more than projections.
    """
    if not type(model).__module__.startswith("peft."):
        return model
    tuner = type(model.base_model)
    if (tuner.__module__, tuner.__qualname__) != ("peft.tuners.lora.model", "LoraModel"):
        raise ValueError(f"expected LoRA, got {tuner.__module__}.{tuner.__qualname__} (model)")
    return model.get_base_model()
