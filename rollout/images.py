"""Images as callers have them: files, PIL images, arrays."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch


def load_image(image: Any) -> Any:
    """A path -> a PIL image; PIL images and arrays pass. RGB is made of every other mode."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (np.ndarray, torch.Tensor)):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
            raise ValueError(f"expected uint8 [height, width, 3], got {array.dtype} {list(array.shape)} (images)")
        return Image.fromarray(array)
    if not isinstance(image, (str, bytes)) and not hasattr(image, "__fspath__"):
        raise ValueError(f"expected a PIL image, an array or a path, got {type(image).__name__} (images)")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"expected an image file, got {image!r}: {error} (images)") from error


def content_hash(pixel_values: torch.Tensor, grid: torch.Tensor) -> bytes:
    """Equal for equal patches and grids, whatever object they came in."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str((pixel_values.dtype, grid.tolist())).encode())
    digest.update(pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
