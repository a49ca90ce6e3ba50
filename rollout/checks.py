"""Checks of what callers give, and values as errors show them. `ValueError("expected ..., got ... (argument)")`."""

from __future__ import annotations

import reprlib
from dataclasses import fields
from typing import Any

import numpy as np


class _Short(reprlib.Repr):
    """repr() of a bounded length, also of values whose own repr() fails."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlong = 60
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"an int of {x.bit_length()} bits"


_SHORT = _Short()


def shown(value: object) -> str:
    """The value as error messages show it: its repr, cut to a few hundred characters."""
    return cut(_SHORT.repr(value))


def cut(text: object) -> str:
    """str(text), an error for instance, cut to a few hundred characters."""
    text = str(text)
    return text if len(text) <= 400 else f"{text[:397]}..."


def require(condition: bool, expected: str, got: object, argument: str) -> None:
    """Raises `ValueError("expected ..., got ... (argument)")` unless condition holds; a long value is cut."""
    if not condition:
        raise ValueError(f"expected {expected}, got {shown(got)} ({argument})")


def is_int(value: object) -> bool:
    """An int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """An int or float, NaN and infinities among them, that is no bool."""
    return isinstance(value, float) or is_int(value)


def plain_scalars(config: Any) -> None:
    """Scalars of numpy, as its generators and arrays give them, become Python's."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):
            object.__setattr__(config, field.name, value.item())
