"""Deterministic mode: what must not change a single bit, on models large enough for matrix products to round anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from foveate.kernels import layers
from foveate.kernels.paged_attention import deterministic, reference
from foveate.rollout import runner
from foveate.rollout.config import EngineConfig
from foveate.rollout.engine import Engine
from foveate.rollout.models import decoder
from foveate.rollout.testing import FAMILIES, tiny_model, tiny_processor
from foveate.rollout.types import Request, RolloutGroup
from foveate.rollout.vision import VisionEncoder

FAST = ("llama", "qwen3", "qwen2_5_vl")
FIELDS = ("token_ids", "logprobs", "log_kept", "entropy")
SIZES = dict(hidden_size=192, intermediate_size=328, num_hidden_layers=2, num_attention_heads=6, initializer_range=0.1)
TOWER = {
    "qwen2_vl": dict(embed_dim=96, num_heads=4),
    "qwen2_5_vl": dict(hidden_size=96, num_heads=4, intermediate_size=168),
    "qwen3_vl": dict(hidden_size=96, num_heads=4, intermediate_size=168),
}
families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in FAMILIES]
)

_made: dict[str, tuple[torch.nn.Module, list[Request], dict[bool, list[RolloutGroup]]]] = {}


@pytest.fixture
def case(chat, picture) -> Callable:
    """(family) -> model, requests, their groups by mode.

    The requests share a system message and images; the first prompt has more tokens than a chunk of keys; sizes leave
    tails in vector registers.
    """

    def make(family: str):
        if family not in _made:
            model = tiny_model(family, vision=TOWER.get(family), **SIZES)
            pictures = [picture(56, 112, 1), picture(84, 84, 2)] if family in TOWER else []
            values = {"ignore_eos": True, "temperature": 1.1, "max_tokens": 12}
            requests = [
                chat("Which of these is larger? " * 24, pictures, n=16, seed=1, top_p=0.95, **values),
                chat("And this one?", pictures[1:], n=3, seed=2, **values),
                chat("Hm.", pictures[:1], n=1, **values | {"temperature": 0, "max_tokens": 30}),
            ]
            _made[family] = model, requests, {}
        model, requests, groups = _made[family]
        for mode in {True, False} - groups.keys():
            groups[mode] = engine_on(model, mode).generate(requests, strict=True)
        return model, requests, groups

    return make


def engine_on(model: torch.nn.Module, deterministic: bool, pages: int | None = None, **config) -> Engine:
    def make(kv_memory: int) -> Engine:
        fields = {"page_size": 8, "kv_memory": kv_memory, "deterministic": deterministic, **config}
        return Engine(model, tiny_processor(), EngineConfig(**fields))

    engine = make(1 << 23)
    if pages is None:
        return engine
    report = engine.memory_report()
    return make(pages * int(report["kv_capacity"] // report["kv_pages"]))


def same_bits(groups: list[RolloutGroup], expected: list[RolloutGroup]) -> bool:
    """Whether all tokens, log-probs, kept masses and entropies are equal; samples beyond a smaller n are left out."""
    pairs = [
        (rollout, twin)
        for group, other in zip(groups, expected, strict=True)
        for rollout, twin in zip(group.rollouts, other.rollouts, strict=False)
    ]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in FIELDS)


def alone(model, requests, mode):
    return [engine_on(model, mode).generate([request], strict=True)[0] for request in requests]


def one_sample(model, requests, mode):
    requests = [dataclasses.replace(request, n=1) for request in requests]
    return engine_on(model, mode).generate(requests, strict=True)


def any_order(model, requests, mode):
    """Only moves rows within a product, which alone changes no bit in either mode."""
    return engine_on(model, mode).generate(requests[::-1], strict=True)[::-1]


def small_chunks(model, requests, mode):
    return engine_on(model, mode, max_batch_tokens=37).generate(requests, strict=True)


def beside_later_ones(model, requests, mode):
    """Every request enters while those before it decode."""
    engine = engine_on(model, mode)
    found: list[RolloutGroup] = []
    for request in requests:
        engine.add_request(request)
        for _ in range(3):
            found += engine.step()
    while engine.has_unfinished:
        found += engine.step()
    return sorted(found, key=lambda group: group.request_id)


def after_preemption(model, requests, mode):
    engine = engine_on(model, mode, pages=130, max_batch_tokens=61)
    groups = engine.generate(requests, strict=True)
    assert engine.stats()["preempted"] > 0
    return groups


def other_pages(model, requests, mode):
    """As `any_order`: other pages must not change the chunks of keys."""
    return engine_on(model, mode, page_size=24, fuse=False).generate(requests, strict=True)


WAYS = [alone, one_sample, small_chunks, beside_later_ones, after_preemption]


@families
@pytest.mark.parametrize("way", [*WAYS, any_order, other_pages], ids=lambda way: way.__name__)
def test_no_bit_depends_on(way, family, case):
    model, requests, groups = case(family)
    assert same_bits(way(model, requests, True), groups[True])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_bits_do_depend_without_it_on(way, case):
    """Else the test above would show nothing."""
    model, requests, groups = case("qwen2_5_vl")
    assert not same_bits(way(model, requests, False), groups[False])


def without_row_blocks(patch):
    patch.setattr(decoder, "linear", lambda *args, row_block: layers.linear(*args))


def without_the_chunk_rule(patch):
    patch.setattr(deterministic, "attend", reference.attend)


def with_scalar_tails(patch):
    patch.setattr(decoder, "elementwise", lambda function, x: function(x))


def with_images_together(patch):
    patch.setattr(runner, "VisionEncoder", lambda spec, dtype, size, *_: VisionEncoder(spec, dtype, size))


@pytest.mark.parametrize(
    "fault",
    [without_row_blocks, without_the_chunk_rule, with_scalar_tails, with_images_together],
    ids=lambda fault: fault.__name__,
)
def test_every_part_is_needed(fault, case, chat, picture, monkeypatch):
    model, requests, _ = case("qwen2_5_vl")
    requests = [*requests, chat("What?", [picture(56, 56, 3)], max_tokens=3)]
    fault(monkeypatch)
    together = engine_on(model, True, fuse=False).generate(requests, strict=True)
    separate = [engine_on(model, True, fuse=False).generate([request], strict=True)[0] for request in requests]
    assert not same_bits(separate, together)


@families
@pytest.mark.parametrize("budget", [8192, 53])
def test_scores_are_the_rollouts_bits(budget, family, case):
    model, _, groups = case(family)
    scores = engine_on(model, True, max_batch_tokens=budget).score(groups[True])
    assert same_logprobs(scores, groups[True])


def same_logprobs(scores: list[list[torch.Tensor]], groups: list[RolloutGroup]) -> bool:
    pairs = [
        pair for found, group in zip(scores, groups, strict=True) for pair in zip(found, group.rollouts, strict=True)
    ]
    return all(torch.equal(ours, rollout.logprobs) for ours, rollout in pairs)


def test_scores_are_other_bits_without_it(case):
    model, _, groups = case("qwen2_5_vl")
    assert not same_logprobs(engine_on(model, False).score(groups[False]), groups[False])


@families
def test_values_are_those_of_the_default_mode(family, case, assert_logprobs):
    model, _, groups = case(family)
    assert_logprobs(model, groups[True])
    assert not same_bits(groups[True], groups[False])  # the modes do not run the same code


def test_penalised_scores_are_the_rollouts_bits(case):
    model, (_, request, _), _ = case("llama")
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": {65: 1.0}}
    request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **penalties))
    engine = engine_on(model, True)
    groups = engine.generate([request], strict=True)
    assert same_logprobs(engine.score(groups), groups)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"backend": "reference"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("family", FAST)
def test_other_backends_and_dtypes(family, config, case):
    model, requests, _ = case(family)
    groups = engine_on(model, True, **config).generate(requests, strict=True)
    engine = engine_on(model, True, max_batch_tokens=37, **config)
    assert same_bits(engine.generate(requests[::-1], strict=True)[::-1], groups)
    assert same_logprobs(engine.score(groups), groups)


@pytest.mark.slow
def test_two_threads(case):
    model, requests, _ = case("qwen2_5_vl")
    torch.set_num_threads(2)
    groups = engine_on(model, True).generate(requests, strict=True)
    engine = engine_on(model, True, max_batch_tokens=37)
    assert same_bits(engine.generate(requests[::-1], strict=True)[::-1], groups)
    assert same_logprobs(engine.score(groups), groups)


def test_only_on_the_cpu(monkeypatch):
    model = tiny_model("llama")
    meta = torch.nn.Linear(48, 271, bias=False, device="meta")
    monkeypatch.setattr(model, "lm_head", meta)
    with pytest.raises(NotImplementedError, match=r"EngineConfig.deterministic is for the CPU .* got meta"):
        Engine(model, None, EngineConfig(deterministic=True))
