"""Checkpoints: a directory that `from_pretrained` loads, and beside the weights what training needs to go on.

config.json, model*.safetensors   the model, as save_pretrained writes it
trainer.safetensors               optimiser state as "optimizer/<key>/<parameter>", generator states as "rng/<device>"
trainer.json                      step and other plain numbers
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from foveate.rollout.config import require


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Writes a checkpoint; `directory` appears complete or not at all, and an older one stays until then.

    What a killed process left of the same checkpoint is removed: one process at a time writes to a directory.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    _recover(directory)
    fresh = directory.with_name(f".{directory.name}.writing-{os.getpid()}")
    for left in directory.parent.glob(f".{directory.name}.writing-*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        model.save_pretrained(fresh)  # type: ignore[operator]
        save_file({**_optimizer_tensors(model, optimizer), **_rng_tensors()}, fresh / "trainer.safetensors")
        content = {"optimizer": type(optimizer).__name__, "state": state}
        (fresh / "trainer.json").write_text(json.dumps(content, indent=2))
        _sync(fresh)
        _replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Reads a checkpoint into the same Parameter objects and returns the `state` it was saved with.

    Sets torch's generators of the CPU and of the model's device to where they were. Raises ValueError, before anything
    has changed, if it is of another model or of another optimiser.
    """
    _recover(directory)
    require((directory / "trainer.json").is_file(), "a checkpoint directory", str(directory), "directory")
    content = json.loads((directory / "trainer.json").read_text())
    kind = type(optimizer).__name__
    require(content["optimizer"] == kind, f"a checkpoint of {kind}", content["optimizer"], "directory")
    tensors = load_file(directory / "trainer.safetensors")
    own = dict(model.named_parameters())
    read: Any = type(model)
    other_model, info = read.from_pretrained(directory, dtype=model.dtype, output_loading_info=True)
    require(not info["missing_keys"], "weights of every parameter", sorted(info["missing_keys"])[:3], "directory")
    loaded = dict(other_model.named_parameters())
    for name, parameter in own.items():
        other = loaded.get(name)
        got = None if other is None else (list(other.shape), other.dtype)
        require(got == (list(parameter.shape), parameter.dtype), f"{list(parameter.shape)}", got, name)
    found = {name.split("/", 2)[2] for name in tensors if name.startswith("optimizer/")}
    require(found <= set(own), "optimiser state of this model's parameters", sorted(found - set(own))[:3], "directory")
    require("rng/cpu" in tensors, "the state of the generators", sorted(tensors)[:3], "directory")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(loaded[name])
    _load_optimizer(own, optimizer, tensors)
    _load_rng(tensors)
    return content["state"]


def saved(folder: Path) -> list[Path]:
    """The checkpoints `step-<n>` in a folder, by n, also one that a killed process moved aside: `load` finds it."""
    names = (re.fullmatch(r"(step-(\d+))|\.(step-(\d+))\.old-\d+", path.name) for path in folder.glob("*step-*"))
    steps = {int(match[2] or match[4]): match[1] or match[3] for match in names if match}
    return [folder / steps[step] for step in sorted(steps)]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optimizer/{key}/{name}": torch.as_tensor(value).contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        kind, key, *rest = full_name.split("/", 2)
        if kind == "optimizer":
            parameter = parameters[rest[0]]
            # The tensors of a file may be mapped into memory: the optimiser writes into its own.
            optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


def _rng_tensors() -> dict[str, torch.Tensor]:
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["rng/cuda"] = torch.cuda.get_rng_state()
    return states


def _load_rng(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _replace(fresh: Path, directory: Path) -> None:
    """Renames fresh to directory. A directory cannot be renamed over a full one: that one steps aside first."""
    aside = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    if directory.exists():
        os.replace(directory, aside)
    try:
        os.replace(fresh, directory)
    except BaseException:
        if aside.exists():
            os.replace(aside, directory)
        raise
    _sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _recover(directory: Path) -> None:
    """Puts a checkpoint back that stepped aside for one whose writer was killed before it took the place."""
    left = sorted(directory.parent.glob(f".{directory.name}.old-*"), key=lambda path: path.stat().st_mtime)
    if left and not directory.exists():
        os.replace(left.pop(), directory)
    for path in left:  # their writers were killed after that
        shutil.rmtree(path, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Files of a fresh checkpoint reach the disk before its name does."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
