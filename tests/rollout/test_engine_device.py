"""An engine on a GPU that is not there: what lies where, and that no operator mixes devices."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from foveate.kernels import sampling
from foveate.rollout.config import SamplingParams
from foveate.rollout.models import weights
from foveate.rollout.modes import own_modes
from foveate.rollout.pruning import PruneConfig
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request

TOLERANCE = 5e-5  # as in conftest.py: matrix products of another device are split otherwise
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)  # by indices of the CPU too


class AbsentGpu(TorchDispatchMode):
    """Tensors of the device "meta" get values, which lie on the CPU; operators compute with them.

    What CUDA refuses is refused: tensors of both devices in one operator, but for copies, indices and single numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(tensor.is_meta for tensor in tensors)
        if there and func not in COPIES:
            given = [args[0], *args[2:]] if func in INDEXED else tensors
            mixed = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.dim()]
            if not all(tensor.is_meta for tensor in mixed):
                raise RuntimeError(f"expected all tensors on one device, got both in {func}")
        device = kwargs.get("device")
        if device is not None:
            there = torch.device(device).type == "meta"
            kwargs["device"] = torch.device("cpu")
        given = {id(self.values[tensor]): tensor for tensor in tensors if tensor.is_meta}
        result = func(*tree_map(self._value, args), **tree_map(self._value, kwargs))
        return tree_map(lambda leaf: self._placed(leaf, given) if there else leaf, result)

    def _value(self, leaf: Any) -> Any:
        return self.values[leaf] if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf

    def _placed(self, leaf: Any, given: dict[int, torch.Tensor]) -> Any:
        """The handle of a value; that of an argument which was written in place."""
        if not isinstance(leaf, torch.Tensor) or id(leaf) in given:
            return given.get(id(leaf), leaf)
        handle = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        self.values[handle] = leaf
        return handle

    def move(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                value = tensor.detach().clone()
                moved = torch.empty_like(value, device="meta")
                if name in module._parameters:
                    moved = module._parameters[name] = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                else:
                    module._buffers[name] = moved
                self.values[moved] = value
        return model


class LiteralsKeepTheirValues(TorchFunctionMode):
    """Lists that become tensors of the device "meta" would lose what is in them before an operator sees it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1], dtype=torch.int64).to(args[0].device), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def absent_gpu(monkeypatch) -> Iterator[AbsentGpu]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no "meta"
    monkeypatch.setattr(weights, "has_values", lambda param: True)
    with LiteralsKeepTheirValues(), AbsentGpu() as gpu:
        yield gpu


def requests_of(chat, picture) -> list[Request]:
    """Penalties and filters of every kind, and groups that share an image; the first lasts longest."""
    return [
        Request([3] * 9, n=4, sampling=SamplingParams(max_tokens=20, seed=4, ignore_eos=True)),
        chat("what?", [picture(56, 84)], n=3, max_tokens=5, seed=1),
        chat("and now?", [picture(84, 56), picture(56, 84)], max_tokens=9, seed=2, top_k=5, top_p=0.9, min_p=0.01),
        chat("see", n=2, max_tokens=7, seed=3, repetition_penalty=1.2, min_tokens=2, logit_bias={5: 1.0}),
    ]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seeds", "steps")


def noting(function: Callable, given: list[torch.Tensor]) -> Callable:
    """The function, and what it is given for each sample is noted."""

    def noted(*args, **kwargs):
        given.extend(kwargs[name] for name in COLUMNS if kwargs[name] is not None)
        return function(*args, **kwargs)

    return noted


ENGINES = {
    "in chunks": ("qwen2_5_vl", {"max_batch_tokens": 16}),
    "deepstack": ("qwen3_vl", {}),
    "preempted": ("qwen2_vl", {"kv_memory": 40_000}),
    "shadow": ("qwen2_5_vl", {"dtype": torch.bfloat16}),
    **{name: ("qwen2_5_vl", {"prune": PruneConfig(name)}) for name in ("random", "strided", "visionzip", "divprune")},
    "fastv": ("qwen2_5_vl", {"prune": PruneConfig("fastv", layer=1)}),
    "pyramiddrop": ("qwen3_vl", {"prune": PruneConfig("pyramiddrop", layers=(1, 2))}),
}


@pytest.mark.parametrize(("family", "fields"), ENGINES.values(), ids=ENGINES)
def test_an_engine_on_another_device(family, fields, make_engine, chat, picture, monkeypatch):
    """It gives what it gives on the CPU, and there lies all that it hands out."""
    fields = {**fields, "backend": "reference", "fuse": False}
    requests, given = requests_of(chat, picture)["kv_memory" not in fields :], []
    expected = make_engine(family, **fields).generate(requests, strict=True)
    for name in ("sample", "sample_from_hidden"):
        monkeypatch.setattr(sampling, name, noting(getattr(sampling, name), given))
    with absent_gpu(monkeypatch) as gpu:
        engine = make_engine(gpu.move(tiny_model(family)), **fields)
        found = engine.generate(requests, strict=True)
        scores = engine.score(found)
    assert (engine.stats()["preempted"] > 0) == ("kv_memory" in fields)
    for group, other, scored in zip(found, expected, scores, strict=True):
        assert {tensor.device.type for tensor in tensors_in(group)} == {"cpu"}
        for rollout, same, values in zip(group.rollouts, other.rollouts, scored, strict=True):
            assert torch.equal(rollout.token_ids, same.token_ids)
            torch.testing.assert_close(rollout.logprobs, same.logprobs, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(values, same.logprobs, rtol=0, atol=TOLERANCE)
    # What samples are drawn with is checked, without waiting for the device.
    assert given
    assert {value.device.type for value in given} == {"cpu"}


@pytest.mark.parametrize("mode", [nullcontext, lambda: torch.device("meta")], ids=["no default", "another default"])
def test_the_cpu_is_the_default_of_every_engine(mode):
    with mode():
        for name in ("cpu", "cuda"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # autocast, where there is no GPU
                with own_modes(torch.device(name)):
                    assert torch.zeros(0).device.type == torch.get_default_device().type == "cpu"


MIXED = {
    "sum": lambda here, there: here + there,
    "concatenation": lambda here, there: torch.cat([here, there]),
    "rows": lambda here, there: torch.nn.functional.embedding(here.long(), there[:, None]),
    "values of an index": lambda here, there: there.index_put_((here.long(),), here),
}
FITTING = {
    "a number": lambda here, there: there * here[0] + 2,
    "index": lambda here, there: there[here.long()],
    "copy": lambda here, there: there.copy_(here),
    "numbers made there": lambda here, there: torch.tensor([1.0, 2.0], device=there.device) + there[[0, 1]],
}


@pytest.mark.parametrize("case", [*MIXED, *FITTING])
def test_the_absent_gpu_refuses_what_a_gpu_refuses(case, monkeypatch):
    run, here = {**MIXED, **FITTING}[case], torch.tensor([1.0, 0.0])
    refused = pytest.raises(RuntimeError, match="one device") if case in MIXED else nullcontext()
    with absent_gpu(monkeypatch), refused:
        assert torch.equal(run(here, here.to("meta")).cpu(), run(here, here.clone()))
