"""Modules whose forward the engine computes in its own way: each must be transformers' own, and stay so."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from foveate.rollout.models.spec import ModelSpec

# (module, name) of forward hooks that leave the output's values as they are: what `enable_input_require_grads` puts on
# the embedding, and what stays on layers and attention once a forward was asked for hidden states or attentions.
HARMLESS_HOOKS = {
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("transformers.utils.output_capturing", "output_capturing_hook"),
    ("peft.peft_model", "make_inputs_require_grad"),
    ("peft.mixed_model", "make_inputs_require_grad"),
    ("peft.utils.other", "make_inputs_require_grad"),
}


class Watch:
    """Modules found to be what they should be, and who stood where; `is_unchanged` is asked before every step."""

    def __init__(self) -> None:
        self._forwards: list[tuple[nn.Module, type, dict[str, Any], dict[int, Any]]] = []
        self._places: list[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None]]] = []

    @property
    def is_unchanged(self) -> bool:
        """Whether no module was added, removed, replaced, hooked, or given another class or forward."""
        for children, known in self._places:
            if children != known:
                return False
        for module, kind, state, known_hooks in self._forwards:
            if type(module) is not kind or "forward" in state or state["_forward_pre_hooks"]:
                return False
            if state["_forward_hooks"] and state["_forward_hooks"] != known_hooks:
                return False
            if state.get("_compiled_call_impl") is not None:
                return False
        return True

    def add_places(self, root: nn.Module) -> None:
        """Remembers all children below a module."""
        for parent in root.modules():
            self.add_place(parent)

    def add_place(self, parent: nn.Module) -> None:
        if parent._modules or isinstance(parent, (nn.ModuleDict, nn.ModuleList)):
            self._places.append((parent._modules, dict(parent._modules)))

    def add_forward(self, module: Any, name: str) -> None:
        """Remembers a module; raises ValueError naming it if its forward is not the one of its class alone.

        Forward hooks, a forward set on the object, and a compiled call are refused. `HARMLESS_HOOKS` are not.
        """
        kind, state, label = type(module), module.__dict__, _path(type(module))
        hooks = dict(module._forward_hooks)
        harmful = [hook for hook in hooks.values() if not _is_harmless(hook)] + list(module._forward_pre_hooks.values())
        if harmful:
            raise ValueError(f"expected a {label} without forward hooks, got one with hooks ({name})")
        if "forward" in state:
            raise ValueError(f"expected a {label} with the forward of its class, got one with its own ({name})")
        if state.get("_compiled_call_impl") is not None:
            raise ValueError(f"expected a {label} that is not compiled, got one that is ({name})")
        self._forwards.append((module, kind, state, hooks))

    def add(self, module: Any, name: str, kind: type) -> None:
        """As `add_forward`, for a module that must be of exactly this class."""
        if type(module) is not kind:
            raise ValueError(f"expected a {_path(kind)}, got {_path(type(module))} ({name})")
        self.add_forward(module, name)


def watch_decoder(spec: ModelSpec) -> Watch:
    """Everything of the decoder but its projections.

    Raises ValueError naming the first module that is wrapped, hooked, compiled or of another class than the family's.
    """
    watch, decoder, classes, name = Watch(), spec.decoder, spec.classes, spec.path
    if spec.model.get_submodule(name) is not decoder:
        raise ValueError(f"expected the decoder that the engine was built with, got another one ({name})")
    if classes.outer is not None:
        watch.add(spec.model.model, "model", classes.find(classes.outer))
        watch.add_place(spec.model.model)
    watch.add(decoder, name, classes.find(classes.decoder))
    watch.add(decoder.embed_tokens, f"{name}.embed_tokens", nn.Embedding)
    watch.add(decoder.rotary_emb, f"{name}.rotary_emb", classes.find(classes.rotary))
    watch.add(decoder.norm, f"{name}.norm", classes.find(classes.norm))
    watch.add(decoder.layers, f"{name}.layers", nn.ModuleList)
    if len(decoder.layers) > decoder.config.num_hidden_layers:
        expected = f"at most num_hidden_layers = {decoder.config.num_hidden_layers} layers"
        raise ValueError(f"expected {expected}, got {len(decoder.layers)} ({name}.layers)")
    for index, layer in enumerate(decoder.layers):
        _add_layer(watch, layer, f"{name}.layers.{index}", spec)
    watch.add_places(decoder)
    watch.add_place(spec.model)
    return watch


def _add_layer(watch: Watch, layer: Any, name: str, spec: ModelSpec) -> None:
    classes = spec.classes
    norm = classes.find(classes.norm)
    watch.add(layer, name, classes.find(classes.layer))
    watch.add(layer.input_layernorm, f"{name}.input_layernorm", norm)
    watch.add(layer.self_attn, f"{name}.self_attn", classes.find(classes.attention))
    for child in ("q_norm", "k_norm"):
        if hasattr(layer.self_attn, child):
            watch.add(getattr(layer.self_attn, child), f"{name}.self_attn.{child}", norm)
    watch.add(layer.post_attention_layernorm, f"{name}.post_attention_layernorm", norm)
    watch.add(layer.mlp, f"{name}.mlp", classes.find(classes.mlp))
    watch.add(layer.mlp.act_fn, f"{name}.mlp.act_fn", type(ACT2FN[spec.activation]))


def _is_harmless(hook: Any) -> bool:
    return (getattr(hook, "__module__", None), getattr(hook, "__name__", None)) in HARMLESS_HOOKS


def _path(kind: type) -> str:
    module = "torch.nn" if kind.__module__.startswith("torch.nn.modules") else kind.__module__
    return f"{module}.{kind.__qualname__}"
