"""foveate.testing.tolerance: spacings and bounds computed by hand, and errors that must be seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from foveate.testing.tolerance import allowed_error, assert_as_exact_as, ulp

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "dtype", "spacing"),
    [
        (1.0, torch.float32, 2.0**-23),
        (1.999, torch.float32, 2.0**-23),
        (2.0, torch.float32, 2.0**-22),
        (-0.75, torch.float32, 2.0**-24),
        (0.0, torch.float32, 2.0**-149),
        (2.0**-126, torch.float32, 2.0**-149),
        (2.0**-140, torch.float32, 2.0**-149),
        (3e38, torch.float32, 2.0**104),
        (1.0, torch.bfloat16, 2.0**-7),
        (-300.0, torch.bfloat16, 2.0),
        (0.0, torch.bfloat16, 2.0**-133),
        (1.0, torch.float16, 2.0**-10),
        (2.0**-14, torch.float16, 2.0**-24),
        (1e-7, torch.float16, 2.0**-24),
        (65504.0, torch.float16, 32.0),
        (1.0, torch.float64, 2.0**-52),
        (0.0, torch.float64, 2.0**-1074),
        (1.7e308, torch.float64, 2.0**971),
    ],
)
def test_ulp_by_hand(value, dtype, spacing):
    assert ulp(float64(value), dtype).item() == spacing


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_ulp_agrees_with_numpy(dtype):
    limits = np.finfo(dtype)
    exponents = np.linspace(np.log2(limits.smallest_subnormal), np.log2(limits.max) - 0.01, 1001)
    values = np.exp2(exponents).astype(dtype)
    ours = ulp(torch.from_numpy(values.astype(np.float64)), getattr(torch, dtype.__name__))
    assert np.array_equal(ours.numpy(), np.spacing(values).astype(np.float64))


def test_ulp_of_what_is_no_number():
    assert ulp(float64(math.nan, math.inf, -math.inf), torch.float16).isnan().all()
    assert ulp(torch.empty(0, 3, dtype=torch.float64), torch.float16).shape == (0, 3)
    with pytest.raises(ValueError, match=r"expected float64, got torch.float32 \(value\)"):
        ulp(torch.ones(1), torch.float32)
    with pytest.raises(ValueError, match=r"expected a floating dtype, got torch.int32"):
        ulp(float64(1.0), torch.int32)


@pytest.mark.parametrize(
    ("plain", "errors", "allowed"),
    [
        # Rounded as well as can be: half an ulp twice, plus one.
        ([1.0, 4.0], [0.0, 0.0], [2.0, 2.0]),
        ([1.0, 4.0], [0.5, 0.25], [2.0, 2.0]),
        # At worst 1.5 ulp of 1: 1.5 ulp are allowed for everywhere ...
        ([1.0, 1.5], [1.5, 0.0], [4.0, 4.0]),
        # ... but at 4 the absolute error is 0.375 ulp, less than what rounding costs.
        ([1.0, 4.0], [1.5, 0.0], [4.0, 2.0]),
        # 3 ulp of 4 are 12 ulp of 1, where the relative bound is the smaller one.
        ([1.0, 4.0], [0.0, 3.0], [7.0, 7.0]),
        # A sum that cancelled is off by 128 of its own ulp, 2 ulp of 64.
        ([1.0, 64.0], [128.0, 0.0], [257.0, 5.0]),
    ],
)
def test_allowed_error_by_hand(plain, errors, allowed):
    """Errors and bounds in ulp of each element."""
    plain = torch.tensor(plain)
    spacing = ulp(plain.double(), torch.float32)
    bound = allowed_error(plain.double() + float64(*errors) * spacing, plain)
    assert (bound / spacing).tolist() == allowed


@pytest.mark.parametrize(
    ("errors", "allowed"), [([0.0, 3.0], [385.0, 7.0]), ([3.0, 0.0], [7.0, 2.0]), ([0.0, 0.0], [2.0, 2.0])]
)
def test_allowed_error_of_what_cancels_by_hand(errors, allowed):
    """At 1 and 64, of which an ulp is 64 times as large: the absolute error alone counts."""
    plain = torch.tensor([1.0, 64.0])
    spacing = ulp(plain.double(), torch.float32)
    exact = plain.double() + float64(*errors) * spacing
    assert (allowed_error(exact, plain, cancels=True) / spacing).tolist() == allowed
    actual = (exact + float64(allowed[0], 0.0) * spacing).float()
    assert_as_exact_as(actual, exact, plain, cancels=True)
    if errors == [0.0, 3.0]:
        with pytest.raises(AssertionError, match=r"at \(0,\): .*385.0 ulp.*allowed .*7.0 ulp"):
            assert_as_exact_as(actual, exact, plain)


def test_plain_code_that_overflows_proves_nothing():
    exact = float64(1.0, 2.0)
    spacing = ulp(exact, torch.float16)
    for plain in ([math.inf, 2.0], [math.nan, math.nan]):
        assert torch.equal(allowed_error(exact, torch.tensor(plain, dtype=torch.float16)), 2 * spacing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_ulp_are_seen_and_two_are_not(dtype):
    exact = torch.randn(5, 33, dtype=torch.float64).exp().to(dtype).double()
    plain = exact.to(dtype)
    assert_as_exact_as(plain, exact, plain)
    for steps, seen in ((2, False), (-2, False), (3, True), (-3, True)):
        actual = plain.clone()
        actual[4, 7] = 1.25 + steps * torch.finfo(dtype).eps
        exact[4, 7] = plain[4, 7] = 1.25
        if seen:
            with pytest.raises(AssertionError, match=r"at \(4, 7\): .*exact 1.25, .*3.0 ulp.*2.0 ulp.*1 of 165"):
                assert_as_exact_as(actual, exact, plain)
        else:
            assert_as_exact_as(actual, exact, plain)


def test_worst_element_is_named():
    exact = float64(1.0, 1.0, 2.0)
    actual = torch.tensor([1.0 + 2**-20, 1.0, 2.0 + 2**-18])
    with pytest.raises(AssertionError) as error:
        assert_as_exact_as(actual, exact, exact.float())
    assert str(error.value) == (
        "at (2,): got 2.0000038146972656, exact 2.0, error 3.81e-06 (16.0 ulp), allowed 4.77e-07 (2.0 ulp); "
        "2 of 3 elements are wrong"
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_tensors_without_axes_or_elements(shape):
    exact = torch.ones(shape, dtype=torch.float64)
    assert_as_exact_as(exact.float(), exact, exact.float())
    if shape == ():
        with pytest.raises(AssertionError, match=r"at \(\): got 1.5"):
            assert_as_exact_as(exact.float() * 1.5, exact, exact.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_must_match(value):
    exact = float64(1.0, value)
    good = exact.float()
    assert_as_exact_as(good, exact, good)
    for wrong in (1.0, -value, math.nan if math.isinf(value) else math.inf):
        if math.isnan(wrong) and math.isnan(value):
            continue
        with pytest.raises(AssertionError, match=r"at \(1,\): got"):
            assert_as_exact_as(torch.tensor([1.0, wrong]), exact, good)
        with pytest.raises(AssertionError, match=r"at \(1,\): got .* exact 1.0"):
            assert_as_exact_as(good, float64(1.0, 1.0), torch.ones(2))


def test_overflow_of_the_output_is_expected():
    exact = float64(70000.0, 1.0)
    plain = torch.tensor([math.inf, 1.0], dtype=torch.float16)
    assert_as_exact_as(plain, exact, plain)
    with pytest.raises(AssertionError, match=r"at \(0,\): got 65504.0, exact 70000.0"):
        assert_as_exact_as(torch.tensor([65504.0, 1.0], dtype=torch.float16), exact, plain)


def test_shapes_and_types_are_compared():
    exact = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"shape \[3, 2\], but \[2, 3\] \(exact\)"):
        assert_as_exact_as(torch.ones(3, 2), exact, torch.ones(3, 2))
    with pytest.raises(AssertionError, match=r"shape \[2, 3\], but \[1, 3\] \(plain\)"):
        assert_as_exact_as(torch.ones(2, 3), exact, torch.ones(1, 3))
    with pytest.raises(AssertionError, match=r"dtype torch.float32, but torch.float16 \(plain\)"):
        assert_as_exact_as(torch.ones(2, 3), exact, torch.ones(2, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"expected float64, got torch.float32"):
        assert_as_exact_as(torch.ones(2, 3), exact.float(), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected a floating tensor, got torch.int64"):
        assert_as_exact_as(torch.ones(2, 3, dtype=torch.int64), exact, torch.ones(2, 3))


def test_sum_in_another_order_passes_and_a_lost_term_does_not():
    """The tolerance as it is meant: of float32 sums over rows that cancel and rows that do not."""
    terms = torch.randn(64, 500) * torch.logspace(-3, 3, 64).unsqueeze(1)
    exact, plain = terms.double().sum(1), terms.sum(1)
    assert_as_exact_as(terms.flip(1).sum(1), exact, plain)
    lost = terms.clone()
    lost[63, 400] = 0
    with pytest.raises(AssertionError, match=r"at \(63,\)"):
        assert_as_exact_as(lost.sum(1), exact, plain)
