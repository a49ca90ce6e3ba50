"""The model of the demo: a Qwen2.5-VL of 1.3 million parameters and a tokenizer whose tokens are words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from foveate.rollout.demo.scenes import CANVAS, PLACES, QUESTIONS
from foveate.rollout.processor import Processor
from foveate.rollout.testing import SPECIAL

MARKS = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", ",")
NUMBERS = tuple(str(number) for number in range(37))  # four nines are 36
_QUESTION_WORDS = dict.fromkeys(word for question in QUESTIONS.values() for word in question.split())
WORDS = tuple(dict.fromkeys((*SPECIAL, "user", "assistant", *MARKS, *PLACES, *_QUESTION_WORDS, *NUMBERS)))
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} "
    "{% if m.content is string %}{{ m.content }} {% else %}{% for item in m.content %}"
    "{% if item.type == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ item.text }} {% endif %}"
    "{% endfor %}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def make_processor() -> Processor:
    """The tokenizer (one token a word, words stand between spaces) and transformers' image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # Without an unknown word the vocabulary is closed: what it does not hold is lost at once and seen by the tests.
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return Processor(tokenizer, Qwen2VLImageProcessorPil(min_pixels=CANVAS**2, max_pixels=CANVAS**2))


def make_model(seed: int) -> nn.Module:
    """A random Qwen2.5-VL for CANVAS x CANVAS images, float32, the same for the same seed."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {f"{name}_token_id": WORDS.index(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{end}_token_id": WORDS.index(f"<|vision_{end}|>") for end in ("start", "end")}
    config = Qwen2_5_VLConfig(
        text_config=_text_config(), vision_config=_vision_config(), tie_word_embeddings=True, **ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).float().eval()


def _text_config() -> dict[str, Any]:
    return dict(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        # With the usual 0.02 a model this small stays blind for hundreds of steps.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=WORDS.index("<|im_end|>"),
        pad_token_id=WORDS.index("<|endoftext|>"),
    )


def _vision_config() -> dict[str, Any]:
    depth = 2
    return dict(
        depth=depth,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        window_size=CANVAS,
        fullatt_block_indexes=list(range(depth)),
        out_hidden_size=128,
        initializer_range=0.06,
    )
