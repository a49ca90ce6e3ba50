"""Independent truth for the engine's tests: transformers' own `generate` and plain forward, and small inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.testing import tiny_model, tiny_processor
from foveate.rollout.types import Request, Rollout, RolloutGroup

# On tiny fp32 models transformers differs from its own cached decode by 2e-5, wrong positions by more than 2e-4.
TOLERANCE = 5e-5
KV_MEMORY = 1 << 22


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture
def make_engine(processor) -> Callable[..., Engine]:
    """make_engine(family or model, **EngineConfig fields): an engine on a tiny model, with little KV memory."""

    def make(model: str | nn.Module, **config: Any) -> Engine:
        model = tiny_model(model) if isinstance(model, str) else model
        config.setdefault("page_size", 8)
        return Engine(model, processor, EngineConfig(**{"kv_memory": KV_MEMORY, **config}))

    return make


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """picture(height, width, seed) -> uint8 [height, width, 3]"""

    def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return draw


@pytest.fixture
def chat() -> Callable[..., Request]:
    """chat(text, images, system=..., **SamplingParams fields and n): a request of chat messages."""

    def make(text: str, images=(), system: str | None = "Look well.", n: int = 1, **sampling: Any) -> Request:
        user = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return Request(messages, images=images, n=n, sampling=SamplingParams(**sampling))

    return make


def _inputs(model: nn.Module, group: RolloutGroup, completion: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a trainer hands to the module: ids, mask, and the images' inputs where there are images."""
    ids = torch.cat([group.prompt_ids, completion])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if group.pixel_values is not None:
        inputs |= {"pixel_values": group.pixel_values, "image_grid_thw": group.image_grid_thw}
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # a `generate` before leaves its own behind
    return inputs


def _logits(model: nn.Module, group: RolloutGroup, rollout: Rollout) -> torch.Tensor:
    inputs = _inputs(model, group, rollout.token_ids)
    with torch.no_grad():
        return model(**inputs).logits[0, len(group.prompt_ids) - 1 : -1].float()


def _generate(model: nn.Module, group: RolloutGroup, max_tokens: int, banned: Iterable[int]) -> torch.Tensor:
    inputs: dict[str, Any] = _inputs(model, group, group.prompt_ids[:0])
    sampling = group.request.sampling
    if sampling.ignore_eos:
        inputs["eos_token_id"] = model.get_output_embeddings().out_features  # an id that is never drawn
    out = model.generate(**inputs, suppress_tokens=sorted(banned) or None, max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(group.prompt_ids) :]


@pytest.fixture
def forward_logits() -> Callable[[nn.Module, RolloutGroup, Rollout], torch.Tensor]:
    """(model, group, rollout) -> float32 [T, vocab] of a plain transformers forward over prompt and completion."""
    return _logits


@pytest.fixture
def assert_logprobs() -> Callable[..., None]:
    """(model, groups): logprobs and entropy of every rollout are those of a plain transformers forward."""

    def check(model: nn.Module, groups: Iterable[RolloutGroup]) -> None:
        for group in groups:
            assert group.error is None
            temperature = group.request.sampling.temperature or 1.0
            for rollout in group.rollouts:
                expected = (_logits(model, group, rollout) / temperature).log_softmax(-1)
                chosen = expected.gather(1, rollout.token_ids[:, None])[:, 0]
                entropy = -(expected.exp() * expected).sum(-1)
                torch.testing.assert_close(rollout.logprobs, chosen, atol=TOLERANCE, rtol=0)
                torch.testing.assert_close(rollout.entropy, entropy, atol=TOLERANCE, rtol=0)

    return check


@pytest.fixture
def assert_greedy() -> Callable[..., None]:
    """(model, groups, banned): every rollout's tokens are those of transformers' greedy `generate`."""

    def check(model: nn.Module, groups: Iterable[RolloutGroup], banned: Iterable[int] = ()) -> None:
        for group in groups:
            assert group.error is None
            expected = _generate(model, group, group.request.sampling.max_tokens, banned)
            for rollout in group.rollouts:
                assert rollout.token_ids.tolist() == expected.tolist()

    return check


@pytest.fixture
def banned_by_default() -> Callable[[Engine], list[int]]:
    """(engine) -> the ids that `ban_vision_tokens` bans: vision pads and what lies beyond the tokenizer."""

    def ids(engine: Engine) -> list[int]:
        config, size = engine.model.config, len(engine._processor.tokenizer)
        names = ("image_token_id", "video_token_id", "vision_start_token_id")
        pads = {getattr(config, name) for name in names if hasattr(config, name)}
        return sorted(pads | set(range(size, engine.spec.vocab_size)))

    return ids
