"""What an adapter tells the engine about a model: its modules, its sizes, its vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from foveate.rollout.pruners.protocol import TowerAttention

# Frequencies of these depend on the positions alone, as the one decoder assumes.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower and the ids and positions that go with it.

    encode: (pixel_values, image_grid_thw) -> one float [tokens, 1 + num_deepstack, hidden] an image, in memory of its
    own: what takes the placeholders' place, then what is added after each of the first num_deepstack decoder layers.
    encode_attended: as encode, of one image, with what the tower's attention says about it; its last argument is a
    backend of `foveate.kernels.vision_prune`. positions: (ids int64 [P], image_grid_thw) -> (int64 [3, P], position of
    the next token). merge_size: patches merged in each direction. pad_ids: ids that stand for vision in a prompt and
    that a policy must not draw.
    """

    tower: Any
    encode: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
    encode_attended: Callable[[torch.Tensor, torch.Tensor, str | None], tuple[torch.Tensor, TowerAttention]]
    positions: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, int]]
    image_token_id: int
    video_token_id: int | None
    pad_ids: tuple[int, ...]
    merge_size: int
    patch_dim: int
    num_deepstack: int = 0


@dataclass(frozen=True)
class Deepstack:
    """Image features that are added after the first decoder layers.

    rows: int64 [K], tokens of the step. levels: float [levels, K, hidden], level l is added after layer first + l.
    """

    rows: torch.Tensor
    levels: torch.Tensor
    first: int = 0


@dataclass(frozen=True)
class Classes:
    """Names of transformers' own classes of a family; `source` is the module that defines them.

    outer: of what holds the decoder and the vision tower, None without a tower.
    """

    source: str
    decoder: str
    layer: str
    attention: str
    mlp: str
    norm: str
    rotary: str
    outer: str | None = None

    def find(self, name: str) -> type:
        """The class of that name; raises ValueError if another one was put in its place."""
        kind = getattr(import_module(self.source), name)
        if kind.__module__ != self.source:
            raise ValueError(f"expected transformers' own {name}, got {kind.__module__}.{kind.__qualname__} (model)")
        return kind


@dataclass(frozen=True)
class ModelSpec:
    """A transformers causal language model, taken apart. The modules stay the model's own.

    Their attributes are known to transformers alone, hence Any.
    decoder: the module with embed_tokens, layers, norm and rotary_emb; path: its name in the model. rope_planes:
    head_dim / 2 entries, which position each rotary frequency follows (0 time, 1 height, 2 width); None for
    one-dimensional positions.
    """

    model: Any
    decoder: Any
    classes: Classes
    lm_head: nn.Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context: int
    activation: str
    path: str = "model"
    rope_planes: tuple[int, ...] | None = None
    vision: VisionSpec | None = None

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)


def text_spec(model: Any, decoder: Any, config: Any, classes: Classes, **extra: Any) -> ModelSpec:
    """ModelSpec from the config fields that every supported family shares."""
    sliding = [i for i, kind in enumerate(getattr(config, "layer_types", None) or []) if kind != "full_attention"]
    if sliding:
        raise ValueError(
            f"expected full attention in every layer, got {config.layer_types[sliding[0]]} (layer {sliding[0]})"
        )
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in STATIC_ROPE:
        raise ValueError(f"expected rope_type one of {STATIC_ROPE}, got {rope_type!r} (rope_parameters)")
    if not isinstance(model.lm_head, nn.Linear):
        raise ValueError(f"expected a plain torch.nn.Linear, got {type(model.lm_head).__name__} (lm_head)")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    planes = extra.get("rope_planes")
    if planes is not None and len(planes) != head_dim // 2:
        raise ValueError(f"expected parts that sum to {head_dim // 2}, got {len(planes)} (mrope_section)")
    return ModelSpec(
        model=model,
        decoder=decoder,
        classes=classes,
        lm_head=model.lm_head,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=model.lm_head.weight.shape[0],
        max_context=config.max_position_embeddings,
        activation=config.hidden_act,
        **extra,
    )
