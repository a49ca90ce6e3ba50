"""Images as callers have them: files, PIL images, arrays."""

from __future__ import annotations

import hashlib
import io
import math
import os
from typing import Any

import numpy as np
import torch

from foveate.rollout.checks import cut, shown
from foveate.rollout.types import VisionInputs


def load_image(image: Any, argument: str = "images") -> Any:
    """A path, an encoded file's bytes, a PIL image of any mode or uint8 [height, width, 3] -> a PIL image in RGB.

    A file is turned the way its EXIF data says, as transformers does, and of an animation only its first frame is
    seen; a PIL image is taken as it stands. 16 bits a pixel become the upper 8. Transparent images are laid on white,
    as transformers' image processors do (its `load_image` keeps the colours below, often black, instead); CMYK and the
    rest are converted as Pillow does. argument: the name in errors. Raises ValueError for what is no image, is empty,
    cannot be read, or has 32 bits a pixel, whose range nobody knows.
    """
    from PIL import Image

    if isinstance(image, (np.ndarray, torch.Tensor)):
        return Image.fromarray(_as_array(image, argument))
    is_file = isinstance(image, (str, bytes, os.PathLike))
    known = is_file or isinstance(image, Image.Image)
    if not known:
        raise ValueError(f"expected a PIL image, an array or a path, got {type(image).__name__} ({argument})")
    try:
        opened = _open(image) if is_file else image
        if 0 not in opened.size:
            opened.load()
    except Exception as error:  # decoders of files raise whatever they like
        raise ValueError(f"expected an image file, got {shown(image)}: {cut(error)} ({argument})") from error
    if 0 in opened.size:
        raise ValueError(f"expected at least one pixel, got {opened.size} ({argument})")
    return _to_rgb(opened, argument)


def _as_array(image: np.ndarray | torch.Tensor, argument: str) -> np.ndarray:
    is_bytes = image.dtype in (np.uint8, torch.uint8)
    has_data = isinstance(image, np.ndarray) or not image.is_meta
    if not is_bytes or not has_data or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"expected uint8 [height, width, 3], got {_kind(image)} ({argument})")
    return image if isinstance(image, np.ndarray) else image.cpu().numpy()


def _open(image: Any) -> Any:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return ImageOps.exif_transpose(opened)


def _to_rgb(image: Any, argument: str) -> Any:
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a pixel and channel, got mode {image.mode} ({argument})")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:  # Pillow's, for modes it cannot convert
        raise ValueError(f"expected a mode that Pillow converts to RGB, got {image.mode} ({argument})") from error


def content_hash(pixel_values: torch.Tensor, grid: torch.Tensor) -> bytes:
    """Equal for equal patches and grids, whatever object they came in."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str((pixel_values.dtype, grid.tolist())).encode())
    digest.update(pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def split_images(
    vision: VisionInputs, merge_size: int, patch_dim: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """-> one grid int64 [3] and one float [patches, patch_dim] an image; ValueError if they are not those of images.

    Copies: a caller may write to its tensors while the request waits.
    """
    pixels, grids = (_as_tensor(getattr(vision, name), name) for name in ("pixel_values", "image_grid_thw"))
    whole = not (grids.is_floating_point() or grids.is_complex() or grids.dtype == torch.bool)
    if not whole or grids.dim() != 2 or grids.shape[1] != 3:
        raise ValueError(f"expected int [images, 3], got {_kind(grids)} (image_grid_thw)")
    patches = []
    for index, grid in enumerate(grids.tolist()):
        if min(grid) < 1 or any(side % merge_size for side in grid[1:]):
            expected = f"positive patch counts, height and width multiples of {merge_size}"
            raise ValueError(f"expected {expected}, got {grid} (image_grid_thw of image {index})")
        patches.append(math.prod(grid))
    if not pixels.is_floating_point() or pixels.dim() != 2 or pixels.shape != (sum(patches), patch_dim):
        raise ValueError(f"expected float [{sum(patches)}, {patch_dim}], got {_kind(pixels)} (pixel_values)")
    split = list(pixels.split(patches))
    for index, part in enumerate(split):
        if not bool(part.isfinite().all()):
            raise ValueError(f"expected finite numbers, got NaN or inf in image {index} (pixel_values)")
    return list(grids.to(torch.int64)), split


def _as_tensor(value: Any, argument: str) -> torch.Tensor:
    try:
        given = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
        tensor = given.detach().clone()
        return tensor.cpu() if argument == "image_grid_thw" else tensor
    except Exception as error:  # torch raises several kinds for what it cannot read
        raise ValueError(f"expected a tensor, got {shown(value)} ({argument})") from error


def _kind(tensor: np.ndarray | torch.Tensor) -> str:
    place = " on meta" if isinstance(tensor, torch.Tensor) and tensor.is_meta else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{place}"
