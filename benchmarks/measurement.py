"""A kernel at one shape: its inputs, what it computes, and how its results are checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from floors import Floor
from samplers import Inputs, Run

from foveate.testing.tolerance import allowed_error
from foveate.testing.uninitialised import poisoned_empty

Results = tuple[Any, ...]
Check = Callable[[Inputs, Results, float], None]

# Times the bound of the tests, which say how exact a kernel is; here it only has to be what is timed. The plain code's
# error is that of few elements of one draw, and a lucky draw must not refuse a kernel. A peer's exactness is its own
# choice: torch's fused attention errs by more than the plain one over long prompts. After a measurement there is one
# draw for each input set, hundreds of them; what a kernel skips is far off.
ROOM, PEER_ROOM, AGAIN_ROOM = 2.0, 16.0, 16.0


@dataclass(frozen=True)
class Measurement:
    """One kernel at one shape, in all its backends.

    make_inputs: generator on the device -> fresh random inputs. check: (inputs, results, room) -> None, or
    AssertionError; results are what a backend returned and then the inputs at the places `mutates`, as it left them;
    room: how many times the tolerance is allowed. backends, peers: name -> function of the inputs.
    check_peers=False: they compute something else (say so in the benchmark).
    """

    kernel: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    make_inputs: Callable[[torch.Generator], Inputs]
    backends: Mapping[str, Run]
    check: Check
    floor: Floor
    peers: Mapping[str, Run] = field(default_factory=dict)
    mutates: tuple[int, ...] = ()
    check_peers: bool = True

    def row(self, backend: str) -> dict[str, Any]:
        """The part of a row that says what is measured."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"kernel": self.kernel, "backend": backend, "shape": self.shape, "dtype": dtype}

    def original(self, inputs: Inputs) -> Inputs:
        """The same inputs, with copies of those that a call changes."""
        return tuple(x.clone() if place in self.mutates else x for place, x in enumerate(inputs))


def as_exact_as(plain: Run) -> Check:
    """Compares with plain torch code of the same signature and results.

    Its results on float64 inputs are the truth, those on the inputs themselves say how exact it is to be. What is no
    floating number must be equal.
    """

    def check(inputs: Inputs, results: Results, room: float) -> None:
        exact = _as_tuple(plain(*(x.double() if _is_float(x) else x for x in _copies(inputs))))
        rounded = _as_tuple(plain(*_copies(inputs)))
        assert len(results) == len(rounded), f"{len(results)} results, expected {len(rounded)}"
        for number, (got, truth, close) in enumerate(zip(results, exact, rounded, strict=True)):
            _compare(got, truth, close, room, name=f"result {number}")

    return check


def _compare(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, room: float, name: str) -> None:
    for what in ("shape", "dtype"):
        found, expected = getattr(got, what), getattr(plain, what)
        assert found == expected, f"{name}: {what} {found}, expected {expected}"
    right = (got == plain) | (got != got) & (plain != plain)  # infinities and NaN where the plain code has them
    if _is_float(got):
        exact = exact.double()
        # What is small because its terms cancel is no more exact than they are.
        right |= (got.double() - exact).abs() <= room * allowed_error(exact, plain, cancels=True)
    if not right.all():
        wrong = (~right).nonzero()
        place = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} of {got.numel()} elements are wrong, the first at {place}: "
            f"got {got[place].item()!r}, exact {exact[place].item()!r}"
        )


def verify(measurement: Measurement, run: Run, inputs: Inputs, *, peer: bool = False, again: bool = False) -> None:
    """Runs once into poisoned memory and compares. AssertionError says which element is wrong, or input changed.

    again: after the measurement.
    """
    mine = _copies(inputs)
    with nullcontext() if peer else poisoned_empty():
        results = _as_tuple(run(*mine))
    for place, (before, after) in enumerate(zip(inputs, mine, strict=True)):
        if place not in measurement.mutates and isinstance(before, torch.Tensor):
            same = torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (before, after)))
            assert same, f"input {place} was changed"
    changed = (mine[place] for place in measurement.mutates)
    measurement.check(inputs, (*results, *changed), AGAIN_ROOM if again else PEER_ROOM if peer else ROOM)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _as_tuple(results: Any) -> Results:
    return tuple(results) if isinstance(results, (tuple, list)) else () if results is None else (results,)


def _copies(inputs: Inputs) -> Inputs:
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
