"""Chooses which implementation of a kernel family runs, and holds the argument check of all families.

Backends: "reference" (plain torch, the definition of correct), "cpp" (foveate._C on the CPU), "triton", "cuda"
(foveate._C on a GPU). The order of precedence: the caller's explicit request, then the environment variable
FOVEATE_BACKEND ("reference", or by family: "sampling=cuda,layers=triton"), then the best one that is there. A bare
name must be one that every family of the call has: an engine's paged_attention has no "triton".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from foveate import _C

BACKENDS = ("reference", "cpp", "triton", "cuda")
ENVIRONMENT_VARIABLE = "FOVEATE_BACKEND"

# What each family has, the best first.
_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "layers": ("cuda", "triton", "cpp", "reference"),
    "paged_attention": ("cuda", "cpp", "reference"),
    "policy_loss": ("cuda", "triton", "cpp", "reference"),
    "sampling": ("cuda", "triton", "cpp", "reference"),
    "vision_prune": ("cuda", "triton", "cpp", "reference"),
}
FAMILIES = tuple(_IMPLEMENTED)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CPU = torch.device("cpu")


def choose(
    family: str, requested: str | None = None, device: torch.device = _CPU, dtype: torch.dtype = torch.float32
) -> str:
    """Name of the backend that serves `family` on `device`: the requested one, FOVEATE_BACKEND, or the best there.

    dtype: of the floating arguments; float64 is served by the reference alone. Raises ValueError, naming the family
    and what is missing, when the requested backend (by argument or by FOVEATE_BACKEND) cannot run: an explicit
    request never falls back.
    """
    backend, source = _requested(family, requested)
    if backend is None:
        return _best(family, device, dtype)
    missing = _why_not(family, backend, device, dtype)
    if missing is not None:
        raise ValueError(f"expected a backend of {family} for {device}, got {backend!r}: {missing} ({source})")
    return backend


def choose_among(
    backends: Sequence[str],
    operation: str,
    family: str,
    requested: str | None = None,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
) -> str:
    """`choose` for an operation that has only some `backends` of its family.

    A backend asked for by its name that it lacks is a ValueError that names the operation. FOVEATE_BACKEND, and an
    argument "family=name" (`for_family`), speak of the family: an operation that lacks what they name takes the best
    it has, as it does where nothing is asked for.
    """
    asked, _ = _requested(family, requested)
    if asked is None or asked in backends:
        chosen = choose(family, requested, device, dtype)
        return chosen if chosen in backends else _best(family, device, dtype, backends)
    choose(family, requested, device)  # what is asked for exists, for the rest of the family
    if requested is not None and "=" not in requested:
        raise ValueError(f"expected one of {tuple(backends)}, which {operation} has, got {asked!r} (backend)")
    return _best(family, device, dtype, backends)


def is_named(family: str, requested: str | None) -> bool:
    """Whether the argument or FOVEATE_BACKEND names a backend of the family."""
    return _requested(family, requested)[0] is not None


def for_family(family: str, requested: str | None) -> str | None:
    """A backend asked for by its name, as a request that speaks of the family; others as they are."""
    return f"{family}={requested}" if requested and "=" not in requested else requested


def available(family: str, device: torch.device = _CPU) -> tuple[str, ...]:
    """The backends of a family that can run on `device`, the best first."""
    return tuple(backend for backend in _IMPLEMENTED[family] if _missing(backend, device) is None)


def explain(family: str, device: torch.device = _CPU) -> str:
    """One line: which backend serves the family on `device`, and why none better does."""
    backend, source = _requested(family, None)
    if backend is not None:
        return f"{choose(family, None, device)}: {source} asks for it"
    chosen = _best(family, device)
    native = ("cuda", "triton") if device.type == "cuda" else ("cpp",)
    better = native[: native.index(chosen)] if chosen in native else native
    reasons = [f"{backend}: {_why_not(family, backend, device)}" for backend in better]
    return f"{chosen} ({'; '.join(reasons)})" if reasons else f"{chosen}, the best for {device.type}"


def check_request(requested: str | None, argument: str = "backend") -> None:
    """Raises ValueError unless `requested` is None, a backend, or "family=backend,family=backend"."""
    for family in FAMILIES if requested is not None else ():
        backend, _ = _requested(family, requested)
        known = backend is None or backend in BACKENDS
        require(known, f"one of {BACKENDS}, or family=backend of {FAMILIES}", requested, argument)


def require(condition: bool, expected: str, got: object, argument: str) -> None:
    """Raises `ValueError("expected ..., got ... (argument)")` unless condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got!r} ({argument})")


def stream_of(tensor: torch.Tensor) -> int:
    """The current CUDA stream of the tensor's device as an address; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _requested(family: str, requested: str | None) -> tuple[str | None, str]:
    """(backend or None, where it was asked for) of `name` or `family=name,family=name`."""
    source = "backend"
    if requested is None:
        requested, source = os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    if not requested or "=" not in requested:
        return requested or None, source
    choices = dict(part.strip().partition("=")[::2] for part in requested.split(","))
    known = all(name in FAMILIES and backend in BACKENDS for name, backend in choices.items())
    require(known, f"family=backend, with families {FAMILIES} and backends {BACKENDS}", requested, source)
    return choices.get(family), source


def _best(
    family: str, device: torch.device, dtype: torch.dtype = torch.float32, among: Sequence[str] = BACKENDS
) -> str:
    """The interpreter is for proofs: on the CPU Triton only runs where it is asked for."""
    order = [b for b in _IMPLEMENTED[family] if b in among and (b != "triton" or device.type == "cuda")]
    return next(backend for backend in order if _missing(backend, device, dtype) is None)


def _why_not(family: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    if backend not in BACKENDS:
        return f"the backends are {', '.join(BACKENDS)}"
    if backend not in _IMPLEMENTED[family]:
        return f"{family} has only {', '.join(reversed(_IMPLEMENTED[family]))}"
    return _missing(backend, device, dtype)


def _missing(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot run on `device`; None if it can."""
    if backend != "reference" and dtype not in KERNEL_DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    if backend == "cpp":
        return None if device.type == "cpu" else "it runs on CPU tensors"
    if backend == "cuda":
        if device.type != "cuda":
            return "it runs on CUDA tensors"
        return None if _C.CUDA_VERSION else "foveate._C was built without CUDA"
    if backend == "triton":
        if not _has_triton():
            return "triton is not installed"
        if interpreting():
            return None if device.type == "cpu" else "its interpreter runs on CPU tensors"
        return None if device.type == "cuda" else "it runs on CUDA tensors"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
