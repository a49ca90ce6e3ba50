"""Projections that are no plain `nn.Linear`: what each multiplies with, as one weight and one bias."""

from __future__ import annotations

from collections.abc import Callable
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


class AdaptedLinears:
    """The engine's copies of what projections of registered types multiply with."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.device = device
        self._copies: dict[nn.Module, tuple[str, Linear]] = {}

    def __bool__(self) -> bool:
        return bool(self._copies)

    def add(self, module: nn.Module, name: str) -> Linear:
        """Copies for one more projection; raises ValueError naming it if it cannot be read."""
        for child in module.modules():
            require_no_hooks(child, name)
            for key, param in child._parameters.items():
                if param is not None and (type(param) is not nn.Parameter or not param.is_floating_point()):
                    got = f"{type(param).__name__} {param.dtype}"
                    raise ValueError(f"expected a plain floating nn.Parameter, got {got} ({name}, {key})")
        weight, bias = _read(module, name)
        copies = self._copy(weight), None if bias is None else self._copy(bias)
        self._copies[module] = name, copies
        return copies

    def refresh(self) -> None:
        """Fills the copies anew; raises ValueError naming the projection if one cannot be read, or changed shape."""
        for module, (name, (weight, bias)) in self._copies.items():
            new_weight, new_bias = _read(module, name)
            if new_weight.shape != weight.shape or (new_bias is None) != (bias is None):
                raise ValueError(f"expected a weight {list(weight.shape)}, got {list(new_weight.shape)} ({name})")
            weight.copy_(new_weight)
            if bias is not None and new_bias is not None:
                bias.copy_(new_bias)

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for _, copies in self._copies.values() for x in copies if x is not None)

    @property
    def has_hooks(self) -> bool:
        return any(_has_hooks(child) for module in self._copies for child in module.modules())

    @property
    def parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """(owner, name, parameter) of all that the projections are made of."""
        children = [child for module in self._copies for child in module.modules()]
        return [(c, name, param) for c in children for name, param in c._parameters.items() if param is not None]

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        # Never the module's own memory, even where nothing was added to its parameter.
        return tensor.to(self.device, self.dtype, copy=True)


def require_no_hooks(module: nn.Module, name: str) -> None:
    """Raises ValueError if the module's forward is not the one of its class alone."""
    if _has_hooks(module):
        raise ValueError(f"expected a torch.nn.Linear without forward hooks, got one with hooks ({name})")


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


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
