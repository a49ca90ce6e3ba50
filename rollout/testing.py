"""Tiny random models and a byte-level tokenizer, for tests, benchmarks and examples that need no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from foveate.rollout.processor import Processor

FAMILIES = ("llama", "qwen2", "qwen3", "qwen2_5_vl")
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

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=special_id("<|im_end|>"),
        pad_token_id=special_id("<|endoftext|>"),
    )
    if family == "qwen3":
        fields["head_dim"] = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen2_5_vl":
            model = hf.Qwen2_5_VLForConditionalGeneration(_vl_config(fields, rope, vision or {}, text))
        else:
            name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
            config = getattr(hf, f"{name}Config")(**{**fields, **text})
            model = getattr(hf, f"{name}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a dropped term
                nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.to(dtype).eval()


def _vl_config(fields: dict, rope: dict, vision: dict, text: dict):
    import transformers as hf

    sizes = {**fields, **text}
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    text_fields = {**fields, "rope_parameters": {**rope, "mrope_section": _mrope_section(head_dim)}, **text}
    vision_fields = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=14,
        spatial_merge_size=2,
        window_size=56,
        fullatt_block_indexes=[1],
        out_hidden_size=text_fields["hidden_size"],
        initializer_range=0.2,
    )
    ids = {f"{name}_token_id": special_id(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{end}_token_id": special_id(f"<|vision_{end}|>") for end in ("start", "end")}
    return hf.Qwen2_5_VLConfig(
        text_config=text_fields,
        vision_config={**vision_fields, **vision},
        tie_word_embeddings=text_fields["tie_word_embeddings"],
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
