"""Real weights: greedy tokens of transformers' `generate`, log-probs as near as transformers is to itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.types import Request
from foveate.testing import real_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(real_weights.MISSING), reason=f"needs {real_weights.MISSING}: {real_weights.INSTALL}"),
]
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to ten.",
    "Why is the sky blue? Answer in two sentences.",
    "Translate 'good morning' into Spanish.",
    "A triangle has sides 3, 4 and 5. What is its area?",
    "Name three fruits and their colours.",
    "def add(a, b):",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def model():
    return real_weights.smollm2()


@pytest.fixture(scope="module")
def groups(model):
    """Eight prompts, all in one batch, through chunks and a pool that cannot hold them all at once."""
    processor = SimpleNamespace(tokenizer=real_weights.smollm2_tokenizer(), image_processor=None)
    config = EngineConfig(page_size=16, kv_memory=24 << 20, max_batch_tokens=48)
    engine = Engine(model, processor, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [Request([{"role": "user", "content": text}], sampling=sampling) for text in QUESTIONS]
    groups = engine.generate(requests, strict=True)
    assert engine.stats()["preempted"] > 0
    return groups


def forward(model, group) -> torch.Tensor:
    """float32 [T, vocab] log-softmax of a plain forward over prompt and completion."""
    ids = torch.cat([group.prompt_ids, group.rollouts[0].token_ids])[None]
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, len(group.prompt_ids) - 1 : -1].float().log_softmax(-1)


def cached(model, group) -> torch.Tensor:
    """The same, token by token over transformers' own cache."""
    steps, cache = [], None
    ids = group.prompt_ids[None]
    with torch.no_grad():
        for token in group.rollouts[0].token_ids:
            out = model(ids, past_key_values=cache, use_cache=True)
            steps.append(out.logits[0, -1].float().log_softmax(-1))
            cache, ids = out.past_key_values, token.view(1, 1)
    return torch.stack(steps)


def test_greedy_tokens_and_logprobs(model, groups):
    """A log-prob may differ from a forward's by twice the largest difference among transformers' own ways."""
    spreads, differences, gaps = [], [], []
    for group in groups:
        (rollout,) = group.rollouts
        chosen = rollout.token_ids[:, None]
        whole, stepwise = forward(model, group), cached(model, group)
        model.set_attn_implementation("eager")
        eager = forward(model, group)
        model.set_attn_implementation("sdpa")
        ways = torch.cat([way.gather(1, chosen) for way in (whole, stepwise, eager)], dim=1)
        spreads.append((ways.amax(1) - ways.amin(1)).max())
        differences.append((rollout.logprobs - ways[:, 0]).abs().max())
        best = whole.topk(2, dim=-1)
        gaps.append((best.values[:, 0] - best.values[:, 1])[best.indices[:, 0] != rollout.token_ids])
    tolerance = 2 * float(max(spreads))
    assert tolerance < 1e-3, "the ways agree, so that the comparison says something"
    assert float(max(differences)) <= tolerance, (differences, spreads)
    assert (torch.cat(gaps) <= tolerance).all(), "another token only where two are as good"


def test_greedy_tokens_are_those_of_generate(model, groups):
    for group in groups:
        ids = group.prompt_ids[None]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=model.config.vocab_size,
        )  # fmt: skip
        assert out[0, ids.shape[1] :].tolist() == group.rollouts[0].token_ids.tolist()


def test_answers_are_language(groups):
    """The chat template, the tokenizer and the weights belong together."""
    assert "Paris" in groups[0].rollouts[0].text
