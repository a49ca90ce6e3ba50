"""`layers.rope_store_kv`: against a rotation of complex numbers in float64; what it stores, where, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from foveate.kernels import layers
from foveate.kernels.dispatch import available
from foveate.testing.tolerance import assert_as_exact_as

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [name for name in available("layers", torch.device("cpu")) if name != "triton"]


@dataclass
class Inputs:
    """Tokens whose queries, keys and values are parts of one projection, as a decoder has them."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    angles: torch.Tensor  # float64 [T, head_dim / 2]
    pools: tuple[torch.Tensor, torch.Tensor]
    slots: torch.Tensor

    @cached_property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, rounded to the dtype of the queries"""
        cos, sin = self.angles.cos(), self.angles.sin()
        both = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return both[0].to(self.queries.dtype), both[1].to(self.queries.dtype)

    def run(self, backend: str | None) -> torch.Tensor:
        return layers.rope_store_kv(
            self.queries, self.keys, self.values, *self.tables, *self.pools, self.slots, backend=backend
        )


def make(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    projected = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    queries, keys, values = projected.split([heads, kv_heads, kv_heads], 1)
    pools = tuple(torch.full((tokens + 2, 3, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    angles = torch.randn(tokens, head_dim // 2, dtype=torch.float64) * 3
    return Inputs(queries, keys, values, angles, pools, torch.randperm(3 * (tokens + 2))[:tokens])


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """float64 [T, heads, head_dim]: half a + i b of x, times cos + i sin of the second half's tables."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.complex(cos[:, None, half:].double(), sin[:, None, half:].double())
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2), (3, 4, 2, 6), (8, 8, 2, 64), (300, 14, 2, 80), (5, 3, 3, 130)], ids=str
)
def test_rotation_and_slots(sizes, dtype, backend):
    given = make(*sizes, dtype)
    rotated = given.run(backend)
    plain = [layers.rotate(x, *(table[:, None] for table in given.tables)) for x in (given.queries, given.keys)]
    keys, values = (pool.flatten(0, 1) for pool in given.pools)
    for got, x, reference in zip((rotated, keys[given.slots]), (given.queries, given.keys), plain, strict=True):
        assert_as_exact_as(got, turned(x, *given.tables), reference, cancels=True)
    assert torch.equal(values[given.slots], given.values)
    others = torch.ones(len(keys), dtype=torch.bool)
    others[given.slots] = False
    assert keys[others].isnan().all()
    assert values[others].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    assert make(0, 4, 2, 8).run(backend).shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(dtype):
    given = make(300, 6, 2, 40, dtype)
    whole = given.run("cpp")
    keys = given.pools[0].flatten(0, 1)[given.slots]
    for row in (0, 7, 299):
        one = slice(row, row + 1)
        pools = tuple(torch.full_like(pool, torch.nan) for pool in given.pools)
        parts = (given.queries[one], given.keys[one], given.values[one], given.angles[one], pools, given.slots[one])
        alone = Inputs(*parts)
        assert torch.equal(alone.run("cpp"), whole[one])
        assert torch.equal(pools[0].flatten(0, 1)[given.slots[one]], keys[one])


