"""foveate.testing.cases: the sizes that must be there, and inputs that show mistakes."""

from __future__ import annotations

import importlib

import pytest
import torch

from foveate.testing.cases import DTYPES, KERNELS, LAYOUTS, Case, cases, lay_out, spread

ALL = [case for kernel in KERNELS for case in cases(kernel)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_names_are_unique_and_kernels_exist(kernel):
    assert len({str(case) for case in cases(kernel)}) == len(cases(kernel))
    family, name = kernel.split(".")
    assert callable(getattr(importlib.import_module(f"foveate.kernels.{family}"), name))


def test_rms_norm_has_the_sizes_that_break_kernels():
    found = {(case.sizes["rows"], case.sizes["D"]) for case in cases("layers.rms_norm")}
    assert {width for _, width in found} >= {1, 7, 33, 127, 128, 129, 2048, 3584}
    assert {rows for rows, _ in found} >= {0, 1, 2, 5, 17, 129}
    for layout in LAYOUTS:
        assert {case.dtype for case in cases("layers.rms_norm") if case.layout == layout} == set(DTYPES)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_inputs(case):
    first, again, other = (case.inputs(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    tensors = [name for name, value in first.items() if torch.is_tensor(value)]
    for name in tensors:
        assert torch.equal(first[name], again[name])
        assert first[name].numel() == 0 or not torch.equal(first[name], other[name])
        assert torch.isfinite(first[name]).all()
        assert (first[name] != 0).all()
    module, function = case.kernel.split(".")
    result = getattr(importlib.import_module(f"foveate.kernels.{module}"), function)(**first)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 24), (1, 1), (0, 7), (2, 0)])
def test_layouts(layout, shape):
    values = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    rows = lay_out(values, layout)
    assert torch.equal(rows, values)
    if shape == (5, 24):
        expected = {
            "contiguous": ((24, 1), 0),
            "strided": ((25, 1), 0),
            "offset": ((24, 1), 1),
            "transposed": ((1, 5), 0),
        }
        assert (rows.stride(), rows.storage_offset()) == expected[layout]
    whole = torch.empty(0).set_(rows.untyped_storage())
    assert int(whole.isnan().sum()) == len(whole) - values.numel()


def test_values_are_spread():
    values = spread((100, 100), torch.float64, torch.Generator().manual_seed(0), octaves=4)
    magnitudes = values.abs().log2()
    assert magnitudes.min() >= -4
    assert magnitudes.max() <= 4
    # 10,000 draws: each share within five standard deviations, 5 sqrt(p (1 - p) / 10000).
    for octave in range(-4, 4):
        share = ((magnitudes >= octave) & (magnitudes < octave + 1)).double().mean()
        assert abs(share - 1 / 8) < 0.0166
    assert abs((values < 0).double().mean() - 0.5) < 0.025


def test_bad_cases_are_refused():
    with pytest.raises(ValueError, match=r"got 'diagonal' \(layout\)"):
        Case("layers.rms_norm", {"rows": 1, "D": 1}, torch.float32, "diagonal")
    with pytest.raises(ValueError, match=r"got 'layers.norm' \(kernel\)"):
        Case("layers.norm", {"rows": 1, "D": 1}, torch.float32)
