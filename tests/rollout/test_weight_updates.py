"""Weights given by name: checked whole before the first is copied, found under the names of all generations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request


@pytest.fixture
def requests(chat, picture):
    """(model) -> greedy and sampled requests, with an image for a VLM."""

    def make(model: nn.Module) -> list[Request]:
        images = [picture(84, 56)] if model.config.model_type == "qwen2_5_vl" else []
        greedy = SamplingParams(temperature=0, max_tokens=8)
        return [chat("See?", images, n=2, max_tokens=8, seed=1), Request("plain", sampling=greedy)]

    return make


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(now[name], tensor), name


def assert_same(groups, others) -> None:
    """Equal tokens, and log-probs but for the rounding of another memory alignment."""
    for group, other in zip(groups, others, strict=True):
        for rollout, twin in zip(group.rollouts, other.rollouts, strict=True):
            assert rollout.token_ids.tolist() == twin.token_ids.tolist()
            torch.testing.assert_close(rollout.logprobs, twin.logprobs, atol=5e-5, rtol=0)


BAD_WEIGHTS = {
    "unknown": (lambda w: w | {"model.nothing.weight": torch.zeros(1)}, "'model.nothing.weight'"),
    "missing": (lambda w: dict(list(w.items())[3:]), r"none for .*model.visual.patch_embed.*missing: 3"),
    "shape": (
        lambda w: w | {"lm_head.weight": torch.zeros(271, 47)},
        r"\[271, 48\], got .*\[271, 47\] on cpu \(lm_head.weight\)",
    ),
    "dtype": (lambda w: w | {"lm_head.weight": torch.zeros(271, 48).int()}, r"floating .*torch.int32.*lm_head.weight"),
    "twice": (
        lambda w: w | {"visual.merger.ln_q.weight": torch.zeros(32)},
        r"each parameter once, got .*visual.merger.ln_q.weight' twice",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_change_nothing(case, make_engine, requests):
    model = tiny_model("qwen2_5_vl")
    engine = make_engine(model)
    before, groups = state(model), engine.generate(requests(model)[1:])
    engine.add_request(requests(model)[0])
    change, message = BAD_WEIGHTS[case]
    names = dict(tiny_model("qwen2_5_vl", seed=5).named_parameters())
    with pytest.raises(ValueError, match=message):
        engine.update_weights(change(names), in_flight="abort")
    assert_state(model, before)
    assert (engine.weight_version, engine.stats()["waiting"]) == (0, 1)
    assert_same(engine.generate(requests(model)[1:]), groups)


def test_tied_names_must_agree(make_engine):
    model = tiny_model("llama", tie_word_embeddings=True)
    engine = make_engine(model)
    new = tiny_model("llama", seed=5, tie_word_embeddings=True).state_dict()
    engine.update_weights(new | {"lm_head.weight": new["lm_head.weight"].clone()})
    assert_state(model, new)
    with pytest.raises(ValueError, match=r"tied parameters.*embed_tokens.weight, lm_head.weight"):
        engine.update_weights(new | {"lm_head.weight": new["lm_head.weight"] + 1})
    del new["lm_head.weight"]
    engine.update_weights(new)
    assert engine.weight_version == 2


OLD_NAMES = {
    "5.x": (),
    "4.51": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "4.52 text": (("model.language_model.", "language_model.model."), ("model.visual.", "visual.")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("names", OLD_NAMES)
def test_weights_by_the_names_of_all_generations(names, dtype, make_engine, requests):
    model, source = tiny_model("qwen2_5_vl"), tiny_model("qwen2_5_vl", seed=5).to(dtype)
    engine = make_engine(model)
    engine.generate(requests(model))
    pairs = []
    for name, parameter in source.named_parameters():
        renamed = next((new + name[len(old) :] for old, new in OLD_NAMES[names] if name.startswith(old)), name)
        pairs.append((renamed, parameter))
    engine.update_weights(iter(pairs))
    assert_state(model, {name: tensor.float() for name, tensor in source.state_dict().items()})
    assert_same(engine.generate(requests(model)), make_engine(copy.deepcopy(model)).generate(requests(model)))


def test_partial_weights(make_engine, requests):
    model = tiny_model("qwen3")
    engine = make_engine(model)
    expected = state(model)
    expected["model.layers.1.self_attn.k_proj.weight"] = torch.randn(32, 48)
    engine.update_weights(
        {"model.layers.1.self_attn.k_proj.weight": expected["model.layers.1.self_attn.k_proj.weight"]}, partial=True
    )
    assert_state(model, expected)
    assert_same(engine.generate(requests(model)), make_engine(copy.deepcopy(model)).generate(requests(model)))
