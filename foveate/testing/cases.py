"""The sizes at which each kernel is tested, and its random inputs: the same in tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# contiguous: rows one after another. strided: one element between rows, so that hardly a row is aligned.
# offset: contiguous, one element after the start of an aligned buffer. transposed: neighbours of a row are far apart.
LAYOUTS = ("contiguous", "strided", "offset", "transposed")


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    kernel: "<family>.<function>". sizes: name of each dimension -> its size. dtype: of the floating arguments.
    layout: one of LAYOUTS, how the rows of the first argument lie in memory; what lies between them is NaN.
    """

    kernel: str
    sizes: dict[str, int]
    dtype: torch.dtype
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"expected one of {LAYOUTS}, got {self.layout!r} (layout)")
        if self.kernel not in KERNELS:
            raise ValueError(f"expected one of {tuple(KERNELS)}, got {self.kernel!r} (kernel)")

    def __str__(self) -> str:
        """Short and unique, for the name of a test or of a row of results."""
        sizes = [f"{name}{size}" for name, size in self.sizes.items()]
        layout = [] if self.layout == "contiguous" else [self.layout]
        return "-".join([*sizes, str(self.dtype).removeprefix("torch."), *layout])

    def inputs(self, generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments of the kernel, fresh random ones at each call, on the generator's device."""
        return KERNELS[self.kernel].inputs(self, generator)


def cases(kernel: str) -> list[Case]:
    """All cases at which `kernel` ("<family>.<function>") is tested."""
    return KERNELS[kernel].cases()


def spread(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, octaves: int = 4) -> torch.Tensor:
    """dtype [*shape]: either sign, magnitudes evenly spread over 2^-octaves ... 2^octaves, never 0."""
    exponent = (torch.rand(shape, generator=generator, device=generator.device) * 2 - 1) * octaves
    negative = torch.rand(shape, generator=generator, device=generator.device) < 0.5
    return torch.where(negative, -torch.exp2(exponent), torch.exp2(exponent)).to(dtype)


def lay_out(rows: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `rows`, float [M, D], in memory of the given layout; what lies between them is NaN."""
    num_rows, width = rows.shape
    if layout == "contiguous":
        return rows.contiguous()
    if layout == "transposed":
        return rows.t().contiguous().t()
    stride = width + (layout == "strided")
    buffer = torch.full((num_rows * stride + 1,), torch.nan, dtype=rows.dtype, device=rows.device)
    view = buffer[int(layout == "offset") :].as_strided((num_rows, width), (stride, 1))
    return view.copy_(rows)


@dataclass(frozen=True)
class _Kernel:
    cases: Callable[[], list[Case]]
    inputs: Callable[[Case, torch.Generator], dict[str, Any]]


# 0, 1, odd, one below, at and one past a tile, and the widths of two real models.
WIDTHS = (1, 7, 33, 127, 128, 129, 2048, 3584)
ROWS = (0, 1, 2, 5, 17, 129)


def _rms_norm_cases() -> list[Case]:
    sizes = [(9, width) for width in WIDTHS] + [(rows, 129) for rows in ROWS]
    found = [Case("layers.rms_norm", {"rows": m, "D": d}, dtype) for m, d in sizes for dtype in DTYPES]
    for layout in LAYOUTS[1:]:
        found += [Case("layers.rms_norm", {"rows": 5, "D": 136}, dtype, layout) for dtype in DTYPES]
    return found


def _rms_norm_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    rows, width = case.sizes["rows"], case.sizes["D"]
    x = spread((rows, width), case.dtype, generator)
    weight = spread((width,), case.dtype, generator, octaves=1)
    return {"x": lay_out(x, case.layout), "weight": weight, "eps": 1e-6}


KERNELS = {"layers.rms_norm": _Kernel(_rms_norm_cases, _rms_norm_inputs)}
