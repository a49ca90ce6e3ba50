"""Images as callers have them: files, PIL images, arrays."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch


def load_image(image: Any) -> Any:
    """A path, a PIL image of any mode or uint8 [height, width, 3] -> a PIL image in RGB.

    A file is turned the way its EXIF data says, as transformers does; 16 bits a pixel become 8. Raises ValueError
    for what is no image, is empty, cannot be read, or has 32 bits a pixel, whose range nobody knows.
    """
    from PIL import Image

    try:
        opened = _open(image)
        if 0 in opened.size:
            raise ValueError(f"expected at least one pixel, got {opened.size} (images)")
        return _to_rgb(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected an image file, got {image!r}: {error} (images)") from error


def _open(image: Any) -> Any:
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (np.ndarray, torch.Tensor)):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
            raise ValueError(f"expected uint8 [height, width, 3], got {array.dtype} {list(array.shape)} (images)")
        return Image.fromarray(array)
    if not isinstance(image, (str, bytes)) and not hasattr(image, "__fspath__"):
        raise ValueError(f"expected a PIL image, an array or a path, got {type(image).__name__} (images)")
    with Image.open(image) as opened:
        return ImageOps.exif_transpose(opened)


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a pixel and channel, got mode {image.mode} (images)")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def content_hash(pixel_values: torch.Tensor, grid: torch.Tensor) -> bytes:
    """Equal for equal patches and grids, whatever object they came in."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str((pixel_values.dtype, grid.tolist())).encode())
    digest.update(pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
