"""Data parallel training: every rank has an engine and a share of each step's prompts, and gradients are added up.

The ranks are those of the process group that the caller (or torchrun) has initialised; without one there is a single
rank and nothing here does anything. All ranks are handed the same prompts, configuration and weights.

What is exact: which prompts a step has, their seeds, learning rates, rewards, advantages and token weights are those of
one rank with the whole batch. What differs by rounding: log-probs (a batch of another size) and gradients (a sum in
another order); in float32 they agree to about 1e-6 of their size. Tokens are equal unless two scores of a draw lie
within that rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
BUCKET_ELEMENTS = 16 << 20  # 64 MiB of float32 a message


class Gathered(NamedTuple, Generic[T]):
    """items: of all ranks, rank 0's first. own: where this rank's stand."""

    items: list[T]
    own: slice


def rank() -> int:
    """This process's place, 0 without a process group."""
    return dist.get_rank() if _is_parallel() else 0


def size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if _is_parallel() else 1


def share(items: Sequence[T]) -> list[T]:
    """This rank's part of a list all ranks have: consecutive, and at most one longer than another's."""
    least, longer = divmod(len(items), size())
    start = rank() * least + min(rank(), longer)
    return list(items[start : start + least + (rank() < longer)])


def gather(items: Sequence[T]) -> Gathered[T]:
    """What all ranks hand in, which can be pickled; after `share`, in the order of before."""
    parts: list[Any] = [list(items)]
    if size() > 1:
        parts = [None] * size()
        dist.all_gather_object(parts, list(items))
    start = sum(len(part) for part in parts[: rank()])
    return Gathered([item for part in parts for item in part], slice(start, start + len(items)))


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every parameter's gradient becomes the sum over the ranks, added in float32.

    A rank that has no gradient for a parameter adds 0; where no rank has one, there is none.
    """
    parameters = list(parameters)
    if size() == 1 or not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    for bucket in _buckets([p for p, found in zip(parameters, present.tolist(), strict=True) if found]):
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
        ).float()
        dist.all_reduce(flat)
        for parameter, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)


def check_same(**values: Any) -> None:
    """Raises ValueError on every rank if one of the values is not the same on all, naming the first."""
    for name, value in values.items():
        found = gather([repr(value)]).items
        if len(set(found)) > 1:
            raise ValueError(f"expected the same on every rank, got {[text[:80] for text in found]} ({name})")


@torch.no_grad()
def fingerprint(model: nn.Module) -> tuple[float, ...]:
    """A few sums over all parameters, equal for equal weights; () where there is one rank only."""
    if size() == 1:
        return ()
    sums = [(p.double().sum(), p.double().square().sum()) for p in model.parameters()]
    return tuple(torch.tensor(sums, dtype=torch.float64, device="cpu").sum(0).tolist())


@contextmanager
def torchrun_group() -> Iterator[None]:
    """Joins the ranks that torchrun has started (its environment variables) and leaves them at the end.

    gloo for the CPU, NCCL where there are GPUs, of which each rank takes the one of its LOCAL_RANK. Does nothing in a
    process that torchrun has not started, or where a group is there already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _is_parallel():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters together as large as one message, in order; a larger one is a message of its own."""
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        if bucket and elements + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    if bucket:
        yield bucket
