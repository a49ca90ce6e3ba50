"""Group advantages on every backend: bit for bit those of the reference, on a GPU without waiting for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

from foveate import _C
from foveate.kernels.dispatch import available
from foveate.kernels.policy_loss import group_advantage
from foveate.kernels.policy_loss.advantage import ADVANTAGE_KINDS, BATCH_KINDS

NORMALISED = [kind for kind in ADVANTAGE_KINDS if kind not in ("dr_grpo", "rloo")]
NAN, INF = float("nan"), float("inf")


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def advantage(rewards, group_offsets, kind, **kwargs):
    """That of "cpp", which must be that of the reference."""
    got, expected = (
        group_advantage(rewards, group_offsets, kind=kind, backend=backend, **kwargs)
        for backend in ("cpp", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    return got


def random_ragged(rng):
    groups, longest = int(rng.integers(0, 40)), int(rng.choice([2, 5, 9, 70]))
    sizes = rng.integers(0, longest, size=groups)
    if rng.random() < 0.05:
        sizes = np.append(sizes, 1000)
    count, parts = int(sizes.sum()), int(rng.integers(1, 4))
    rewards = rng.normal(size=(count, parts)) if rng.random() < 0.6 else 0.7 * rng.integers(0, 3, (count, parts))
    if rng.random() < 0.3:
        rewards[rng.random(rewards.shape) < 0.02] = rng.choice([NAN, INF, -INF])
    options = {
        "weights": torch.from_numpy(rng.normal(size=parts)) if rng.random() < 0.5 else None,
        "scorable": torch.from_numpy(rng.random(count) < 0.8) if rng.random() < 0.3 else None,
    }
    dtype = torch.float32 if rng.random() < 0.5 else torch.float64
    return torch.from_numpy(rewards).to(dtype), offsets(0, *np.cumsum(sizes)), options


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_backends_agree_bit_for_bit_on_ragged_batches(kind):
    rng, seen = np.random.default_rng(7), set()
    for _ in range(200):
        rewards, bounds, options = random_ragged(rng)
        if kind in BATCH_KINDS and rng.random() < 0.5:
            options["lengths"] = torch.from_numpy(rng.integers(0, 50, size=len(rewards)))
        if kind in NORMALISED:
            options |= {"ddof": int(rng.integers(2)), "eps": float(rng.choice([0.0, 1e-9, 1e-4]))}
        got = advantage(rewards, bounds, kind, **options)
        seen |= {"nan"} if got.isnan().any() else {"number"} if got.any() else {"zeros"}
    assert seen == {"nan", "number", "zeros"}


@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
@pytest.mark.parametrize(
    "sizes", [[8] * 10_000, [100_000], [0] * 200 + [3] * 300 + [5000]], ids=["many", "one", "mixed"]
)
def test_backends_agree_bit_for_bit_on_large_batches(kind, sizes):
    bounds = offsets(0, *np.cumsum(sizes))
    got = advantage(torch.rand(int(bounds[-1]), 1), bounds, kind)
    assert got.isfinite().all()
    assert got.any()


def test_the_operator():
    for kind in ADVANTAGE_KINDS:
        lengths = torch.arange(6) if kind in BATCH_KINDS else None
        scorable = torch.tensor([True, True, False, True, True, True])
        inputs = (torch.rand(6, 2), offsets(0, 4, 6), kind, torch.rand(2), 1, 1e-6, scorable, lengths, "cpp")
        opcheck(torch.ops.foveate.group_advantage.default, inputs)


def test_the_backend_of_the_environment(monkeypatch):
    calls = []
    monkeypatch.setattr(_C, "group_advantage", lambda *_: calls.append("cpp"))
    group_advantage(torch.rand(3), offsets(0, 3))
    assert calls == ["cpp"]
    monkeypatch.setenv("FOVEATE_BACKEND", "policy_loss=reference")
    group_advantage(torch.rand(3), offsets(0, 3))
    assert calls == ["cpp"]
    group_advantage(torch.rand(3), offsets(0, 3), backend="cpp")
    assert calls == ["cpp", "cpp"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FOVEATE_BACKEND", "policy_loss=triton")  # which other operations of the family have
    group_advantage(torch.rand(3), offsets(0, 3))
    assert calls == ["cpp"] * 3
    with pytest.raises(ValueError, match=r"which group_advantage has, got 'triton' \(backend\)"):
        group_advantage(torch.rand(3), offsets(0, 3), backend="triton")


@pytest.fixture
def gpu():
    if "cuda" not in available("policy_loss", torch.device("cuda")) or not torch.cuda.is_available():
        pytest.skip("no GPU, or foveate._C was built without CUDA")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ADVANTAGE_KINDS)
def test_a_gpu_gives_the_bits_of_the_cpu_and_waits_for_nothing(gpu, kind):
    rng = np.random.default_rng(3)
    cases = [random_ragged(rng) for _ in range(30)]
    cases.append((torch.rand(100_000, 1), offsets(*range(0, 100_001, 10)), {}))
    for rewards, bounds, options in cases:
        expected = group_advantage(rewards, bounds, kind=kind, backend="cpp", **options)
        there = {name: value if value is None else value.to(gpu) for name, value in options.items()}
        rewards, bounds = rewards.to(gpu), bounds.to(gpu)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = group_advantage(rewards, bounds, kind=kind, backend="cuda", **there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)
