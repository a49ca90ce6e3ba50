"""What pruners select, against direct numpy formulations of their papers; configurations and their errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import vision_utils

from foveate.rollout.config import PruneConfig
from foveate.rollout.images import content_hash
from foveate.rollout.models import describe
from foveate.rollout.models.tower_attention import raster_order
from foveate.rollout.pruners import PRUNERS, encoder_pruner_of, pruner_of
from foveate.rollout.pruners.protocol import EncodedImage, Kept, TowerAttention
from foveate.rollout.pruning import ENCODER_METHODS, METHODS
from foveate.rollout.selection import kept_features
from foveate.rollout.testing import VISION_FAMILIES, tiny_model

SIZES = [1, 2, 3, 7, 16, 37, 100, 64]


def encoded(size: int, seed: int = 0, hidden: int = 24) -> EncodedImage:
    generator = torch.Generator().manual_seed(1000 * seed + size)
    attention = TowerAttention(torch.rand(size, generator=generator), torch.randn(size, 10, generator=generator))
    name = content_hash(torch.tensor([seed]), torch.tensor([1, size, 1]))
    return EncodedImage(name, torch.randn(size, hidden, generator=generator), attention)


def counts_of(images: list[EncodedImage], keep: float) -> list[int]:
    return [max(1, int(np.floor(keep * len(image.features) + 0.5))) for image in images]


def select(config: PruneConfig, images: list[EncodedImage], counts: list[int]) -> list[Kept]:
    return encoder_pruner_of(config).select(images, counts)


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """uint32 [N, 4] of Philox4x32-10; counter: uint32 [N, 4]."""
    c, k = counter.astype(np.uint64), list(key)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[:, 0], np.uint64(0xCD9E8D57) * c[:, 2]
        high, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        columns = (p1 >> high) ^ c[:, 1] ^ np.uint64(k[0]), p1 & low, (p0 >> high) ^ c[:, 3] ^ np.uint64(k[1]), p0 & low
        c = np.stack(columns, axis=1) & low
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c.astype(np.uint32)


def random_oracle(image: EncodedImage, count: int, config: PruneConfig) -> np.ndarray:
    seed, size = (config.seed or 0) % 2**64, len(image.features)
    counter = np.zeros((size, 4), np.uint32)
    counter[:, 0] = np.arange(size)
    counter[:, 1:] = np.frombuffer(image.content_hash[:12], "<u4")
    words = numpy_philox(counter, (seed % 2**32, seed // 2**32))[:, 0]
    return np.sort(np.lexsort((np.arange(size), -words.astype(np.int64)))[:count])


def strided_oracle(image: EncodedImage, count: int, _: PruneConfig) -> np.ndarray:
    """The token under the middle of each of `count` equal stretches of a line of N tokens."""
    middles = (np.arange(count) + 0.5) * (len(image.features) / count)
    return np.floor(middles + 1e-9).astype(int)


def visionzip_oracle(image: EncodedImage, count: int, config: PruneConfig) -> tuple[np.ndarray, np.ndarray]:
    """-> kept tokens, their features: the authors' steps with one-hot matrices, then raster order."""
    scores, keys, hidden = (x.double().numpy() for x in (image.attention.scores, image.attention.keys, image.features))
    share = 0.84375 if config.dominant is None else config.dominant
    num_dominant = int(np.floor(share * count + 0.5))
    dominant = np.argsort(-scores, kind="stable")[:num_dominant]
    rest = np.setdiff1d(np.arange(len(scores)), dominant)
    num_contextual = count - num_dominant
    features = {token: hidden[token] for token in dominant}
    if num_contextual:
        units = keys[rest] / np.linalg.norm(keys[rest], axis=1, keepdims=True)
        targets = np.arange(0, len(rest), max(1, len(rest) // num_contextual))[:num_contextual]
        others = np.setdiff1d(np.arange(len(rest)), targets)
        nearest = (units[others] @ units[targets].T).argmax(1) if len(others) else np.zeros(0, int)
        one_hot = np.eye(num_contextual)[nearest]  # [others, contextual]
        sums = one_hot.T @ hidden[rest[others]] / np.maximum(one_hot.sum(0), 1)[:, None]
        features |= {rest[target]: hidden[rest[target]] + sums[i] for i, target in enumerate(targets)}
    kept = np.sort(np.array(list(features)))
    return kept, np.stack([features[token] for token in kept])


def divprune_oracle(image: EncodedImage, count: int, _: PruneConfig) -> np.ndarray:
    x = image.features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - x @ x.T
    chosen = [int(np.sort(distance, axis=0)[1].argmax())]
    while len(chosen) < count:
        nearest = distance[chosen].min(0)
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
    return np.sort(chosen)


ORACLES = {"random": random_oracle, "strided": strided_oracle, "divprune": divprune_oracle}
CONFIGS = [
    PruneConfig("random"),
    PruneConfig("random", seed=-1),
    PruneConfig("random", seed=2**70 + 12345),
    PruneConfig("strided"),
    PruneConfig("divprune"),
    PruneConfig("visionzip"),
    PruneConfig("visionzip", dominant=0.5),
    PruneConfig("visionzip", dominant=0),
    PruneConfig("visionzip", dominant=1),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.seed}-{c.dominant}")


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9])
@configs
def test_selections_are_those_of_the_papers(config, keep):
    images = [encoded(size, seed) for seed in range(3) for size in SIZES if size > 1]
    images = [
        image for image, count in zip(images, counts_of(images, keep), strict=True) if count < len(image.features)
    ]
    counts = counts_of(images, keep)
    for image, count, kept in zip(images, counts, select(config, images, counts), strict=True):
        assert kept.indices.dtype == torch.int32
        assert len(kept.indices) == count
        if config.method == "visionzip":
            indices, features = visionzip_oracle(image, count, config)
            ours = kept_features(image.features[:, None].repeat(1, 2, 1), kept)
            torch.testing.assert_close(ours[:, 0].double(), torch.tensor(features), atol=1e-5, rtol=0)
            assert torch.equal(ours[:, 0], ours[:, 1])  # every level alike
        else:
            indices = ORACLES[config.method](image, count, config)
            assert kept.merge is None
        assert kept.indices.tolist() == indices.tolist()