def test_the_number_of_threads_changes_no_bit():
    before, given = torch.get_num_threads(), make(700, 6, 2, 40)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(given.run("cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.tensor([0, 1, 15])}, r"slots in \[0, 15\), got 15 \(slots\)"),
        ({"slots": torch.tensor([0, -1, 2])}, r"slots in \[0, 15\), got -1 \(slots\)"),
        ({"slots": torch.tensor([0, 1])}, r"\[T=3\] (torch\.)?int64.*\(slots\)"),
        ({"slots": torch.tensor([0, 1, 2], dtype=torch.int32)}, r"int64.*int32.*\(slots\)"),
        ({"slots": torch.zeros(3, 1, dtype=torch.int64)}, r"\[T=3\].*\[3, 1\].*\(slots\)"),
        ({"keys": torch.zeros(3, 2, 16)[..., ::2]}, r"last dimension contiguous.*\(keys\)"),
        ({"pools": (torch.zeros(5, 3, 2, 8).half(), torch.zeros(5, 3, 2, 8))}, r"float32.*float16.*\(key_pool\)"),
        ({"pools": (torch.zeros(5, 3, 1, 8), torch.zeros(5, 3, 2, 8))}, r"kv_heads=2.*\(key_pool\)"),
        ({"pools": (torch.zeros(3, 5, 2, 8).transpose(0, 1), torch.zeros(5, 3, 2, 8))}, r"contiguous.*\(key_pool\)"),
        (
            {"keys": torch.zeros(3, 0, 8), "values": torch.zeros(3, 0, 8), "pools": (torch.zeros(5, 3, 0, 8),) * 2},
            r"at least 1 KV head, got '?0'? \(keys\)",
        ),
        ({"tables": (torch.zeros(3, 8).double(), torch.zeros(3, 8))}, r"float32.*float64.*\(cos\)"),
        ({"tables": (torch.zeros(3, 1), torch.zeros(3, 8))}, r"D=8.*\[3, 1\].*\(cos\)"),
        ({"tables": (torch.zeros(3, 8), torch.zeros(8, 3).t())}, r"contiguous.*\(sin\)"),
        ({"queries": torch.zeros(3, 4, 7)}, r"\[T, heads, head_dim\], even, got .*\(queries\)"),
        ({"keys": torch.zeros(3, 2, 6)}, r"D=8.*\(keys\)"),
        ({"values": torch.zeros(3, 1, 8)}, r"kv_heads=2.*\(values\)"),
        ({"values": torch.zeros(3, 2, 8).half()}, r"float32.*\(values\)"),
        ({"pools": (torch.zeros(5, 3, 2, 8), torch.zeros(4, 3, 2, 8))}, r"pages=5.*\(value_pool\)"),
        ({"angles": torch.zeros(2, 4, dtype=torch.float64)}, r"T=3.*\(cos\)"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_named(change, message, backend):
    given = make(3, 4, 2, 8)
    for name, value in change.items():
        setattr(given, name, value)
    pools = [pool.clone() for pool in given.pools]
    with pytest.raises(ValueError, match=message):
        given.run(backend)
    for pool, before in zip(given.pools, pools, strict=True):
        assert torch.equal(pool.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(backend):
    given = make(3, 4, 2, 8)
    given.queries, given.keys, given.values = (
        x.detach().requires_grad_() for x in (given.queries, given.keys, given.values)
    )
    rotated = given.run(backend)
    assert not any(x.requires_grad for x in (rotated, *given.pools))


@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_sees_the_operator(grad):
    given = make(3, 4, 2, 8)
    expected = given.run("cpp")
    pools = tuple(torch.full_like(pool, torch.nan) for pool in given.pools)
    arguments = (given.queries, given.keys, given.values, *given.tables, *pools, given.slots)
    with torch.set_grad_enabled(grad):
        graph = make_fx(partial(layers.rope_store_kv, backend="cpp"))(*arguments)
        assert torch.ops.foveate.rope_store_kv.default in [node.target for node in graph.graph.nodes]
        for pool in pools:
            pool.fill_(torch.nan)
        assert torch.equal(graph(*arguments), expected)
    for pool, want in zip(pools, given.pools, strict=True):
        assert torch.equal(pool.nan_to_num(7.0), want.nan_to_num(7.0))


def test_registered_as_an_operator():
    given = make(3, 4, 2, 8)
    pools = [torch.zeros_like(pool) for pool in given.pools]
    arguments = (given.queries, given.keys, given.values, *given.tables, *pools, given.slots)
    torch.library.opcheck(torch.ops.foveate.rope_store_kv.default, arguments)


def test_backends():
    with pytest.raises(ValueError, match=r"which rope_store_kv has, got 'triton'"):
        make(3, 4, 2, 8).run("triton")
    double = make(3, 4, 2, 8, torch.float64)
    assert torch.equal(double.run(None), double.run("reference"))
    with pytest.raises(ValueError, match=r"not torch.float64 \(backend\)"):
        double.run("cpp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gives_the_bits_of_the_cpu(dtype):
    given = make(300, 6, 2, 40, dtype)
    expected = given.run("cpp")
    pools = tuple(torch.full_like(pool, torch.nan, device="cuda") for pool in given.pools)
    parts = (x.cuda() for x in (given.queries, given.keys, given.values, *given.tables))
    found = layers.rope_store_kv(*parts, *pools, given.slots.cuda(), backend="cuda")
    assert torch.equal(found.cpu(), expected)
    for pool, host in zip(pools, given.pools, strict=True):
        assert torch.equal(pool.cpu().nan_to_num(7.0), host.nan_to_num(7.0))
