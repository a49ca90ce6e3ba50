"""The feature cache: what the tower gives, for each image content once, within its bytes."""

from __future__ import annotations

import pytest
import torch

from foveate.rollout.images import content_hash
from foveate.rollout.models import describe
from foveate.rollout.processor import ImageInput
from foveate.rollout.testing import tiny_model
from foveate.rollout.vision import VisionEncoder

TOKEN_BYTES = 48 * 4  # a feature of the tiny model in float32


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2_5_vl").requires_grad_(False)


@pytest.fixture(scope="module")
def spec(model):
    return describe(model).vision


@pytest.fixture
def encoder(spec):
    """encoder(tokens): a cache with room for the features of so many tokens."""
    return lambda tokens, dtype=torch.float32: VisionEncoder(spec, dtype, tokens * TOKEN_BYTES)


def image(seed: int, height: int = 4, width: int = 4) -> ImageInput:
    """An image of height x width patches; the same seed gives equal content in a new object."""
    generator = torch.Generator().manual_seed(seed)
    pixels, grid = torch.randn(height * width, 1176, generator=generator), torch.tensor([1, height, width])
    return ImageInput(content_hash(pixels, grid), pixels, grid, 0, height * width // 4)


def cached(encoder: VisionEncoder, *images: ImageInput) -> list[bool]:
    """Which images would be hits now; asks without changing their order."""
    return [image.content_hash in encoder._features for image in images]


def tower(model, *images: ImageInput) -> list[torch.Tensor]:
    """transformers' own tower and merger, on these images in one call."""
    pixels = torch.cat([image.pixel_values for image in images])
    grids = torch.stack([image.grid_thw for image in images])
    merged = model.model.visual(pixels, grid_thw=grids).pooler_output
    return list(merged.split([image.num_tokens for image in images]))


def test_features_are_the_towers(model, encoder):
    """Several shapes, windows that do not divide them, in one call and from the cache."""
    images = [image(0, 4, 4), image(1, 2, 10), image(2, 6, 4), image(3, 2, 2)]
    expected = tower(model, *images)
    cache = encoder(100)
    for _ in range(2):
        features = cache.encode(images)
        for each, feature in zip(images, expected, strict=True):
            assert torch.equal(features[each.content_hash], feature)
            assert features[each.content_hash].shape == (each.num_tokens, 48)
    assert (cache.num_encoded, cache.num_hits) == (4, 4)


def test_an_image_does_not_depend_on_its_company(model, encoder):
    images = [image(0), image(1, 2, 6)]
    features = encoder(100).encode(images)
    for each in images:
        torch.testing.assert_close(features[each.content_hash], tower(model, each)[0], atol=1e-5, rtol=1e-5)


def test_hits_and_misses_in_one_call(model, encoder):
    """Only what is missing goes to the tower, and each result goes to its own image."""
    cache = encoder(100)
    first, second, third = image(0), image(1), image(2)
    cache.encode([second])
    features = cache.encode([first, second, third])
    assert (cache.num_encoded, cache.num_hits) == (3, 1)
    expected = [*tower(model, second), *tower(model, first, third)]
    for each, feature in zip((second, first, third), expected, strict=True):
        assert torch.equal(features[each.content_hash], feature)


def test_equal_images_are_encoded_once(encoder):
    cache = encoder(100)
    features = cache.encode([image(0), image(0), image(1)])
    assert len(features) == 2
    assert (cache.num_encoded, cache.num_hits) == (2, 0)
    cache.encode([image(0), image(0)])
    assert (cache.num_encoded, cache.num_hits) == (2, 1)


def test_no_images(encoder):
    assert encoder(100).encode([]) == {}


def test_the_one_used_longest_ago_goes_first(encoder):
    cache = encoder(12)  # three images of 4 tokens
    a, b, c, d = (image(seed) for seed in range(4))
    for each in (a, b, c):
        cache.encode([each])
    cache.encode([a])  # now b is the oldest
    cache.encode([d])
    assert cached(cache, a, b, c, d) == [True, False, True, True]
    cache.encode([b])
    assert cached(cache, a, b, c, d) == [True, True, False, True]
    assert cache.num_encoded == 5


def test_bytes_are_exact(encoder):
    cache = encoder(10)
    small, medium, large = image(0, 2, 2), image(1, 4, 4), image(2, 4, 8)
    for images, tokens in (([small], 1), ([small], 1), ([medium], 5), ([large], 8), ([small, large], 9)):
        cache.encode(images)
        assert cache.used_bytes == tokens * TOKEN_BYTES
        assert cache.used_bytes == sum(feature.nbytes for feature in cache._features.values())
    assert cached(cache, small, medium, large) == [True, False, True]


@pytest.mark.parametrize("count", [1, 2])
def test_a_budget_that_is_met_exactly(encoder, count):
    cache, images = encoder(4 * count), [image(seed) for seed in range(count)]
    cache.encode(images)
    assert all(cached(cache, *images))


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_image_beyond_the_budget_is_not_kept(model, encoder, tokens):
    cache = encoder(tokens)
    for _ in range(2):
        features = cache.encode([image(0)])
        assert torch.equal(features[image(0).content_hash], tower(model, image(0))[0])
    assert (cache.used_bytes, cache.num_encoded, cache.num_hits) == (0, 2, 0)


def test_more_images_in_one_call_than_fit(encoder):
    """All are returned, though some are gone from the cache by then."""
    cache = encoder(8)
    images = [image(seed) for seed in range(5)]
    assert len(cache.encode(images)) == 5
    assert cached(cache, *images) == [False, False, False, True, True]
    assert cache.used_bytes == 8 * TOKEN_BYTES


def test_a_kept_feature_holds_its_own_memory_only(encoder):
    """A view of all the call's features would keep them all alive."""
    cache = encoder(100)
    features = cache.encode([image(0), image(1, 8, 8)])
    for feature in features.values():
        assert feature.untyped_storage().nbytes() == feature.nbytes


def test_clear(encoder, model):
    cache = encoder(100)
    cache.encode([image(0)])
    cache.clear()
    assert (cache.used_bytes, cached(cache, image(0))) == (0, [False])
    with torch.no_grad():
        model.model.visual.merger.mlp[2].bias += 1.0
    changed = cache.encode([image(0)])[image(0).content_hash]
    assert torch.equal(changed, tower(model, image(0))[0])
    with torch.no_grad():
        model.model.visual.merger.mlp[2].bias -= 1.0
    assert cache.num_encoded == 2


def test_features_take_the_decoders_dtype(model, encoder):
    features = encoder(100, torch.bfloat16).encode([image(0)])
    assert torch.equal(features[image(0).content_hash], tower(model, image(0))[0].bfloat16())
