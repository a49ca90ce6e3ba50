"""What a run must have in common with the one whose checkpoint it goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from foveate.rollout.checks import require
from foveate.rollout.grpo import GRPOConfig
from foveate.rollout.pruning import PruneConfig
from foveate.rollout.types import Request

# Options of which the numbers of a step do not depend; those that move them by rounding are for a run short of memory.
ONLY_ROUNDING = ("micro_batch_size", "micro_batch_tokens", "prefix_grouping", "gradient_checkpointing")
MAY_CHANGE = ("save_every", "eval_every", "log_every", "progress", "tensorboard", "reward_workers", *ONLY_ROUNDING)
CHUNK_ELEMENTS = 1 << 22


def settings_of(config: GRPOConfig) -> dict[str, Any]:
    """The options that a resumed run must repeat, by name.

    max_steps is one of them where the learning rate, the KL penalty's weight or the share of pruned groups follows it;
    else a run may go on longer.
    """
    constant = config.schedule == config.kl_schedule == "constant" and config.pruned_share_end is None
    free = {*MAY_CHANGE, "max_steps"} if constant else {*MAY_CHANGE}
    return {name: value for name, value in asdict(config).items() if name not in free}


def pruning_of(config: PruneConfig | None) -> dict[str, Any] | None:
    """A pruning configuration as JSON has it, its defaults spelt out."""
    return None if config is None else {"method": config.method, "keep": config.keep, **config.options}


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError for the first setting that is not as it was; before may have been through JSON."""
    now = json.loads(json.dumps(now))
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        require(old == new, f"{name} = {old!r}, with which the run was begun", new, name)


def prompt_fingerprint(requests: Iterable[Request]) -> str:
    """16 hex digits of what the requests ask and what their rewards compare with, in order.

    Of an image in a file it is the file's name alone, so that data may move to another folder.
    """
    digest = hashlib.blake2b(digest_size=8)
    for request in requests:
        asked = [request.prompt, request.images, request.n, asdict(request.sampling), request.prefix_len]
        inputs = request.vision and [request.vision.pixel_values, request.vision.image_grid_thw]
        pruned = pruning_of(request.prune) if isinstance(request.prune, PruneConfig) else request.prune
        content = [*asked, inputs, request.metadata, pruned]
        digest.update(json.dumps(content, default=_plain, skipkeys=True).encode() + b"\n")
    return digest.hexdigest()


@torch.no_grad()
def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits of names, shapes and bits, in exact integer sums: the same on every device."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        chunks = tensor.detach().contiguous().view(kind).flatten().split(CHUNK_ELEMENTS)
        sums = [int(chunk.sum(dtype=torch.int64)) for chunk in chunks]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {sums}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON does not know: content where it is known, else the kind of thing it is."""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), checksum({"": value})]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (bytes, bytearray)):
        return hashlib.blake2b(value, digest_size=8).hexdigest()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), _plain(value.tobytes())]
    if hasattr(value, "tobytes"):  # an image
        return [str(getattr(value, "mode", "")), list(getattr(value, "size", ())), _plain(value.tobytes())]
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    return type(value).__qualname__
