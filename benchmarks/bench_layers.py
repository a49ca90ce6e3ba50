"""rms_norm, forward and with its backward, and rope_store_kv, at the sizes of real models.

    python benchmarks/bench_layers.py [--filter rope_store_kv]

Peers: torch.nn.functional.rms_norm, and on CUDA its compiled form at two shapes. Widths: 128 (q and k of a head), 2048
and 3584 (hidden states of Qwen2.5-VL-3B and 7B). `rms_norm_with_backward` is one call of both; autograd's own work for
it on the host is in the time on a CPU, and not in that of a captured graph. rope_store_kv: the heads of the same two
models, beside the rotation of transformers and two index copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import floors
import torch
import torch.nn.functional as F
from common import Options, backends_of, main
from measurement import Measurement, as_exact_as
from samplers import Inputs, Run

from foveate.kernels.layers import rms_norm, rope_store_kv

KERNELS = ("rms_norm", "rms_norm_with_backward", "rope_store_kv")
EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)
HEADS = ((16, 2), (28, 4))  # query and KV heads, of 128
PAGE_SIZE = 64
COMPILED = ((8, 2048), (8192, 2048))  # rows and width; a compilation takes seconds


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers' models write it: in float32 at least, rounded to the dtype of x before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


def with_backward(forward: Run) -> Run:
    """(x, weight, gradient) -> result, gradient of x, gradient of weight."""

    def run(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = forward(x, weight)
        return out.detach(), *torch.autograd.grad(out, (x, weight), grad)

    return run


def make_inputs(rows: int, dim: int, dtype: torch.dtype, grads: int, generator: torch.Generator) -> Inputs:
    """x, weight and, with grads = 1, the gradient of the result."""
    draw = partial(torch.randn, device=generator.device, dtype=dtype, generator=generator)
    return draw(rows, dim), 1 + 0.1 * draw(dim), *(draw(rows, dim) for _ in range(grads))


def peers_of(device: torch.device, dtype: torch.dtype, rows: int, dim: int) -> dict[str, Run]:
    if device.type != "cuda" or dtype != torch.bfloat16 or (rows, dim) not in COMPILED:
        return {"torch": torch_rms_norm}
    torch._dynamo.reset()  # one code object is compiled for a limited number of shapes
    return {"torch": torch_rms_norm, "torch.compile": torch.compile(torch_rms_norm, dynamic=False)}


def shapes(options: Options) -> Iterator[tuple[int, int]]:
    dims: Sequence[int] = (128,) if options.quick else (128, 2048, 3584)
    rows: Sequence[int] = (1, 8) if options.quick else (1, 8, 256)
    if options.device.type == "cuda" and not options.quick:
        rows = (*rows, 8192)
    return ((count, dim) for dim in dims for count in rows)


def rope_inputs(
    rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    """As `rope_store_kv` takes them: q, k and v are parts of one product; slots lie anywhere in the pools."""
    draw = partial(torch.randn, device=generator.device, generator=generator)
    queries, keys, values = draw(rows, heads + 2 * kv_heads, dim).to(dtype).split([heads, kv_heads, kv_heads], 1)
    angles = draw(rows, dim // 2)
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)
    pages = -(-4 * rows // PAGE_SIZE)
    pools = draw(2, pages, PAGE_SIZE, kv_heads, dim).to(dtype)
    slots = torch.randperm(pages * PAGE_SIZE, device=generator.device, generator=generator)[:rows]
    return queries, keys, values, cos.to(dtype), sin.to(dtype), pools[0], pools[1], slots


def plain_rope(queries, keys, values, cos, sin, key_pool, value_pool, slots) -> torch.Tensor:
    """As transformers' models write it, then two index copies, in place."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos + x.roll(x.shape[-1] // 2, -1) * sin

    key_pool.flatten(0, 1).index_copy_(0, slots, turned(keys))
    value_pool.flatten(0, 1).index_copy_(0, slots, values)
    return turned(queries)


def plain_rope_and_pools(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return plain_rope(*inputs), *inputs[5:7]


def rope_measurements(options: Options) -> Iterator[Measurement]:
    names = [name for name in backends_of("layers", options.device) if name != "triton"]
    dim = 16 if options.quick else 128
    for heads, kv_heads in HEADS[:1] if options.quick else HEADS:
        for rows in (1, 8) if options.quick else (8, 256, 2048):
            for dtype in DTYPES:
                yield Measurement(
                    kernel="rope_store_kv",
                    shape={"rows": rows, "heads": heads, "kv_heads": kv_heads, "D": dim},
                    dtype=dtype,
                    make_inputs=partial(rope_inputs, rows, heads, kv_heads, dim, dtype),
                    backends={name: partial(rope_store_kv, backend=name) for name in names},
                    check=as_exact_as(plain_rope_and_pools),
                    floor=floors.rope_store_kv(rows, heads, kv_heads, dim, dtype.itemsize),
                    peers={"torch": plain_rope},
                    mutates=(5, 6),
                )


def measurements(options: Options) -> Iterator[Measurement]:
    yield from norm_measurements(options)
    yield from rope_measurements(options)


def norm_measurements(options: Options) -> Iterator[Measurement]:
    ours = {name: partial(rms_norm, eps=EPS, backend=name) for name in backends_of("layers", options.device)}
    for rows, dim in shapes(options):
        for dtype in DTYPES:
            peers = peers_of(options.device, dtype, rows, dim)
            floor = floors.rms_norm(rows, dim, dtype.itemsize)
            yield Measurement(
                kernel="rms_norm",
                shape={"rows": rows, "D": dim},
                dtype=dtype,
                make_inputs=partial(make_inputs, rows, dim, dtype, 0),
                backends=ours,
                check=as_exact_as(plain_rms_norm),
                floor=floor,
                peers=peers,
            )
            yield Measurement(
                kernel="rms_norm_with_backward",
                shape={"rows": rows, "D": dim},
                dtype=dtype,
                make_inputs=partial(make_inputs, rows, dim, dtype, 1),
                backends={name: with_backward(run) for name, run in ours.items()},
                check=as_exact_as(with_backward(plain_rms_norm)),
                floor=floor + floors.rms_norm_backward(rows, dim, dtype.itemsize),
                peers={name: with_backward(run) for name, run in peers.items()},
            )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, KERNELS, measurements))
