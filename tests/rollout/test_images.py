"""Images of every kind a caller may hold, and the hash that tells them apart."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.rollout.images import content_hash, load_image
from foveate.rollout.testing import tiny_processor

Image = pytest.importorskip("PIL.Image")
COLOURS = np.array([[[0, 64, 255], [255, 255, 255]], [[9, 8, 7], [128, 0, 1]], [[255, 0, 0], [3, 2, 1]]], np.uint8)
GREYS = np.array([[0, 1, 127], [128, 254, 255]], np.uint8)


def rgb(image: object) -> np.ndarray:
    loaded = load_image(image)
    assert isinstance(loaded, Image.Image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


@pytest.fixture
def saved(tmp_path: Path):
    """saved(image, name, **options of PIL's save) -> path"""

    def save(image, name: str, **options) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.mark.parametrize("kind", ["array", "tensor", "PIL", "upside down", "part"])
def test_colours_come_through(kind):
    image = {
        "array": COLOURS,
        "tensor": torch.from_numpy(COLOURS),
        "PIL": Image.fromarray(COLOURS),
        "upside down": COLOURS[::-1].copy()[::-1],
        "part": np.concatenate([COLOURS, COLOURS], axis=1)[:, :2],
    }[kind]
    assert np.array_equal(rgb(image), COLOURS)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths(kind, saved):
    assert np.array_equal(rgb(kind(saved(Image.fromarray(COLOURS), "a.png"))), COLOURS)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "I;16B"])
def test_grey_becomes_three_equal_channels(mode):
    greys = np.where(GREYS >= 128, 255, 0).astype(np.uint8) if mode == "1" else GREYS
    if mode == "I;16":
        image = Image.fromarray(GREYS.astype(np.uint16) << 8 | 37)
    elif mode == "I;16B":
        image = Image.frombytes(mode, GREYS.shape[::-1], (GREYS.astype(np.uint16) << 8 | 37).astype(">u2").tobytes())
    else:
        image = Image.fromarray(greys).convert(mode)
    assert image.mode == mode
    assert np.array_equal(rgb(image), np.repeat(greys[..., None], 3, -1))


def test_a_16_bit_file(saved):
    path = saved(Image.fromarray(GREYS.astype(np.uint16) * 257), "grey.png")
    assert np.array_equal(rgb(path)[..., 1], GREYS)


def test_palette():
    image = Image.new("P", (3, 2))
    image.putpalette([0, 0, 0, 10, 20, 30, 255, 0, 7])
    image.putdata([0, 1, 2, 2, 1, 0])
    assert rgb(image).tolist() == [[[0, 0, 0], [10, 20, 30], [255, 0, 7]], [[255, 0, 7], [10, 20, 30], [0, 0, 0]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_shows_white(mode):
    """colour * alpha + 255 (1 - alpha), rounded somehow."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    pixels[:2, :, 3], pixels[2:4, :, 3] = 0, 255
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    assert image.mode == mode
    colours, alpha = np.split(np.asarray(image.convert("RGBA")).astype(float), [3], axis=2)
    shown = rgb(image)
    assert np.abs(shown - (colours * alpha + 255 * (255 - alpha)) / 255).max() <= 1
    assert (shown[:2] == 255).all()
    assert np.array_equal(shown[2:4], colours[2:4])


def test_cmyk():
    """Ink takes light away: (255 - ink)(255 - black) / 255."""
    image = Image.new("CMYK", (2, 1))
    image.putdata([(255, 0, 0, 0), (0, 0, 255, 51)])
    assert rgb(image).tolist() == [[[0, 255, 255], [204, 204, 0]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_converted_as_pillow_and_transformers_do(mode):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 4), dtype=np.uint8), "RGBA")
    if mode in ("LAB", "HSV"):
        image = Image.fromarray(np.asarray(colours)[..., :3].copy(), mode)
    else:
        image = colours.convert("RGB").convert(mode) if mode in ("P", "CMYK", "YCbCr") else colours.convert(mode)
    assert image.mode == mode
    assert np.array_equal(rgb(image), np.asarray(image.convert("RGB")))
    process = tiny_processor().image_processor
    ours, theirs = (process(images=[i], return_tensors="pt")["pixel_values"] for i in (load_image(image), image))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("transparency", [bytes([255, 0, 255]), 1], ids=["of each colour", "one colour"])
def test_a_palette_with_transparency(transparency, saved):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 0, 0, 0, 255, 0, 7])
    image.putdata([0, 1, 2])
    path = saved(image, "a.png", transparency=transparency)
    assert "transparency" in Image.open(path).info
    assert rgb(path).tolist() == [[[10, 20, 30], [255, 255, 255], [255, 0, 7]]]


def test_16_bits_do_not_saturate():
    """A ramp over all 65,536 values becomes one over all 256, each as often; Pillow's own conversion makes it white."""
    image = Image.fromarray(np.arange(1 << 16, dtype=np.uint16).reshape(256, 256))
    assert image.mode == "I;16"
    values, counts = np.unique(rgb(image)[..., 0], return_counts=True)
    assert (values.tolist(), set(counts.tolist())) == (list(range(256)), {256})


def test_the_first_frame_of_an_animation(saved):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = saved(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 3
    assert rgb(path).tolist() == [[[255, 0, 0]] * 4] * 3
    with Image.open(path) as opened:
        opened.seek(2)
        assert rgb(opened).tolist() == [[[0, 0, 255]] * 4] * 3  # a PIL image is taken as it stands


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode):
    """Pillow would clip them to white."""
    with pytest.raises(ValueError, match=rf"expected 8 or 16 bits .* got mode {mode} \(images\)"):
        load_image(Image.new(mode, (2, 2), 60000))


def test_a_file_is_turned_as_its_camera_says(saved):
    """Orientation 6: the first row of the file is the right column of the picture."""
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = 6
    path = saved(image, "turned.png", exif=exif)
    assert np.array_equal(rgb(path), np.rot90(COLOURS, -1))
    assert np.array_equal(rgb(path.read_bytes()), np.rot90(COLOURS, -1))
    with Image.open(path) as opened:
        assert np.array_equal(rgb(opened), COLOURS)  # a PIL image is taken as it stands


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 3), np.float32),
        np.zeros((2, 2, 3), np.int64),
        np.zeros((2, 2), np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((3, 2, 2), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((2, 0, 3), np.uint8),
        torch.zeros(2, 2, 3),
    ],
    ids=lambda array: f"{array.dtype}{tuple(array.shape)}",
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\], got \w+ \[\d.*\] \(images\)"):
        load_image(array)


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_images_without_pixels_are_refused(size):
    with pytest.raises(ValueError, match=r"expected at least one pixel, got \(\d, \d\) \(images\)"):
        load_image(Image.new("RGB", size))


