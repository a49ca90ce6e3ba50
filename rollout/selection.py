"""Selections of image tokens at the encoder: made once, remembered while a prompt needs them, applied to features."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch

from foveate.kernels.vision_prune import Merge, keep_count, merge_tokens
from foveate.rollout.processor import ImageInput, Prompt
from foveate.rollout.pruned import record
from foveate.rollout.pruners import encoder_pruner_of
from foveate.rollout.pruners.protocol import EncodedImage, Kept
from foveate.rollout.pruning import PruneConfig
from foveate.rollout.vision import VisionEncoder

Choice = tuple[bytes, str]  # content hash of an image, hash of a configuration


class Selector:
    """Decides which tokens of an image are kept, for an image, a configuration and a version of the tower only once.

    What a prompt has recorded stands, whatever the weights are now. Else prompts that need the same selection share it
    for as long as one of them is alive.
    """

    def __init__(self, vision: VisionEncoder):
        self.vision = vision
        self.num_tokens = 0  # of images whose features went to a prompt
        self.num_dropped = 0  # those of them that were not kept
        self._known: weakref.WeakValueDictionary[tuple[bytes, str, int], Kept] = weakref.WeakValueDictionary()

    def needs(self, wanted: Iterable[tuple[Prompt, ImageInput]]) -> dict[bytes, bool]:
        """Content hashes of images to select from, and whether by the tower's attention; known selections are noted."""
        needed: dict[bytes, bool] = {}
        for prompt, image in wanted:
            config = _config_of(prompt)
            if config is None or self._recall(prompt, image, config):
                continue
            key = image.content_hash
            needed[key] = needed.get(key, False) or encoder_pruner_of(config).needs_attention
        return needed

    def select(
        self, wanted: Iterable[tuple[Prompt, ImageInput]], features: Mapping[bytes, torch.Tensor]
    ) -> dict[Choice, str]:
        """Selects for prompts whose images have features by content hash; returns what pruners raised instead."""
        groups: dict[str, dict[bytes, list[tuple[Prompt, ImageInput]]]] = {}
        configs: dict[str, PruneConfig] = {}
        for prompt, image in wanted:
            config = _config_of(prompt)
            if config is not None and image.content_hash in features and not self._recall(prompt, image, config):
                configs[config.config_hash] = config
                groups.setdefault(config.config_hash, {}).setdefault(image.content_hash, []).append((prompt, image))
        errors: dict[Choice, str] = {}
        for name, images in groups.items():
            chosen, failed = self._choose(configs[name], {key: features[key] for key in images})
            errors |= {(key, name): reason for key, reason in failed.items()}
            for key, kept in chosen.items():
                self._known[key, name, self.vision.version] = kept
                for prompt, image in images[key]:
                    record(prompt, image, kept)
        return errors

    def apply(self, prompt: Prompt, image: ImageInput, features: torch.Tensor) -> torch.Tensor:
        """float [kept tokens, 1 + num_deepstack, hidden] that enter the prompt; all of them where nothing is pruned."""
        self.num_tokens += len(features)
        kept = prompt.pruning.kept.get(image.content_hash) if prompt.pruning else None
        if kept is None:
            return features
        self.num_dropped += len(features) - len(kept.indices)
        return kept_features(features, kept)

    def _recall(self, prompt: Prompt, image: ImageInput, config: PruneConfig) -> bool:
        """Whether it is known what to keep; the prompt then knows as well."""
        assert prompt.pruning is not None, image.start
        if image.content_hash in prompt.pruning.kept:
            return True
        kept = self._known.get((image.content_hash, config.config_hash, self.vision.version))
        if kept is not None:
            record(prompt, image, kept)
        return kept is not None

    def _choose(
        self, config: PruneConfig, features: dict[bytes, torch.Tensor]
    ) -> tuple[dict[bytes, Kept], dict[bytes, str]]:
        """What is kept by content hash; where a pruner fails each image goes alone, and what then fails is text."""
        counts = {key: keep_count(len(feature), config.keep) for key, feature in features.items()}
        chosen = {key: _all(count, self.vision.version) for key, count in counts.items() if count == len(features[key])}
        rest = [key for key in features if key not in chosen]
        failed: dict[bytes, str] = {}
        images = {}
        for key in rest:
            attention = self.vision.attention_of(key)
            if isinstance(attention, str) and encoder_pruner_of(config).needs_attention:
                failed[key] = attention
            else:
                given = None if isinstance(attention, str) else attention
                images[key] = EncodedImage(key, features[key][:, 0], given)
        rest = list(images)
        for keys in [rest, *([key] for key in rest if len(rest) > 1)]:
            keys = [key for key in keys if key not in chosen]
            try:
                kept = self._ask(config, [images[key] for key in keys], [counts[key] for key in keys])
                chosen |= dict(zip(keys, kept, strict=True))
            except Exception as error:  # as with the tower: whatever it is, it concerns these images alone
                failed |= {key: repr(error) for key in keys if len(keys) == 1}
        return chosen, failed

    def _ask(self, config: PruneConfig, images: list[EncodedImage], counts: list[int]) -> list[Kept]:
        if not images:
            return []
        kept = encoder_pruner_of(config).select(images, counts, self.vision.backend)
        for each, count in zip(kept, counts, strict=True):
            assert len(each.indices) == count, f"{config.method} kept {len(each.indices)} tokens instead of {count}"
        return [Kept(each.indices, each.merge, self.vision.version) for each in kept]


def kept_features(features: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The features of an image's kept tokens, merged where the selection says so; gradients flow to all of them.

    features: float [N, levels, hidden], every level treated alike. Returns float [k, levels, hidden].
    """
    indices = kept.indices.to(features.device)
    if kept.merge is None:
        return features if len(indices) == len(features) else features[indices.long()]
    counts = len(features), len(indices)
    offsets, own = (torch.tensor([0, count], dtype=torch.int32, device="cpu") for count in counts)
    merge = Merge(indices, own, kept.merge.offsets, kept.merge.source, kept.merge.weight)
    return merge_tokens(features.flatten(1), offsets, merge).unflatten(1, features.shape[1:])


def selection_stats(selector: Selector | None) -> dict[str, int]:
    """image_tokens: of images that went to prompts, each time; image_tokens_dropped: those that were pruned before the
    language model. Both 0 without a tower."""
    return {
        "image_tokens": selector.num_tokens if selector else 0,
        "image_tokens_dropped": selector.num_dropped if selector else 0,
    }


def _all(count: int, version: int) -> Kept:
    return Kept(torch.arange(count, dtype=torch.int32, device="cpu"), None, version)


def _config_of(prompt: Prompt) -> PruneConfig | None:
    """The configuration by which the prompt's images are pruned before the language model."""
    config = prompt.pruning.config if prompt.pruning else None
    return config if config is not None and config.site == "encoder" else None
