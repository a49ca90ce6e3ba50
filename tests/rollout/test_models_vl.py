"""The vision-language families against transformers, and faults in what only they have: planes, deepstack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from foveate.rollout import runner
from foveate.rollout.config import SamplingParams
from foveate.rollout.models import decoder, describe
from foveate.rollout.models.decoder import Decoder
from foveate.rollout.models.qwen_vl import consecutive_planes, interleaved_planes
from foveate.rollout.policy import Sample, policy_logprobs
from foveate.rollout.testing import VISION_FAMILIES, tiny_model
from foveate.rollout.types import Request

ONE_KV_HEAD = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
LINEAR_ROPE = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
THREE_LEVELS = {"depth": 4, "deepstack_visual_indexes": [0, 1, 3]}
MODELS = {
    "qwen2_vl": ("qwen2_vl", {}),
    "qwen2_vl-one-kv-head-tied": ("qwen2_vl", ONE_KV_HEAD),
    "qwen2_vl-linear-rope": (
        "qwen2_vl",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    ),
    "qwen3_vl": ("qwen3_vl", {}),
    "qwen3_vl-one-kv-head-tied": ("qwen3_vl", ONE_KV_HEAD | {"head_dim": 20, "attention_bias": True}),
    "qwen3_vl-three-levels-of-five": ("qwen3_vl", {"num_hidden_layers": 5, "vision": THREE_LEVELS}),
    "qwen3_vl-more-levels-than-layers": ("qwen3_vl", {"num_hidden_layers": 2, "vision": THREE_LEVELS}),
    "qwen3_vl-no-level": ("qwen3_vl", {"vision": {"deepstack_visual_indexes": []}}),
}


@pytest.fixture(scope="module")
def models():
    return {family: tiny_model(family, seed=7) for family in VISION_FAMILIES}


@pytest.fixture
def mixed_requests(chat, picture):
    """(n, **sampling) -> text prompts, and prompts with one to three images of several aspects, some of them shared."""

    def make(n: int, **sampling) -> list[Request]:
        wide, tall, small = picture(56, 140), picture(168, 56), picture(84, 84)
        return [
            Request("hi", n=n, sampling=SamplingParams(**sampling)),
            chat("What is it?", [wide], n=n, **sampling),
            chat("How many are there?", n=n, **sampling),
            chat("Which of these is larger, say it.", [tall, small, wide], n=n, **sampling),
            chat("And this?", [tall.copy()], system=None, n=n, **sampling),
        ]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logprobs(
    name, make_engine, mixed_requests, assert_greedy, assert_logprobs, banned_by_default
):
    family, fields = MODELS[name]
    model = tiny_model(family, seed=sorted(MODELS).index(name), **fields)
    engine = make_engine(model)
    groups = engine.generate(mixed_requests(2, temperature=0, max_tokens=20))
    assert_greedy(model, groups, banned_by_default(engine))
    assert_logprobs(model, groups)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_sampled_logprobs(family, fuse, make_engine, models, mixed_requests, assert_logprobs):
    engine = make_engine(models[family], page_size=5, fuse=fuse)
    groups = engine.generate(mixed_requests(3, temperature=1.3, max_tokens=17))
    assert_logprobs(models[family], groups)
    assert len({tuple(r.token_ids.tolist()) for group in groups for r in group.rollouts}) > len(groups)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_prefill_budget_changes_nothing(
    family, max_batch_tokens, make_engine, models, mixed_requests, assert_logprobs
):
    """Budgets that end within an image, where the engine cuts prompts."""
    requests = mixed_requests(2, max_tokens=9, seed=4)
    groups = make_engine(models[family], max_batch_tokens=max_batch_tokens).generate(requests)
    assert_logprobs(models[family], groups)
    for group, other in zip(groups, make_engine(models[family]).generate(requests), strict=True):
        assert [r.token_ids.tolist() for r in group.rollouts] == [r.token_ids.tolist() for r in other.rollouts]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_image_from_the_cache_gives_the_same_tokens(family, make_engine, models, mixed_requests):
    engine = make_engine(models[family])
    requests = mixed_requests(2, max_tokens=9, seed=4)
    first, second = engine.generate(requests), engine.generate(requests)
    assert (engine.stats()["images_encoded"], engine.stats()["image_hits"]) == (3, 3)
    for group, again in zip(first, second, strict=True):
        for rollout, other in zip(group.rollouts, again.rollouts, strict=True):
            assert torch.equal(rollout.token_ids, other.token_ids)
            assert torch.equal(rollout.logprobs, other.logprobs)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_image_that_is_cut_is_encoded_once(family, make_engine, models, chat, picture, assert_logprobs):
    """A prompt that enters token by token, with a cache that keeps nothing longer than it is in use."""
    engine = make_engine(models[family], vision_cache_memory=0, max_batch_tokens=1)
    pictures = [picture(56, 140), picture(84, 84), picture(56, 140)]
    groups = engine.generate([chat("Which one?", pictures, n=2, max_tokens=5)])
    assert_logprobs(models[family], groups)
    stats = engine.stats()
    assert (stats["images_encoded"], stats["image_evictions"], stats["image_bytes"]) == (2, 2, 0)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_trainers_forward(family, make_engine, models, mixed_requests):
    """Its log-probs are the engine's; every parameter of the tower that the engine's numbers depend on learns."""
    model = models[family]
    groups = make_engine(model).generate(mixed_requests(2, max_tokens=12, seed=3))
    samples = [Sample(group, rollout) for group in groups for rollout in group.rollouts]
    drawn = policy_logprobs(describe(model), samples).logprobs
    torch.testing.assert_close(drawn, torch.cat([s.rollout.logprobs for s in samples]), atol=5e-5, rtol=0)
    tower = dict(model.model.visual.named_parameters())
    for name, grad in zip(tower, torch.autograd.grad(drawn.sum(), tower.values()), strict=True):
        assert grad.abs().max() > 1e-4, name


@pytest.mark.parametrize("head_dim", [10, 16, 22, 128])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_planes_are_the_models(family, head_dim):
    """cos and sin of positions that differ in every plane, as the module's own rotary embedding gives them."""
    model = tiny_model(family, head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1)
    spec = describe(model)
    positions = torch.arange(0, 7 * 3 * 5, 7).view(3, 5)
    own = Decoder.__new__(Decoder)
    own.spec, own.rope_planes, own.deterministic = spec, torch.tensor(spec.rope_planes), False
    cos, sin = own.rotary(positions, torch.float32)
    expected_cos, expected_sin = spec.decoder.rotary_emb(torch.zeros(1), positions[:, None])
    if expected_cos.dim() == 4:
        pytest.skip("older releases of transformers pick the planes within attention")
    assert torch.equal(cos[:, 0], expected_cos[0])
    assert torch.equal(sin[:, 0].abs(), expected_sin[0].abs())
    assert torch.equal(sin[:, 0, head_dim // 2 :], expected_sin[0, :, head_dim // 2 :])


def test_planes_of_the_released_models():
    assert consecutive_planes((16, 24, 24)) == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert interleaved_planes((24, 20, 20)) == (0, 1, 2) * 20 + (0,) * 4


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_sections_that_do_not_fit_are_refused(family):
    model = tiny_model(family)
    section = [2, 2, 1]
    model.config.text_config.rope_parameters["mrope_section"] = section
    model.model.language_model.rotary_emb.mrope_section = section
    with pytest.raises(ValueError, match=r"expected parts that sum to (4|8), got 5 \(mrope_section\)"):
        describe(model)


Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Patch] = {}


def mutant(patch: Patch) -> Patch:
    MUTANTS[patch.__name__] = patch
    return patch


def _change_deepstack(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """change: (Deepstack) -> Deepstack | None"""
    original = runner.place

    def place(hidden, parts):
        deepstack = original(hidden, parts)
        return None if deepstack is None else change(deepstack)

    monkeypatch.setattr(runner, "place", place)


@mutant
def deepstack_dropped(monkeypatch):
    _change_deepstack(monkeypatch, lambda deepstack: None)


@mutant
def last_level_dropped(monkeypatch):
    _change_deepstack(monkeypatch, lambda d: dataclasses.replace(d, levels=d.levels[:-1]))


@mutant
def one_layer_late(monkeypatch):
    _change_deepstack(monkeypatch, lambda d: dataclasses.replace(d, levels=F.pad(d.levels, (0, 0, 0, 0, 1, 0))))


@mutant
def levels_swapped(monkeypatch):
    _change_deepstack(monkeypatch, lambda d: dataclasses.replace(d, levels=d.levels.flip(0)))


@mutant
def one_row_late(monkeypatch):
    _change_deepstack(monkeypatch, lambda d: dataclasses.replace(d, rows=d.rows + 1))


@mutant
def of_another_image(monkeypatch):
    """The first two images have as many tokens each."""

    def swap(deepstack):
        half = 8
        swapped = torch.cat(
            [deepstack.levels[:, half : 2 * half], deepstack.levels[:, :half], deepstack.levels[:, 2 * half :]], dim=1
        )
        return dataclasses.replace(deepstack, levels=swapped)

    _change_deepstack(monkeypatch, swap)


@mutant
def main_features_again(monkeypatch):
    original = runner.place

    def place(hidden, parts):
        parts = list(parts)
        deepstack = original(hidden, parts)
        if deepstack is None:
            return None
        main = torch.cat([part[:, 0] for _, part in parts])
        return dataclasses.replace(deepstack, levels=main.expand_as(deepstack.levels))

    monkeypatch.setattr(runner, "place", place)


@mutant
def planes_not_interleaved(monkeypatch):
    original = decoder.Decoder.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.rope_planes = self.rope_planes.sort().values

    monkeypatch.setattr(decoder.Decoder, "__init__", init)


@mutant
def one_plane_only(monkeypatch):
    original = decoder.Decoder.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.rope_planes = None

    monkeypatch.setattr(decoder.Decoder, "__init__", init)


@pytest.fixture
def assert_parity(models, make_engine, chat, picture, assert_greedy, assert_logprobs, banned_by_default):
    """(temperature): Qwen3-VL on a batch in which every fault above can show."""

    def check(temperature: float) -> None:
        engine = make_engine(models["qwen3_vl"])
        engine._runner.kv_pool.zero_()
        sampling = {"temperature": temperature, "max_tokens": 12, "ignore_eos": True, "seed": 11}
        pictures = [picture(56, 112, 1), picture(56, 112, 2), picture(140, 56, 3)]
        requests = [
            chat("Which of these is larger?", pictures, n=2, **sampling),
            Request("Plain text.", sampling=SamplingParams(**sampling)),
        ]
        groups = engine.generate(requests, strict=True)
        if temperature == 0:
            assert_greedy(engine.model, groups, banned_by_default(engine))
        assert_logprobs(engine.model, groups)

    return check


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_mutant(temperature, assert_parity):
    assert_parity(temperature)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, temperature, assert_parity, monkeypatch):
    MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        assert_parity(temperature)
