"""Which specialisations of the Triton kernels are compiled, without a GPU, for every chip that is supported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

# The families that have a triton_kernel.py with a list TARGETS.
FAMILIES = ("layers", "policy_loss", "sampling", "vision_prune")


@dataclass(frozen=True)
class TritonTarget:
    """One specialisation of a Triton kernel.

    kernel: the function under @triton.jit. signature: argument -> Triton type ("*bf16", "i32", "fp32"); pointers
    and the integers named in `divisible` are compiled as multiples of 16, as Triton's launcher finds them.
    constants: argument -> value of each tl.constexpr. matrix: whether its machine code must hold matrix instructions.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False


def triton_targets() -> Iterator[tuple[str, TritonTarget]]:
    """(family, target) of every registered kernel; imports Triton."""
    for family in FAMILIES:
        for target in import_module(f"foveate.kernels.{family}.triton_kernel").TARGETS:
            yield family, target
