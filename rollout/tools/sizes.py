"""Models as sizes: how many parameters of which part, and the dimensions that memory and time follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from foveate.rollout import models
from foveate.rollout.checks import require


@dataclass(frozen=True)
class TowerSizes:
    """A vision tower of `depth` blocks of this width. merge: patches merged into a token."""

    depth: int
    width: int
    intermediate: int
    parameters: int
    merge: int
    deepstack: int


@dataclass(frozen=True)
class Sizes:
    """A model. parameters: all, tied ones once, in `tensors` tensors; layers_parameters: of the decoder layers."""

    parameters: int
    tensors: int
    layers_parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    qk_norm: bool = False
    tower: TowerSizes | None = None

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Counted; the model may be on the meta device. Raises ValueError for a family that is not supported."""
        spec = models.describe(model)
        config, own = model.config.get_text_config(), list(model.parameters())
        layers = sum(p.numel() for p in spec.decoder.layers.parameters())
        tower = None
        if spec.vision is not None:
            vision = model.config.vision_config
            width = getattr(vision, "embed_dim", vision.hidden_size)
            tower = TowerSizes(
                depth=vision.depth,
                width=width,
                intermediate=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
                parameters=sum(p.numel() for p in spec.vision.tower.parameters()),
                merge=spec.vision.merge_size**2,
                deepstack=spec.vision.num_deepstack,
            )
        return cls(
            parameters=sum(p.numel() for p in own),
            tensors=len(own),
            layers_parameters=layers,
            layers=spec.num_layers,
            hidden=spec.hidden_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate=config.intermediate_size,
            vocab=spec.vocab_size,
            qk_norm=hasattr(spec.decoder.layers[0].self_attn, "q_norm"),
            tower=tower,
        )


def _qwen2_5_vl(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tower: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text: dict[str, Any] = dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    text |= dict(intermediate_size=intermediate, vocab_size=vocab, rope_parameters=rope)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=tower, num_heads=16, out_hidden_size=hidden)
    tied = hidden == 2048  # the smallest alone
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return Qwen2_5_VLForConditionalGeneration(config)


SHAPES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "Qwen2.5-VL-3B": lambda: _qwen2_5_vl(2048, 36, 16, 2, 11008, 151936, 3420),
        "Qwen2.5-VL-7B": lambda: _qwen2_5_vl(3584, 28, 28, 4, 18944, 152064, 3420),
        "Qwen2.5-VL-32B": lambda: _qwen2_5_vl(5120, 64, 40, 8, 27648, 152064, 3456),
    }
)


def sizes_of(name: str) -> Sizes:
    """Of one of SHAPES, or of the model whose config.json lies in the folder `name`; no weights are read.

    Raises ValueError for what is neither, and for a family that is not supported.
    """
    folder = Path(name)
    known = name in SHAPES or (folder / "config.json").is_file()
    require(known, f"one of {tuple(SHAPES)} or a folder with a config.json", name, "--model")
    with torch.device("meta"):
        model = SHAPES[name]() if name in SHAPES else _load(folder)
    model.tie_weights()
    return Sizes.of(model)


def _load(folder: Path) -> Any:
    import transformers as hf

    config = hf.AutoConfig.from_pretrained(folder)
    kind = hf.AutoModelForImageTextToText if hasattr(config, "vision_config") else hf.AutoModelForCausalLM
    return kind.from_config(config)
