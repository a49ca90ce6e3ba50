"""Chooses which implementation of a kernel family runs, and holds the argument check of all families.

Backends: "reference" (plain torch, the definition of correct), "cpp", "triton", "cuda". The order of precedence:
the caller's explicit request, then the environment variable FOVEATE_BACKEND, then the first one available.
"""

from __future__ import annotations

import os

BACKENDS = ("reference", "cpp", "triton", "cuda")
ENVIRONMENT_VARIABLE = "FOVEATE_BACKEND"

# Per family, the best first.
_AVAILABLE: dict[str, tuple[str, ...]] = {
    "sampling": ("reference",),
    "paged_attention": ("reference",),
    "policy_loss": ("reference",),
    "layers": ("reference",),
}


def choose(family: str, requested: str | None = None) -> str:
    """Name of the backend that serves `family`: the requested one, FOVEATE_BACKEND, or the best available.

    Raises ValueError, naming the family and what is available, when the requested backend (by argument or by
    FOVEATE_BACKEND) is not there: an explicit request never falls back.
    """
    available = _AVAILABLE[family]
    source = "backend"
    if requested is None:
        requested = os.environ.get(ENVIRONMENT_VARIABLE) or available[0]
        source = ENVIRONMENT_VARIABLE
    if requested not in available:
        known = "" if requested in BACKENDS else f", one of the names {BACKENDS}"
        raise ValueError(f"expected a backend of {family} among {available}{known}, got {requested!r} ({source})")
    return requested


def require(condition: bool, expected: str, got: object, argument: str) -> None:
    """Raises `ValueError("expected ..., got ... (argument)")` unless condition holds."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got!r} ({argument})")
