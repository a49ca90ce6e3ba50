"""Image features: the model's own tower, once for each image content and vision version."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from foveate.rollout.models.spec import Deepstack, VisionSpec
from foveate.rollout.processor import ImageInput


class _Entry:
    """Features in the cache, and the one view of them that was handed out and whose holders use them."""

    def __init__(self, features: torch.Tensor):
        self.features = features
        self.view: weakref.ref[torch.Tensor] | None = None

    @property
    def in_use(self) -> bool:
        return self.view is not None and self.view() is not None


class VisionEncoder:
    """Encodes images and keeps features, least recently used out first, within a byte budget.

    Features are in use while anyone holds the tensor that `encode` returned. Those are never evicted, so that the
    cache exceeds its budget where they alone do; it shrinks as soon as they are let go. The tower runs in eval mode,
    whatever mode a trainer has left it in: dropout must not stay in what is kept. each_alone: images pass the tower one
    by one, so that features do not depend on which came together.
    """

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, cache_bytes: int, each_alone: bool = False):
        self.spec = spec
        self.dtype = dtype
        self.cache_bytes = cache_bytes
        self.each_alone = each_alone
        self.used_bytes = 0
        self.num_encoded = 0
        self.num_hits = 0
        self.num_evicted = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def encode(self, images: Iterable[ImageInput]) -> dict[bytes, torch.Tensor]:
        """-> float [tokens, 1 + num_deepstack, hidden] by content hash, equal images encoded once."""
        wanted = {image.content_hash: image for image in images}
        features = {key: self._hand_out(key) for key in wanted if key in self._entries}
        num_hits = len(features)
        missing = [image for key, image in wanted.items() if key not in features]
        if missing:
            batches = [[image] for image in missing] if self.each_alone else [missing]
            encoded = [feature for batch in batches for feature in self._run_tower(batch)]
            for image, feature in zip(missing, encoded, strict=True):
                entry = self._entries[image.content_hash] = _Entry(feature.to(self.dtype))
                self.used_bytes += entry.features.nbytes
                features[image.content_hash] = self._hand_out(image.content_hash)
            self.num_encoded += len(missing)
            self._trim()
        self.num_hits += num_hits  # nothing is counted if the tower fails
        return features

    def clear(self) -> None:
        """Forgets all features, as after a change of the tower's weights."""
        self._entries.clear()
        self.used_bytes = 0

    def _run_tower(self, images: Sequence[ImageInput]) -> list[torch.Tensor]:
        device = next(self.spec.tower.parameters()).device
        pixels = torch.cat([image.pixel_values.to(device) for image in images])
        grids = torch.stack([image.grid_thw for image in images]).to(device)
        with _in_eval(self.spec.tower):
            return self.spec.encode(pixels, grids)

    def _hand_out(self, key: bytes) -> torch.Tensor:
        """The entry's view, the same one while it is in use; the entry is now the most recently used."""
        entry = self._entries[key]
        self._entries.move_to_end(key)
        view = entry.view() if entry.view is not None else None
        if view is None:
            view = entry.features.view_as(entry.features)
            cache = weakref.ref(self)  # the callback must not keep the engine alive
            entry.view = weakref.ref(view, lambda _: _trim(cache()))
        return view

    def _trim(self) -> None:
        """Evicts what is not in use, the least recently used first, until the budget is kept."""
        for key, entry in list(self._entries.items()):
            if self.used_bytes <= self.cache_bytes:
                return
            if not entry.in_use:
                del self._entries[key]
                self.used_bytes -= entry.features.nbytes
                self.num_evicted += 1


def _trim(cache: VisionEncoder | None) -> None:
    if cache is not None:
        cache._trim()


@contextmanager
def _in_eval(tower: nn.Module) -> Iterator[None]:
    """Sets the flags alone, and puts each back: `eval()` and `train()` of a module may do more."""
    training = [module for module in tower.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def vision_stats(encoder: VisionEncoder | None) -> dict[str, int]:
    """images_encoded, image_hits: distinct images of a step that the tower saw, and that were found instead.
    image_evictions: features dropped to keep the budget. image_bytes: held now. All 0 without a tower."""
    return {
        "images_encoded": encoder.num_encoded if encoder else 0,
        "image_hits": encoder.num_hits if encoder else 0,
        "image_evictions": encoder.num_evicted if encoder else 0,
        "image_bytes": encoder.used_bytes if encoder else 0,
    }


def place(hidden: torch.Tensor, parts: Iterable[tuple[int, torch.Tensor]]) -> Deepstack | None:
    """Writes image features over the embeddings of their placeholders.

    hidden: float [T, hidden], written. parts: (row of the first token, float [tokens, 1 + num_deepstack, hidden]).
    Returns what the decoder adds after its first layers, None where there is nothing to add.
    """
    rows, levels = [], []
    for row, part in parts:
        hidden[row : row + len(part)] = part[:, 0]
        if len(part) and part.shape[1] > 1:
            rows.append(torch.arange(row, row + len(part), device=hidden.device))
            levels.append(part[:, 1:])
    if not rows:
        return None
    return Deepstack(torch.cat(rows), torch.cat(levels).transpose(0, 1).contiguous())