@pytest.mark.parametrize("image", [None, 3, io.BytesIO(b""), {"path": "a.png"}], ids=lambda image: type(image).__name__)
def test_other_objects_are_refused(image):
    with pytest.raises(ValueError, match=rf"expected .* a path, got {type(image).__name__} \(images\)"):
        load_image(image)


@pytest.mark.parametrize("damage", ["no file", "folder", "empty", "text", "cut short"])
def test_files_that_cannot_be_read(damage, saved, tmp_path):
    path = saved(Image.effect_noise((40, 40), 50), "a.png")
    content = {"empty": b"", "text": b"not an image", "cut short": path.read_bytes()[:300]}
    if damage in content:
        path.write_bytes(content[damage])
    path = {"no file": tmp_path / "absent.png", "folder": tmp_path}.get(damage, path)
    with pytest.raises(ValueError, match=r"expected an image file, got .*\(images\)") as error:
        load_image(path)
    assert str(path) in str(error.value)


def test_an_opened_file_that_breaks_off(saved):
    """Pillow reads the pixels of an opened file only when they are asked for."""
    path = saved(Image.effect_noise((40, 40), 50), "a.png")
    path.write_bytes(path.read_bytes()[:300])
    with Image.open(path) as opened, pytest.raises(ValueError, match=r"expected an image file, got .*\(images\)"):
        load_image(opened)


def test_an_image_far_too_large(saved, monkeypatch):
    path = saved(Image.new("L", (64, 64)), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"expected an image file, got .*4096 pixels.*\(images\)"):
        load_image(path)


PIXELS = torch.arange(24, dtype=torch.float32).view(4, 6)
GRID = torch.tensor([1, 2, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_images_have_equal_hashes(dtype):
    """Another object, another memory layout, a tensor that requires a gradient."""
    pixels = PIXELS.to(dtype)
    twins = [pixels.clone(), pixels.t().contiguous().t(), torch.cat([pixels, pixels], 1)[:, :6]]
    twins.append(pixels.clone().requires_grad_())
    for twin in twins:
        assert content_hash(twin, GRID.clone()) == content_hash(pixels, GRID)


def test_other_images_have_other_hashes():
    changed = PIXELS.clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(torch.inf))
    images = [(PIXELS, GRID), (changed, GRID), (PIXELS.flip(0), GRID), (PIXELS.view(torch.int32), GRID)]
    images += [(PIXELS, torch.tensor(grid)) for grid in ([1, 4, 1], [1, 1, 4], [4, 1, 1])]
    hashes = [content_hash(*image) for image in images]
    assert len(set(hashes)) == len(images)
    assert all(len(digest) == 16 for digest in hashes)
