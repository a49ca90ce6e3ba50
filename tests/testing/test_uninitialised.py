"""foveate.testing.uninitialised: what is poisoned, and that nothing stays so."""

from __future__ import annotations

import pytest
import torch

from foveate.testing.uninitialised import ALLOCATORS, fill_with_garbage, poisoned_empty


def functions() -> list:
    return [getattr(owner, name) for owner, name in ALLOCATORS]


def own() -> list[bool]:
    return [name in vars(owner) for owner, name in ALLOCATORS]


@pytest.fixture(autouse=True)
def poison_empty_memory():
    """In place of conftest.py's: here memory is poisoned by the tests alone."""


def test_everything_is_as_before_afterwards():
    before = functions(), own()
    with poisoned_empty():
        assert not set(functions()) & set(before[0])
        with poisoned_empty():
            assert torch.empty(3).isnan().all()
        assert torch.empty(3).isnan().all()
    assert (functions(), own()) == before
    with pytest.raises(KeyError), poisoned_empty():
        raise KeyError
    assert (functions(), own()) == before


def test_every_allocator_is_poisoned():
    calls = {
        "empty": lambda: torch.empty(2, 3),
        "empty_like": lambda: torch.empty_like(torch.zeros(3)),
        "empty_strided": lambda: torch.empty_strided((2, 2), (2, 1)),
        "empty_permuted": lambda: torch.empty_permuted((2, 3), (1, 0)),
        "new_empty": lambda: torch.zeros(1).new_empty(4),
        "new_empty_strided": lambda: torch.zeros(1).new_empty_strided((2,), (1,)),
    }
    assert set(calls) == {name for _, name in ALLOCATORS}
    with poisoned_empty():
        for name, call in calls.items():
            assert call().isnan().all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_floating_garbage_is_nan(dtype):
    assert fill_with_garbage(torch.zeros(2, 3, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_garbage_is_large_and_no_step_from_overflow(dtype):
    values = fill_with_garbage(torch.zeros(3, dtype=dtype))
    assert (values == torch.iinfo(dtype).max // 2 + 1).all()
    assert (values + 1 > values).all()


def test_what_holds_no_data_is_left_alone():
    assert fill_with_garbage(torch.empty(0)).shape == (0,)
    assert fill_with_garbage(torch.empty(3, device="meta")).is_meta
    assert fill_with_garbage(torch.zeros(2, dtype=torch.bool)).all()
    parameter = torch.zeros(2, requires_grad=True)
    assert fill_with_garbage(parameter).isnan().all()
    assert parameter.is_leaf
