"""Time of one sampling call; run as `python benchmarks/bench_sampling.py`.

Each shape has the baseline beside it in the same run: torch's softmax and multinomial, which draw a token by the same
distribution but return no log-probability, kept mass or entropy, know no seed of a row, and filter nothing.
FOVEATE_BENCH_THREADS sets the threads (default 1). Logits are normal with standard deviation 3.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from foveate.kernels import sampling

SHAPES = [(8, 49_152), (8, 151_936), (128, 62)]
FILTERS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("FOVEATE_BENCH_THREADS", "1")))
    yield
    torch.set_num_threads(before)


def random_logits(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", ["baseline", *FILTERS, "banned"])
def test_sampling(benchmark, shape, case):
    benchmark.group = f"N, V = {shape}"
    logits = random_logits(shape)
    if case == "baseline":
        ids = benchmark(lambda: torch.multinomial(torch.softmax(logits, -1), 1))
        assert ids.shape == (shape[0], 1)
        return
    banned = torch.zeros(shape[1], dtype=torch.bool)
    banned[[3, 17, 20]] = True
    row = torch.arange(shape[0])
    arguments = {"temperature": 1.0, "banned": banned} if case == "banned" else {"temperature": 1.0, **FILTERS[case]}
    output = benchmark(lambda: sampling.sample(logits, **arguments, seeds=row, steps=row))
    assert (output.token_ids >= 0).all()
    assert output.logprobs.isfinite().all()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))
