"""The benchmarks' measurements under pytest-benchmark, on the CPU, for its statistics and histograms:

pytest benchmarks/test_kernels.py -k "rms_norm and cpp" --benchmark-histogram
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

SCRIPTS = ("bench_layers", "bench_paged_attention", "bench_policy_loss", "bench_sampling", "bench_vision_prune")


def contenders() -> Iterator:
    """One parameter for each backend and peer: the measurement and its name."""
    options = import_module("common").Options(torch.device("cpu"))
    for script in SCRIPTS:
        for measurement in import_module(script).measurements(options):
            for name in (*measurement.backends, *measurement.peers):
                row = import_module("compare").name_of(measurement.row(name))
                yield pytest.param(measurement, name, id=row)


@pytest.mark.parametrize(("measurement", "name"), list(contenders()))
def test_kernel(benchmark, measurement, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    input_sets = [measurement.make_inputs(generator) for _ in range(4)]
    run = {**measurement.peers, **measurement.backends}[name]
    if name in measurement.backends:
        import_module("measurement").verify(measurement, run, input_sets[0])
    benchmark.group = f"{measurement.kernel} {measurement.shape} {measurement.dtype}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    rotation = itertools.cycle(input_sets)
    benchmark(lambda: run(*next(rotation)))
