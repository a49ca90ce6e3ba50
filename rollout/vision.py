"""Image features: the model's own tower, once for each image content and vision version."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from foveate.rollout.models.spec import Deepstack, VisionSpec
from foveate.rollout.processor import ImageInput
from foveate.rollout.pruners.protocol import TowerAttention


class _Entry:
    """Features in the cache, and the one view of them that was handed out and whose holders use them.

    is_alone: no other image passed the tower with it. attention: what the tower's attention said, if it was asked, or
    as text what computing that raised.
    """

    def __init__(self, features: torch.Tensor, is_alone: bool, attention: TowerAttention | str | None):
        self.features = features
        self.is_alone = is_alone
        self.attention = attention
        self.view: weakref.ref[torch.Tensor] | None = None

    @property
    def in_use(self) -> bool:
        return self.view is not None and self.view() is not None

    @property
    def nbytes(self) -> int:
        extra = (self.attention.scores, self.attention.keys) if isinstance(self.attention, TowerAttention) else ()
        return sum(tensor.nbytes for tensor in (self.features, *extra))


class VisionEncoder:
    """Encodes images and keeps features, least recently used out first, within a byte budget.

    Features are in use while anyone holds the tensor that `encode` returned. Those are never evicted, so that the
    cache exceeds its budget where they alone do; it shrinks as soon as they are let go. The tower runs in eval mode,
    whatever mode a trainer has left it in: dropout must not stay in what is kept. each_alone: images pass the tower one
    by one, so that features do not depend on which came together. backend: of `foveate.kernels.vision_prune`.
    """

    def __init__(
        self,
        spec: VisionSpec,
        dtype: torch.dtype,
        cache_bytes: int,
        each_alone: bool = False,
        backend: str | None = None,
    ):
        self.spec = spec
        self.dtype = dtype
        self.cache_bytes = cache_bytes
        self.each_alone = each_alone
        self.backend = backend
        self.version = 0  # of the tower's weights
        self.used_bytes = 0
        self.num_encoded = 0
        self.num_hits = 0
        self.num_evicted = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def encode(
        self, images: Iterable[ImageInput], selected: Mapping[bytes, bool] | None = None
    ) -> dict[bytes, torch.Tensor]:
        """-> float [tokens, 1 + num_deepstack, hidden] by content hash, equal images encoded once.

        selected: content hashes of images whose tokens are about to be selected, and whether by the tower's attention.
        They pass the tower one by one, so that what is selected does not depend on which images came together.
        """
        wanted, selected = {image.content_hash: image for image in images}, selected or {}
        features = {key: self._hand_out(key) for key in wanted if self._serves(key, selected)}
        num_hits = len(features)
        missing = [image for key, image in wanted.items() if key not in features]
        for image, entry in self._entries_of(missing, selected):
            self._store(image.content_hash, entry)
            features[image.content_hash] = self._hand_out(image.content_hash)
        self.num_encoded += len(missing)
        self._trim()
        self.num_hits += num_hits  # nothing is counted if the tower fails
        return features

    def attention_of(self, content_hash: bytes) -> TowerAttention | str | None:
        """What the tower's attention said about an image whose features are held; text if computing it failed."""
        return self._entries[content_hash].attention

    def clear(self, version: int | None = None) -> None:
        """Forgets all features, as after a change of the tower's weights; version: of the new ones."""
        self._entries.clear()
        self.used_bytes = 0
        self.version = self.version if version is None else version

    def _serves(self, key: bytes, selected: Mapping[bytes, bool]) -> bool:
        """Whether the cache holds what is asked for."""
        entry = self._entries.get(key)
        if entry is None or key not in selected:
            return entry is not None
        return entry.is_alone and (isinstance(entry.attention, TowerAttention) or not selected[key])

    def _store(self, key: bytes, entry: _Entry) -> None:
        if key in self._entries:
            self.used_bytes -= self._entries[key].nbytes
        self._entries[key] = entry
        self.used_bytes += entry.nbytes

    def _entries_of(self, images: list[ImageInput], selected: Mapping[bytes, bool]) -> list[tuple[ImageInput, _Entry]]:
        """What the tower gives for images, before any of it is stored."""
        batches: list[list[ImageInput]] = []  # that pass the tower together
        shared, made = [], []
        for image in images:
            if selected.get(image.content_hash):
                feature, attention = self._run_attended(image)
                made.append((image, _Entry(feature.to(self.dtype), True, attention)))
            elif self.each_alone or image.content_hash in selected:
                batches.append([image])
            else:
                shared.append(image)
        for batch in [*batches, shared] if shared else batches:
            features = self._run_tower(batch)
            made += [(i, _Entry(f.to(self.dtype), len(batch) == 1, None)) for i, f in zip(batch, features, strict=True)]
        return made

    def _run_tower(self, images: Sequence[ImageInput]) -> list[torch.Tensor]:
        with _in_eval(self.spec.tower):
            return self.spec.encode(*self._inputs(images))

    def _run_attended(self, image: ImageInput) -> tuple[torch.Tensor, TowerAttention | str]:
        """Features, and what the attention says. Where that fails the tower runs without: others need the features."""
        try:
            with _in_eval(self.spec.tower):
                return self.spec.encode_attended(*self._inputs([image]), self.backend)
        except Exception as error:  # text, as an exception holds memory
            reason = repr(error)
        return self._run_tower([image])[0], reason

    def _inputs(self, images: Sequence[ImageInput]) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(self.spec.tower.parameters()).device
        pixels = torch.cat([image.pixel_values.to(device) for image in images])
        return pixels, torch.stack([image.grid_thw for image in images]).to(device)

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
                self.used_bytes -= entry.nbytes
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
