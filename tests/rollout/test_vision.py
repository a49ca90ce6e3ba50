"""The feature cache: what the tower gives, for each image content once, within its bytes; where features are put."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from foveate.rollout.images import content_hash
from foveate.rollout.models import describe
from foveate.rollout.processor import ImageInput
from foveate.rollout.testing import VISION_FAMILIES, tiny_model
from foveate.rollout.vision import VisionEncoder, place, vision_stats

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
    return [image.content_hash in encoder._entries for image in images]


def tower(model, *images: ImageInput) -> list[torch.Tensor]:
    """transformers' own tower, mergers included, on these images in one call: [tokens, 1 + levels, hidden] each."""
    pixels = torch.cat([image.pixel_values for image in images])
    grids = torch.stack([image.grid_thw for image in images])
    with torch.no_grad():
        output = model.model.visual(pixels, grid_thw=grids, return_dict=True)
    levels = torch.stack([output.pooler_output, *(getattr(output, "deepstack_features", None) or ())], dim=1)
    return list(levels.split([image.num_tokens for image in images]))


@pytest.mark.parametrize(("family", "levels"), [("qwen2_vl", 1), ("qwen2_5_vl", 1), ("qwen3_vl", 3)])
def test_every_family_gives_its_levels(family, levels):
    model = tiny_model(family).requires_grad_(False)
    images = [image(0, 4, 4), image(1, 2, 10)]
    cache = VisionEncoder(describe(model).vision, torch.float32, 100 * levels * TOKEN_BYTES)
    features = cache.encode(images)
    for each, expected in zip(images, tower(model, *images), strict=True):
        assert features[each.content_hash].shape == (each.num_tokens, levels, 48)
        assert torch.equal(features[each.content_hash], expected)
    assert cache.used_bytes == 9 * levels * TOKEN_BYTES


def test_features_are_the_towers(model, encoder):
    """Several shapes, windows that do not divide them, in one call and from the cache."""
    images = [image(0, 4, 4), image(1, 2, 10), image(2, 6, 4), image(3, 2, 2)]
    expected = tower(model, *images)
    cache = encoder(100)
    for _ in range(2):
        features = cache.encode(images)
        for each, feature in zip(images, expected, strict=True):
            assert torch.equal(features[each.content_hash], feature)
            assert features[each.content_hash].shape == (each.num_tokens, 1, 48)
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
        assert cache.used_bytes == sum(entry.features.nbytes for entry in cache._entries.values())
    assert cached(cache, small, medium, large) == [True, False, True]


@pytest.mark.parametrize("count", [1, 2])
def test_a_budget_that_is_met_exactly(encoder, count):
    cache, images = encoder(4 * count), [image(seed) for seed in range(count)]
    cache.encode(images)
    assert all(cached(cache, *images))


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_image_beyond_the_budget_is_kept_while_in_use(model, encoder, tokens):
    cache = encoder(tokens)
    for encoded in (1, 2):
        features = cache.encode([image(0)])
        assert torch.equal(features[image(0).content_hash], tower(model, image(0))[0])
        assert (cache.used_bytes, cache.num_encoded) == (4 * TOKEN_BYTES, encoded)
        assert cache.encode([image(0)])[image(0).content_hash] is features[image(0).content_hash]
        del features
        assert (cache.used_bytes, cache.num_encoded, cache.num_evicted) == (0, encoded, encoded)
    assert cache.num_hits == 2


def test_what_is_in_use_is_not_evicted(encoder):
    """However long ago it was asked for; the others go in its place."""
    cache = encoder(8)
    a, b, c, d = (image(seed) for seed in range(4))
    held = cache.encode([a])
    for each in (b, c, d):
        cache.encode([each])
    assert cached(cache, a, b, c, d) == [True, False, False, True]
    assert cache.num_evicted == 2
    held |= cache.encode([d])
    cache.encode([b])
    assert cached(cache, a, b, c, d) == [True, False, False, True]
    assert cache.used_bytes == 8 * TOKEN_BYTES
    held.clear()
    cache.encode([b])
    assert cached(cache, a, b, c, d) == [False, True, False, True]


def test_every_holder_counts(encoder):
    """Two callers hold the features of one image; the last one to let go frees them."""
    cache = encoder(0)
    first, second = cache.encode([image(0)]), cache.encode([image(0)])
    del first
    assert cached(cache, image(0)) == [True]
    del second
    assert cached(cache, image(0)) == [False]


def test_more_images_in_one_call_than_fit(encoder):
    """All are there while the call's result is held; then the last ones stay."""
    cache = encoder(8)
    images = [image(seed) for seed in range(5)]
    features = cache.encode(images)
    assert len(features) == 5
    assert cache.used_bytes == 20 * TOKEN_BYTES
    features.clear()
    assert cached(cache, *images) == [False, False, False, True, True]
    assert cache.used_bytes == 8 * TOKEN_BYTES


