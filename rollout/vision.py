"""Image features: the model's own tower, once for each image content and vision version."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch

from foveate.rollout.models.spec import VisionSpec
from foveate.rollout.processor import ImageInput


class VisionEncoder:
    """Encodes images and keeps features, least recently used out first, within a byte budget."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, cache_bytes: int):
        self.spec = spec
        self.dtype = dtype
        self.cache_bytes = cache_bytes
        self.used_bytes = 0
        self.num_encoded = 0
        self.num_hits = 0
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def encode(self, images: Iterable[ImageInput]) -> dict[bytes, torch.Tensor]:
        """-> float [tokens, hidden] by content hash, equal images encoded once."""
        wanted = {image.content_hash: image for image in images}
        features = {}
        for key in wanted:
            if key in self._features:
                self._features.move_to_end(key)
                features[key] = self._features[key]
        self.num_hits += len(features)
        missing = [image for key, image in wanted.items() if key not in features]
        if missing:
            device = next(self.spec.tower.parameters()).device
            pixels = torch.cat([image.pixel_values.to(device) for image in missing])
            grids = torch.stack([image.grid_thw for image in missing]).to(device)
            for image, feature in zip(missing, self.spec.encode(pixels, grids), strict=True):
                features[image.content_hash] = self._remember(image.content_hash, feature.to(self.dtype))
            self.num_encoded += len(missing)
        return features

    def clear(self) -> None:
        """Forgets all features, as after a change of the tower's weights."""
        self._features.clear()
        self.used_bytes = 0

    def _remember(self, key: bytes, feature: torch.Tensor) -> torch.Tensor:
        if feature.nbytes > self.cache_bytes:
            return feature
        # The tower returns views of one tensor for all images; a clone lets each be dropped alone.
        feature = self._features[key] = feature.clone()
        self.used_bytes += feature.nbytes
        while self.used_bytes > self.cache_bytes:
            self.used_bytes -= self._features.popitem(last=False)[1].nbytes
        return feature
