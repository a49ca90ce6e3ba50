"""The tolerance of every floating comparison: derived from the plain torch code, never tuned.

An element may be off by twice the error of the plain code of the same precision, plus one ulp; both against float64.
The error of the plain code is taken over the whole tensor, since that of a single element is a matter of luck:

    allowed[i] = 2 min(max_j |plain[j] - exact[j]|, ulp[i] max_j |plain[j] - exact[j]| / ulp[j]) + ulp[i]

The first term of the minimum is the right one where errors do not shrink with the result, the second where they do.
For results that are small because their terms cancel (a gradient through a mean), say `cancels`: there the second term
is luck as well, and the first stands alone. Either counts as half an ulp at least, what rounding the result costs.
"""

from __future__ import annotations

import torch


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of the neighbours of `value` among the numbers of `dtype`; that of 0 is the smallest subnormal.

    value: float64 [...], rounded to no other type. dtype: a floating one. Returns float64 [...], NaN where `value` is
    not finite. Raises ValueError for another type.
    """
    _require_float64(value, "value")
    if not dtype.is_floating_point:
        raise ValueError(f"expected a floating dtype, got {dtype} (dtype)")
    limits = torch.finfo(dtype)
    lowest = round(torch.log2(torch.tensor(limits.smallest_normal, dtype=torch.float64)).item())
    finite = torch.isfinite(value)
    exponent = torch.frexp(torch.where(finite, value, 1.0)).exponent.to(torch.int64) - 1
    exponent = torch.where(value == 0, lowest, exponent).clamp(min=lowest)
    # A power of two by its bits: torch.pow is not exact everywhere.
    power = ((exponent + 1023) << 52).view(torch.float64)
    return torch.where(finite, power * limits.eps, torch.nan)


def allowed_error(exact: torch.Tensor, plain: torch.Tensor, cancels: bool = False) -> torch.Tensor:
    """The bound of this module's docstring, of each element.

    exact: float64 [...], the true values. plain: float [...], those of the plain code in the dtype of the output.
    cancels: whether results are small because large terms cancel. Returns float64 [...]; NaN where `exact` is not
    finite. Elements at which `plain` is not finite count for nothing.
    """
    _require_float64(exact, "exact")
    spacing = ulp(exact, plain.dtype)
    error = (plain.to(torch.float64) - exact).abs()
    counted = torch.isfinite(error) & torch.isfinite(spacing)
    if not counted.any():
        return 2 * spacing
    absolute = error[counted].max()
    relative = (error[counted] / spacing[counted]).max().clamp(min=0.5)
    bound = absolute.clamp(min=0.5 * spacing)
    return 2 * (bound if cancels else torch.minimum(bound, relative * spacing)) + spacing


def assert_as_exact_as(
    actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, *, cancels: bool = False
) -> None:
    """Asserts that `actual` is as close to `exact` as `allowed_error(exact, plain, cancels)` demands.

    actual, plain: float [...] of one dtype; exact: float64 [...]; all of one shape. NaN and infinities (those of
    `exact` rounded to the dtype) must be at the same places. Raises AssertionError that names the worst element, and
    ValueError if `exact` is not float64 or `actual` is not floating.
    """
    _require_float64(exact, "exact")
    if not actual.dtype.is_floating_point:
        raise ValueError(f"expected a floating tensor, got {actual.dtype} (actual)")
    for name, other in (("exact", exact), ("plain", plain)):
        assert actual.shape == other.shape, f"shape {list(actual.shape)}, but {list(other.shape)} ({name})"
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype}, but {plain.dtype} (plain)"
    if actual.numel() == 0:
        return
    actual, exact, plain = (tensor.detach().to(actual.device) for tensor in (actual, exact, plain))
    expected = exact.to(actual.dtype).to(torch.float64)
    got = actual.to(torch.float64)
    same = (got == expected) | (got.isnan() & expected.isnan())
    special = ~(torch.isfinite(expected) & torch.isfinite(got))
    if (special & ~same).any():
        index = _unravel(int((special & ~same).flatten().int().argmax()), actual.shape)
        raise AssertionError(
            f"at {index}: got {got[index].item()}, exact {exact[index].item()} "
            f"({int((special & ~same).sum())} of {actual.numel()} elements are NaN or infinite at one side only)"
        )
    allowed = allowed_error(torch.where(special, torch.nan, exact), plain, cancels)
    _assert_within(got, exact, allowed, ulp(exact, actual.dtype))


def _assert_within(got: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor, spacing: torch.Tensor) -> None:
    excess = ((got - exact).abs() / allowed).nan_to_num(nan=0.0, posinf=torch.inf)
    wrong = int((excess > 1).sum())
    if wrong == 0:
        return
    index = _unravel(int(excess.flatten().argmax()), got.shape)
    error, bound, unit = ((got - exact)[index].abs().item(), allowed[index].item(), spacing[index].item())
    raise AssertionError(
        f"at {index}: got {got[index].item()!r}, exact {exact[index].item()!r}, error {error:.3g} ({error / unit:.1f} "
        f"ulp), allowed {bound:.3g} ({bound / unit:.1f} ulp); {wrong} of {got.numel()} elements are wrong"
    )


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(position) for position in torch.unravel_index(torch.tensor(index), shape))


def _require_float64(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype != torch.float64:
        raise ValueError(f"expected float64, got {tensor.dtype} ({name})")