@configs
def test_a_selection_depends_on_its_image_alone(config):
    """64 images in one call, in another order, and each alone give the same bits."""
    images = [encoded(random.Random(seed).randint(2, 80), seed) for seed in range(64)]
    counts = [max(1, len(image.features) // 3) for image in images]
    together = select(config, images, counts)
    order = random.Random(1).sample(range(64), 64)
    shuffled = select(config, [images[i] for i in order], [counts[i] for i in order])
    for index, kept in enumerate(together):
        (alone,) = select(config, [images[index]], [counts[index]])
        for other in (alone, shuffled[order.index(index)]):
            assert torch.equal(kept.indices, other.indices)
            assert (kept.merge is None) == (other.merge is None)
            if kept.merge is not None:
                for name in ("offsets", "source", "weight"):
                    assert torch.equal(getattr(kept.merge, name), getattr(other.merge, name))


def test_random_draws_are_uniform_and_follow_seed_and_image():
    """Each of 20 tokens is kept in half of 2000 draws, within 5 standard deviations."""
    hits = np.zeros(20)
    images = [encoded(20, seed) for seed in range(2000)]
    for kept in select(PruneConfig("random"), images, [10] * 2000):
        hits[kept.indices.numpy()] += 1
    assert abs(hits - 1000).max() < 5 * (2000 / 4) ** 0.5
    draws = [select(PruneConfig("random", seed=seed), [image], [10])[0] for seed in range(3) for image in images[:2]]
    assert len({tuple(kept.indices.tolist()) for kept in draws}) == 6


def test_equal_scores_keep_the_first():
    image = encoded(12)
    flat = TowerAttention(torch.ones(12), image.attention.keys)
    (kept,) = select(PruneConfig("visionzip", dominant=1), [EncodedImage(b"0" * 16, image.features, flat)], [5])
    assert kept.indices.tolist() == [0, 1, 2, 3, 4]


def tower_truth(model, pixels: torch.Tensor, grid: list[int], monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """(scores [N], keys [N, head_dim]) of one image in raster order, from transformers' dense attention matrices."""
    tower = model.model.visual
    full = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    block = tower.blocks[max(full)].attn
    module = __import__(type(tower).__module__, fromlist=["x"])
    matrices, inputs, eager = [], [], module.eager_attention_forward

    def record(owner, *args, **kwargs):
        out = eager(owner, *args, **kwargs)
        if owner is block:
            matrices.append(out[1][0].double().numpy())  # [heads, patches, patches] of one frame
        return out

    monkeypatch.setattr(module, "eager_attention_forward", record)
    monkeypatch.setattr(tower.config, "_attn_implementation", "eager")
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        tower(pixels, grid_thw=torch.tensor([grid]))
    hook.remove()
    monkeypatch.undo()
    scores = np.concatenate([matrix.mean((0, 1)) for matrix in matrices]).reshape(-1, 4).mean(1)
    weight, bias = (x.detach().double().numpy() for x in (block.qkv.weight, block.qkv.bias))
    width = weight.shape[1]
    keys = inputs[0].double().numpy() @ weight[width : 2 * width].T + bias[width : 2 * width]
    keys = keys.reshape(len(scores), 4 * block.num_heads, -1).mean(1)
    if hasattr(tower, "fullatt_block_indexes"):
        places, _ = vision_utils.get_vision_window_index(torch.tensor([grid]), 2, tower.window_size, tower.patch_size)
        back = np.argsort(places.numpy())
        scores, keys = scores[back], keys[back]
    return scores, keys


@pytest.mark.parametrize("grid", [[1, 4, 4], [1, 2, 14], [1, 14, 2], [1, 10, 6], [1, 2, 2], [2, 6, 8]], ids=str)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_attention_of_the_tower(family, grid, monkeypatch):
    """Windows, of two tokens a side here, that do and do not divide the image; wide, tall, square, and two frames."""
    model = tiny_model(family, vision={"depth": 3, "fullatt_block_indexes": [0, 1]} if family == "qwen2_5_vl" else None)
    spec = describe(model).vision
    pixels = torch.randn(int(np.prod(grid)), spec.patch_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features, attention = spec.encode_attended(pixels, torch.tensor([grid]), None)
        (plain,) = spec.encode(pixels, torch.tensor([grid]))
    assert torch.equal(features, plain)
    scores, keys = tower_truth(model, pixels, grid, monkeypatch)
    torch.testing.assert_close(attention.scores.double(), torch.tensor(scores), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(attention.keys.double(), torch.tensor(keys), atol=1e-5, rtol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in spec.tower.modules())


def test_hooks_go_when_the_tower_fails():
    spec = describe(tiny_model("qwen2_5_vl")).vision
    with pytest.raises(RuntimeError), torch.no_grad():
        spec.encode_attended(torch.zeros(16, 5), torch.tensor([[1, 4, 4]]), None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in spec.tower.modules())


@pytest.mark.parametrize("grid", [[1, 2, 2], [1, 22, 14], [3, 8, 30], [1, 16, 16]], ids=str)
@pytest.mark.parametrize("window", [2, 4, 5])
def test_windows_to_raster_order(grid, window):
    places, _ = vision_utils.get_vision_window_index(torch.tensor([grid]), 2, window * 28, 14)
    assert torch.equal(raster_order(grid, 2, window), places.argsort())
    assert torch.equal(raster_order(grid, 2, None), torch.arange(len(places)))


def test_a_tower_without_full_attention_is_refused():
    spec = describe(tiny_model("qwen2_5_vl", vision={"fullatt_block_indexes": []})).vision
    with pytest.raises(ValueError, match=r"a block with full attention, got \[\] \(fullatt_block_indexes\)"):
        spec.encode_attended(torch.zeros(16, spec.patch_dim), torch.tensor([[1, 4, 4]]), None)


def test_every_method_has_its_pruner():
    assert PRUNERS.keys() == METHODS.keys()
    for method in METHODS:
        config = PruneConfig(method)
        assert pruner_of(config).site == config.site == ("encoder" if method in ENCODER_METHODS else "layer")


WRONG = {
    r"one of random, .*pyramiddrop, got 'vscan' \(method\)": {"method": "vscan"},
    r"a str, got 3 \(method\)": {"method": 3},
    r"0 < keep <= 1, got 0 \(keep\)": {"keep": 0},
    r"0 < keep <= 1, got 1.5 \(keep\)": {"keep": 1.5},
    r"0 < keep <= 1, got nan \(keep\)": {"keep": float("nan")},
    r"0 < keep <= 1, got True \(keep\)": {"keep": True},
    r"no layer for random, got 2 \(layer\)": {"layer": 2},
    r"no dominant for divprune, got 0.5 \(dominant\)": {"method": "divprune", "dominant": 0.5},
    r"no seed for fastv, got 1 \(seed\)": {"method": "fastv", "seed": 1},
    r"an int, got 1.5 \(seed\)": {"seed": 1.5},
    r"0 <= dominant <= 1, got 2 \(dominant\)": {"method": "visionzip", "dominant": 2},
    r"an int >= 1, got 0 \(layer\)": {"method": "fastv", "layer": 0},
    r"ascending ints >= 1, got \(2, 2\) \(layers\)": {"method": "pyramiddrop", "layers": (2, 2)},
    r"ascending ints >= 1, got \(\) \(layers\)": {"method": "pyramiddrop", "layers": ()},
    r"ascending ints >= 1, got 3 \(layers\)": {"method": "pyramiddrop", "layers": 3},
    r"descending shares in \(0, 1\], got \(0.5, 0.6, 0.1\)": {"method": "pyramiddrop", "ratios": (0.5, 0.6, 0.1)},
    r"descending shares in \(0, 1\], got \(0.5, 0.2, 0.0\)": {"method": "pyramiddrop", "ratios": (0.5, 0.2, 0.0)},
    r"one share for each of 2 layers": {"method": "pyramiddrop", "layers": (1, 2), "ratios": (0.5, 0.25, 0.125)},
}


@pytest.mark.parametrize("match", WRONG)
def test_wrong_configurations(match):
    with pytest.raises(ValueError, match=f"expected {match}"):
        PruneConfig(**{"method": "random", **WRONG[match]})


def test_hashes_tell_configurations_apart():
    different = [*CONFIGS, PruneConfig("random", 0.25), PruneConfig("fastv"), PruneConfig("fastv", layer=3)]
    different += [PruneConfig("pyramiddrop"), PruneConfig("pyramiddrop", layers=(1, 2, 3))]
    assert len({config.config_hash for config in different}) == len(different)
    same = [
        PruneConfig("visionzip"),
        PruneConfig("visionzip", dominant=0.84375),
        PruneConfig("visionzip", np.float64(0.5)),
    ]
    assert len({config.config_hash for config in same}) == 1
    assert PruneConfig("random", 1).config_hash == PruneConfig("random", 1.0).config_hash
    assert PruneConfig("pyramiddrop", layers=[1, 2], ratios=[0.5, 0.25]).layers == (1, 2)
