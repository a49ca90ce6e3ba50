"""Tiny random models and a byte-level tokenizer, for tests, benchmarks and examples that need no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from foveate.rollout.processor import Processor

TEXT_FAMILIES = ("llama", "qwen2", "qwen3")
VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = TEXT_FAMILIES + VISION_FAMILIES
NAMES = ("Llama", "Qwen2", "Qwen3", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL")  # in transformers' classes
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIRST_SPECIAL = 256  # ids below are bytes
VOCAB_SIZE = 271  # a few ids beyond the tokenizer, as real checkpoints have
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for i in m.content %}"
    "{% if i.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ i.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def special_id(token: str) -> int:
    """Id of one of the SPECIAL tokens."""
    return FIRST_SPECIAL + SPECIAL.index(token)


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, vision: dict | None = None, **text: Any
) -> nn.Module:
    """A random model of a family with unusual sizes; `text` and `vision` override fields of its configs.

    Weights are drawn with standard deviation 0.2: with the usual 0.02 wrong positions leave greedy tokens equal.
    """
    import transformers as hf

    name = NAMES[FAMILIES.index(family)]
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=special_id("<|im_end|>"),
        pad_token_id=special_id("<|endoftext|>"),
    )
    if family in ("qwen3", "qwen3_vl"):
        fields["head_dim"] = 16
    if family == "qwen3_vl":  # what is added to images after the last layer is never read
        fields["num_hidden_layers"] = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config_class = getattr(hf, f"{name}Config")
        if family in VISION_FAMILIES:
            config = _vl_config(config_class, {**fields, **text}, vision or {})
            model = getattr(hf, f"{name}ForConditionalGeneration")(config)
        else:
            model = getattr(hf, f"{name}ForCausalLM")(config_class(**{**fields, **text}))
        _randomise(model)
    return model.to(dtype).eval()


def _randomise(model: nn.Module) -> None:
    """Zero biases and norms of one would hide a dropped term."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)


def _vl_config(config: Any, fields: dict, vision: dict) -> Any:
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    rope = {"mrope_section": _mrope_section(head_dim), **fields["rope_parameters"]}
    own = {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": fields["hidden_size"], "mlp_ratio": 2},
        "qwen2_5_vl": {"window_size": 56, "fullatt_block_indexes": [1]},
        "qwen3_vl": {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]},
    }[config.model_type]
    sizes = dict(depth=2, num_heads=2, patch_size=14, spatial_merge_size=2, initializer_range=0.2)
    if config.model_type != "qwen2_vl":
        sizes |= dict(hidden_size=32, intermediate_size=48, out_hidden_size=fields["hidden_size"])
    ids = {f"{name}_token_id": special_id(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{end}_token_id": special_id(f"<|vision_{end}|>") for end in ("start", "end")}
    return config(
        text_config={**fields, "rope_parameters": rope},
        vision_config={**sizes, **own, **vision},
        tie_word_embeddings=fields["tie_word_embeddings"],
        **ids,
    )


def _mrope_section(head_dim: int) -> list[int]:
    """Uneven parts of head_dim / 2 for time, height and width."""
    half = head_dim // 2
    height = (half - half // 4) // 2
    return [half // 4, height, half - half // 4 - height]


def tiny_processor() -> Processor:
    """Byte-level tokenizer with Qwen's special tokens and chat template, and the PIL image processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return Processor(tokenizer, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280))