def test_the_cache_dies_with_its_last_holder(encoder):
    """Features that are still in use do not keep it alive, and outlive it."""
    cache = encoder(0)
    features = cache.encode([image(0)])
    expected = features[image(0).content_hash].clone()
    alive = weakref.ref(cache)
    del cache
    assert alive() is None
    assert torch.equal(features.pop(image(0).content_hash), expected)


class TowerOfOnes:
    """Stands for a tower: patches in, their merged number of tokens out, each image counted by its first value."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def encode(self, pixels, grids):
        patches = grids.prod(-1).tolist()
        self.seen += [part[0, 0].item() for part in pixels.split(patches)]
        return [part[: len(part) // 4, None, :1].contiguous() for part in pixels.split(patches)]

    def parameters(self):
        return iter([torch.zeros(())])

    def modules(self):
        return iter([])

    tower = property(lambda self: self)


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(0, 24),
    calls=st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=4), st.integers(0, 3)), max_size=20),
)
def test_any_sequence_of_calls(budget, calls):
    """Right features, exact bytes and counters, the budget kept but for what is in use, nothing in use encoded twice.

    Image k has 1 + k tokens of 4 bytes. Each call's features are held until the given number of further calls.
    """
    stand_in = TowerOfOnes()
    cache = VisionEncoder(stand_in, torch.float32, 4 * budget)
    images = []
    for key in range(8):
        pixels = torch.full((4 * (1 + key), 8), float(key))
        grid = torch.tensor([1, 2, 2 * (1 + key)])
        images.append(ImageInput(content_hash(pixels, grid), pixels, grid, 0, 1 + key))
    held: list[tuple[int, set[int], dict]] = []
    hits = 0
    for now, (keys, duration) in enumerate(calls):
        held = [entry for entry in held if entry[0] > now]
        in_use = set().union(*(used for _, used, _ in held))
        before = len(stand_in.seen)
        features = cache.encode([images[key] for key in keys])
        new = stand_in.seen[before:]
        assert len(new) == len(set(new))
        assert not set(new) & in_use
        hits += len(set(keys)) - len(new)
        for key in keys:
            assert torch.equal(features[images[key].content_hash], torch.full((1 + key, 1, 1), float(key)))
        held.append((now + 1 + duration, set(keys), features))
        del features
        inside = {image.num_tokens - 1 for image in images if image.content_hash in cache._entries}
        in_use |= set(keys)
        assert in_use <= inside
        assert cache.used_bytes == sum(4 * (1 + key) for key in inside)
        assert cache.used_bytes <= max(4 * budget, sum(4 * (1 + key) for key in in_use))
        encoded = {"images_encoded": len(stand_in.seen), "image_hits": hits, "image_bytes": cache.used_bytes}
        assert vision_stats(cache) == encoded | {"image_evictions": len(stand_in.seen) - len(inside)}
    held.clear()
    assert cache.used_bytes <= 4 * budget


def test_counters_without_a_tower():
    assert set(vision_stats(None).values()) == {0}


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


@pytest.mark.parametrize("levels", [0, 2])
def test_place(levels):
    """Rows of images hold their features; what is added later stands beside the same rows, in any order of parts."""
    hidden = torch.randn(9, 5)
    before = hidden.clone()
    parts = [(6, torch.randn(2, 1 + levels, 5)), (1, torch.randn(3, 1 + levels, 5)), (5, torch.randn(0, 1 + levels, 5))]
    deepstack = place(hidden, iter(parts))
    images = [6, 7, 1, 2, 3]
    assert torch.equal(hidden[images], torch.cat([part[:, 0] for _, part in parts]))
    text = [0, 4, 5, 8]
    assert torch.equal(hidden[text], before[text])
    if levels == 0:
        assert deepstack is None
        return
    assert deepstack.rows.tolist() == images
    assert torch.equal(deepstack.levels, torch.cat([part[:, 1:] for _, part in parts]).transpose(0, 1))


def test_place_without_images():
    hidden = torch.randn(3, 5)
    before = hidden.clone()
    assert place(hidden, []) is None
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_dropout_does_not_reach_the_cache(family):
    """The tower runs in eval mode, and every module is left in the mode it was in, also after a failure."""
    model = tiny_model(family)
    first, *others = (module for module in model.model.visual.modules() if isinstance(module, torch.nn.Linear))
    for linear in (first, *others):
        linear.register_forward_hook(lambda module, args, output: F.dropout(output, 0.5, module.training))
    expected = tower(model, image(0))[0].detach()
    model.train()
    first.eval()
    modes = [module.training for module in model.modules()]
    features = VisionEncoder(describe(model).vision, torch.float32, 0).encode([image(0)])
    assert torch.equal(features[image(0).content_hash], expected)
    assert [module.training for module in model.modules()] == modes
    others[0].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        VisionEncoder(describe(model).vision, torch.float32, 0).encode([image(0)])
    assert [module.training for module in model.modules()] == modes
