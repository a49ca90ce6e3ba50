"""Native parts of foveate, built from csrc/ and bindings/."""

from collections.abc import Sequence
from typing import Any

COMPILER: str
CUDA_VERSION: str | None  # of nvcc; None without CUDA
CUDA_ARCHS: str  # chips the kernels were compiled for, "80 90a 100"
RMS_NORM_GRADIENT_ROWS: int

# Tensors are torch's; a stream is the address of a cudaStream_t. Raise ValueError where a tensor does not fit.
def rms_norm(x: Any, weight: Any, eps: float, out: Any, scale: Any, stream: int = 0) -> None: ...
def rms_norm_backward(
    grad: Any, x: Any, weight: Any, scale: Any, grad_x: Any, grad_weight: Any, stream: int = 0
) -> None: ...
def sample(
    logits: Any,
    temperature: Any,
    top_k: Any | None,
    top_p: Any | None,
    min_p: Any | None,
    seeds: Any | None,
    steps: Any | None,
    banned: Any | None,
    given: Any | None,
    token_ids: Any | None,
    values: Any,
    stream: int = 0,
) -> None: ...

class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for."""

class PagePool:
    def __init__(self, num_pages: int) -> None: ...
    def allocate(self, n: int) -> list[int]: ...
    def free(self, pages: Sequence[int]) -> None: ...
    def is_used(self, page: int) -> bool: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...
