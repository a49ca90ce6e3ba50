"""Checkpoints: a directory that `from_pretrained` loads, and beside the weights what training needs to go on.

config.json, model*.safetensors   the model, as its save_pretrained writes it; of a LoRA model of `peft`, the adapter
trainer.safetensors               optimiser state as "optimizer/<key>/<parameter>", generators as "rng/<rank>/<kind>",
                                  and as "parameter/<name>" what is trained and save_pretrained has not written under
                                  the name it has in the module
trainer.json                      step, settings, and other plain values

Weights are read from safetensors by name, into the parameters that are there. Frozen ones are not read: they must be
what they were, which a checksum tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from foveate.rollout import generators, parallel
from foveate.rollout.atomic import fresh_folder, recover
from foveate.rollout.checks import require
from foveate.rollout.resumption import checksum


def save(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint; `directory` appears complete or not at all, and an older one stays until then.

    write_more: writes what else belongs to it, into the folder it is called with. Every rank calls this, because the
    generators of all are saved; rank 0 writes. What a killed process left of the same checkpoint is removed: one run
    at a time writes to a directory.
    """
    everyone = parallel.gather([generators.states(_device(model))]).items
    if parallel.rank() > 0:
        return
    rng = {f"rng/{rank}/{kind}": part for rank, parts in enumerate(everyone) for kind, part in parts.items()}
    with fresh_folder(directory) as fresh:
        model.save_pretrained(fresh)  # type: ignore[operator]
        tensors = {**_unwritten(model, fresh), **_optimizer_tensors(model, optimizer), **rng}
        save_file(tensors, fresh / "trainer.safetensors")
        content = {"optimizer": type(optimizer).__name__, "frozen": checksum(_frozen(model)), "state": state}
        (fresh / "trainer.json").write_text(json.dumps(content, indent=2))
        if write_more is not None:
            write_more(fresh)


def read_state(directory: Path) -> dict[str, Any]:
    """The `state` a checkpoint was saved with. Every rank calls it."""
    return _content(directory)["state"]


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Reads a checkpoint into the same Parameter objects and returns the `state` it was saved with.

    Sets this rank's generators to where they were: Python's, numpy's, torch's of the CPU and of the model's device.
    Every rank calls it. Raises ValueError, before anything has changed, if it is of another model or optimiser.
    """
    content = _content(directory)
    kind = type(optimizer).__name__
    require(content["optimizer"] == kind, f"a checkpoint of {kind}", content["optimizer"], "directory")
    tensors = load_file(directory / "trainer.safetensors")
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loaded = {**_written(directory), **_of("parameter/", tensors)}
    missing = sorted(set(own) - set(loaded))
    require(not missing, "weights of every parameter", missing[:3], "directory")
    for name, parameter in own.items():
        wanted, got = ((list(x.shape), x.dtype) for x in (parameter, loaded[name]))
        require(got == wanted, f"{wanted}", got, name)
    frozen = content.get("frozen")
    require(frozen == checksum(_frozen(model)), "the frozen weights with which the run was begun", "others", "model")
    found = {name.split("/", 2)[2] for name in tensors if name.startswith("optimizer/")}
    require(found <= set(own), "optimiser state of this model's parameters", sorted(found - set(own))[:3], "directory")
    rng = _of(f"rng/{parallel.rank()}/", tensors)
    generators.check(rng)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(loaded[name])
    _load_optimizer(own, optimizer, tensors)
    generators.restore(rng, _device(model))
    return content["state"]


def saved(folder: Path) -> list[Path]:
    """The checkpoints `step-<n>` in a folder, by n, also one that a killed process moved aside: `load` finds it."""
    names = (re.fullmatch(r"(step-(\d+))|\.(step-(\d+))\.old-\d+", path.name) for path in folder.glob("*step-*"))
    steps = {int(match[2] or match[4]): match[1] or match[3] for match in names if match}
    return [folder / steps[step] for step in sorted(steps)]


def _content(directory: Path) -> dict[str, Any]:
    if parallel.rank() == 0:
        recover(directory)
    parallel.gather([None])  # the others look when it is there
    require((directory / "trainer.json").is_file(), "a checkpoint directory", str(directory), "directory")
    return json.loads((directory / "trainer.json").read_text())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _of(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _written(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors that save_pretrained wrote, by their names in its files; mapped, not read."""
    paths = [path for path in directory.glob("*.safetensors") if path.name != "trainer.safetensors"]
    return {name: tensor for path in sorted(paths) for name, tensor in load_file(path).items()}


def _unwritten(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """What is trained and does not stand in the model's files bit for bit under its own name.

    Adapters are saved under other names than they have in the module, and a type that wraps a projection renames it.
    """
    written, found = _written(folder), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value, other = parameter.detach().cpu(), written.get(name)
            if other is None or other.dtype != value.dtype or not torch.equal(other, value):
                # A part of a larger storage would be taken for one that is tied to the other parts.
                found[f"parameter/{name}"] = value.clone(memory_format=torch.contiguous_format)
    return found


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {
        f"optimizer/{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {
        name: value.contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value, device="cpu")
        for name, value in found.items()
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
