"""The engine's view of a model's parameters: shared by reference, fused where it pays, or a shadow copy.

Fusing puts q, k, v (and gate, up) of a layer into one buffer and re-points the module's own parameters into
it. Each gets a storage of its own through DLPack: plain slices share one storage, and checkpoint writers that
look for tied tensors would then drop all but one of them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from foveate.rollout.models.adapters import AdaptedLinears, Linear, find_adapter
from foveate.rollout.models.named import Manifest, NamedTensors, NamedUpdate
from foveate.rollout.models.spec import ModelSpec
from foveate.rollout.models.watch import Watch, watch_decoder

# Keyed by the module that owns the parts (self_attn, mlp) and the parts' kind. The buffers live as long as
# the module: a second engine on it adopts them, and parameters stay valid when engines go.
_FUSED: weakref.WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # have no forward


@dataclass
class LayerWeights:
    """Tensors of one layer; qkv and gate_up hold one fused linear, or one for each part."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    eps: float
    qkv: list[Linear]
    o: Linear
    gate_up: list[Linear]
    down: Linear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


def has_values(param: torch.Tensor) -> bool:
    """False for a parameter that is a mere shape."""
    return param.device.type != "meta"


class Weights:
    """What the decoder reads.

    shares: True if these are the module's own parameters, False if some are a shadow that `refresh` fills: in another
    dtype, or of an adapter's projections (`foveate.rollout.models.adapters`). Raises ValueError naming the module for
    a projection that is neither a plain `nn.Linear` nor of a registered type, and for any other module of the decoder
    whose forward is not the one of transformers' own class (`foveate.rollout.models.watch`).
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype | None, fuse: bool):
        self.spec = spec
        self.fuse = fuse
        self.device = spec.lm_head.weight.device
        self.dtype = dtype or spec.lm_head.weight.dtype
        self._in_place = self.dtype == spec.lm_head.weight.dtype
        self._shadow: dict[int, torch.Tensor] = {}  # id of a parameter -> its copy in self.dtype
        self._shadow_buffers: dict[nn.Module, dict[str, torch.Tensor]] = {}
        self._table: list[tuple[nn.Module, str, nn.Parameter, int]] = []
        self._adapted = AdaptedLinears(self.dtype, self.device)
        self._num_layers: int | None = None  # until it was read once
        self._torn = False  # an update broke off half-way
        self._tower: set[int] = set()  # ids of the vision tower's parameters, during an update
        self._wrote_tower = False  # since the last update that succeeded
        self.adopt()

    @torch.inference_mode(False)
    @torch.no_grad()
    def adopt(self) -> None:
        """Reads the module's parameters anew, fusing what is not fused yet."""
        model, decoder = self.spec.model, self.spec.decoder
        self._names = {id(module): name for name, module in model.named_modules()}
        self._is_read = False  # until all is, see check
        self._watch = self._watch_decoder()
        self._known = {id(param): pointer for _, _, param, pointer in self._table}
        self._reading: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.embed = self._tensor(decoder.embed_tokens, "weight")
        self.layers = [self._layer(layer) for layer in decoder.layers]
        self.norm, self.eps = self._tensor(decoder.norm, "weight"), decoder.norm.variance_epsilon
        self.lm_head, self.lm_head_bias = self._linear(model.lm_head)
        if len(self.lm_head) != self.spec.vocab_size:
            expected = f"{self.spec.vocab_size} ids, as the engine was built with"
            raise ValueError(f"expected {expected}, got {len(self.lm_head)} (lm_head)")
        self._adapted.finish()
        # Fusing moves parameters, so the addresses are taken when all are in place.
        watched = [*self._reading, *self._adapted.parameters]
        self._table = [(owner, name, param, param.data_ptr()) for owner, name, param in watched]
        read = {id(param) for _, _, param, _ in self._table}  # a replaced parameter leaves no copy behind
        self._shadow = {key: copy for key, copy in self._shadow.items() if key in read}
        self._is_read = True

    def check(self) -> None:
        """Re-adopts the parameters if one, or a module, was replaced or moved since they were last read.

        Raises ValueError naming the module if what stands there now cannot be shared, and after an update that
        broke off until a complete one.
        """
        if self._torn:
            raise ValueError("expected a complete update_weights after one that broke off half-way, got none")
        self._follow()

    def _follow(self) -> None:
        """Re-adopts what was replaced or moved."""
        if not (self._is_read and self._watch.is_unchanged and self._is_where_it_was()):
            self.adopt()

    def _is_where_it_was(self) -> bool:
        for owner, name, param, pointer in self._table:
            if owner._parameters.get(name) is not param or param.data_ptr() != pointer:
                return False
        return True

    def _watch_decoder(self) -> Watch:
        watch, count = watch_decoder(self.spec), self.spec.num_layers
        if self._num_layers not in (None, count):
            expected = f"{self._num_layers} layers, as the engine was built with"
            raise ValueError(f"expected {expected}, got {count} ({self.spec.path}.layers)")
        self._num_layers = count
        return watch

    def plan(
        self, named: NamedTensors, manifest: Manifest | None, partial: bool, vision_changed: bool | None
    ) -> NamedUpdate:
        """Checks what can be checked before anything changes; raises ValueError as `NamedUpdate` and `check`."""
        self._follow()
        self._tower = {id(param) for param in self.spec.vision.tower.parameters()} if self.spec.vision else set()
        return NamedUpdate(self.spec.model, named, manifest, partial, self._tower if vision_changed is False else ())

    def apply(self, update: NamedUpdate, vision_changed: bool | None) -> bool:
        """Copies what the update names into the parameters, or into their shadow; without names, fills the shadow.

        Returns whether the vision tower changed: what the caller said, else whether a tensor of it was written, here
        or by an update that broke off, or, where nothing was named, whether it is trained. While this runs, and after
        it has broken off, `check` refuses.
        """
        was_torn, self._torn = self._torn, True
        if update.is_empty:
            self._refresh()
        else:
            update.write(self._write, self._is_equal)
            with torch.inference_mode(False), torch.no_grad():
                self._adapted.refresh()
        self._torn = was_torn and not (update.is_empty or update.is_complete)
        wrote_tower, self._wrote_tower = self._wrote_tower, False
        if vision_changed is None and update.is_empty and self.spec.vision is not None:
            vision_changed = any(param.requires_grad for param in self.spec.vision.tower.parameters())
        return wrote_tower or bool(vision_changed)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _refresh(self) -> None:
        """Fills the shadow from the module's parameters; nothing to do when they are shared."""
        for _, _, param, _ in self._table:
            if (copy := self._shadow.get(id(param))) is not None:
                copy.copy_(param)
        self._adapted.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(self, param: nn.Parameter, tensor: torch.Tensor) -> None:
        self._wrote_tower = self._wrote_tower or id(param) in self._tower
        self._shadow.get(id(param), param).copy_(tensor)

    @torch.no_grad()
    def _is_equal(self, param: nn.Parameter, tensor: torch.Tensor) -> bool:
        target = self._shadow.get(id(param), param)
        return torch.equal(tensor.to(target), target)

    @property
    def shares(self) -> bool:
        return self._in_place and not self._adapted

    @property
    def shadow_bytes(self) -> int:
        """Bytes the engine owns for copies of parameters."""
        return sum(copy.nbytes for copy in self._shadow.values()) + self._adapted.num_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of the decoder parameters that the engine reads in place."""
        return sum({id(p): p.nbytes for _, _, p in self._reading}.values()) if self._in_place else 0

    def _layer(self, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        has_head_norm = hasattr(attention, "q_norm")
        return LayerWeights(
            input_norm=self._tensor(layer.input_layernorm, "weight"),
            post_norm=self._tensor(layer.post_attention_layernorm, "weight"),
            eps=layer.input_layernorm.variance_epsilon,
            qkv=self._fused(attention, "qkv", [attention.q_proj, attention.k_proj, attention.v_proj]),
            o=self._linear(attention.o_proj),
            gate_up=self._fused(mlp, "gate_up", [mlp.gate_proj, mlp.up_proj]),
            down=self._linear(mlp.down_proj),
            q_norm=self._tensor(attention.q_norm, "weight") if has_head_norm else None,
            k_norm=self._tensor(attention.k_norm, "weight") if has_head_norm else None,
        )

    def _linear(self, module: nn.Module) -> Linear:
        if find_adapter(module) is not None:
            for child in module.modules():
                if type(child) not in CONTAINERS:
                    self._watch.add_forward(child, self._names[id(module)])
            return self._adapted.add(module, self._names[id(module)])
        self._require_plain(module)
        bias = None if module.bias is None else self._tensor(module, "bias")
        return self._tensor(module, "weight"), bias

    def _fused(self, owner: nn.Module, kind: str, parts: list[nn.Linear]) -> list[Linear]:
        if not self.fuse or any(find_adapter(part) is not None for part in parts):
            return [self._linear(part) for part in parts]
        for part in parts:
            self._require_plain(part)
        weight = self._buffer(owner, f"{kind}.weight", parts, "weight")
        biased = [part.bias is not None for part in parts]
        if not any(biased):
            return [(weight, None)]
        if not all(biased):
            raise ValueError(f"expected a bias on all or none of {kind}, got {biased} ({self._names[id(owner)]})")
        return [(weight, self._buffer(owner, f"{kind}.bias", parts, "bias"))]

    def _buffer(self, owner: nn.Module, kind: str, parts: list[nn.Linear], name: str) -> torch.Tensor:
        """The fused buffer of `name` of all parts, holding their values; parameters are re-pointed if shared."""
        params = [self._register(part, name) for part in parts]
        rows = [param.shape[0] for param in params]
        shape = (sum(rows), *params[0].shape[1:])
        buffers = (_FUSED if self._in_place else self._shadow_buffers).setdefault(owner, {})
        buffer = buffers.get(kind)
        if self._in_place and buffer is not None:
            # Where one part moved away, its old memory still belongs to whoever moved it: never write there.
            here = [part.data_ptr() for part in buffer.split(rows)] if buffer.shape[0] == shape[0] else []
            buffer = buffer if here == [param.data_ptr() for param in params] else None
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (shape, self.dtype, self.device):
            buffer = buffers[kind] = torch.empty(shape, dtype=self.dtype, device=self.device)
        for param, part in zip(params, buffer.split(rows), strict=True):
            if not self._in_place:
                self._fill(param, part)
            elif param.data_ptr() != part.data_ptr():
                part.copy_(param)
                param.data = torch.from_dlpack(part)
        return buffer

    def _fill(self, param: nn.Parameter, copy: torch.Tensor) -> torch.Tensor:
        """Makes `copy` the parameter's shadow; one that was filled before keeps what an update wrote to it."""
        if id(param) not in self._shadow or self._known.get(id(param)) != param.data_ptr():
            copy.copy_(param)
        self._shadow[id(param)] = copy
        return copy

    def _tensor(self, owner: nn.Module, name: str) -> torch.Tensor:
        param = self._register(owner, name)
        if self._in_place:
            return param
        copy = self._shadow.get(id(param))
        if copy is None:
            copy = torch.empty(param.shape, dtype=self.dtype, device=self.device)
        return self._fill(param, copy)

    def _register(self, owner: nn.Module, name: str) -> nn.Parameter:
        param, full = owner._parameters.get(name), f"{self._names[id(owner)]}.{name}"
        if type(param) is not nn.Parameter or not param.is_floating_point():
            got = f"{type(param).__name__} {getattr(param, 'dtype', '')}".strip()
            raise ValueError(f"expected a plain floating nn.Parameter, got {got} ({full})")
        if not has_values(param):
            raise ValueError(f"expected a parameter with data, got one on meta ({full})")
        if param.device != self.device or (self._in_place and param.dtype != self.dtype):
            expected, got = f"{self.dtype} on {self.device}", f"{param.dtype} on {param.device}"
            raise ValueError(f"expected {expected}, got {got} ({full})")
        self._reading.append((owner, name, param))
        return param

    def _require_plain(self, module: nn.Module) -> None:
        name = self._names[id(module)]
        if type(module) is not nn.Linear or is_parametrized(module):
            kind = "a parametrised" if is_parametrized(module) else f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(f"expected a plain torch.nn.Linear, got {kind} ({name})")
        self._watch.add_forward(module, name)
