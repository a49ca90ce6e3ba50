"""What linear_logprobs may not cost: a tensor of tokens by vocabulary, or a compilation for a number of tokens."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.kernels.dispatch import available
from foveate.kernels.policy_loss import linear_logprobs, linear_policy_loss
from foveate.kernels.policy_loss.reference import logprobs as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif("triton" not in available("policy_loss", DEVICE), reason="needs Triton")
TILE = 128  # ids of a tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_tensor_of_tokens_by_vocabulary(monkeypatch, backend, dtype):
    """Every tensor that an operation returns, forward and backward, is smaller; most are by far."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.elements = max(self.elements, tensor.numel())
            return out

    rows, width, vocab = 40, 4, 4 * TILE
    from foveate.kernels.policy_loss import triton_kernel

    monkeypatch.setattr(triton_kernel, "CHUNK_BYTES", 1)  # one tile at a time
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 8 * vocab)
    leaves = [
        torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in ((rows, width), (vocab, width))
    ]
    bias, targets = torch.randn(vocab, device=DEVICE, requires_grad=True), torch.randint(vocab, (rows,), device=DEVICE)
    with Largest() as seen:
        out = linear_logprobs(*leaves, targets, bias=bias, backend=backend)
        torch.stack(list(out)).sum().backward()
    padded = 64 if dtype == torch.float16 else 32  # of a width the kernels read
    chunk = 8 * vocab if backend == "reference" else max(rows * TILE, vocab * padded)
    assert seen.elements == chunk
    if backend == "triton":
        assert rows * TILE < rows * vocab


def test_the_products_of_torch_on_a_gpu():
    """What a GPU is asked for: float16 and bfloat16 summed and returned in float32."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from foveate.kernels.policy_loss import triton_products

    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            a, b = torch.zeros(6, 4, dtype=dtype, device="cuda"), torch.zeros(6, 5, dtype=dtype, device="cuda")
            out = triton_products.multiply(a.T, b)
            assert (tuple(out.shape), out.dtype) == ((4, 5), torch.float32)


def test_compile_is_for_every_number_of_rows():
    """One specialisation of each kernel whatever the number of tokens: its arguments are bound as a launch does."""
    script = """
        import torch
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature
        from foveate.kernels.policy_loss import triton_kernel as family, triton_logits

        backend, keys = make_backend(GPUTarget("cuda", 90, 32)), {}
        triton_logits.CHUNK_BYTES = 1  # blocks of STEP tokens
        names = ("logprob_partials_kernel", "logprob_reduce_kernel", "logit_gradients_kernel", "row_partials_kernel",
                 "row_gradients_kernel")
        for name in names:
            kernel = getattr(triton_logits if name.startswith("row") else family, name)
            binder = create_function_from_signature(kernel.signature, kernel.params, backend)
            def record(*args, grid, warmup, name=name, binder=binder, **kwargs):
                keys.setdefault(name, set()).add(str(binder(*args, **kwargs, debug=False)[1:]))
            kernel.run = record
        head, bias = torch.zeros(5000, 64, dtype=torch.bfloat16), torch.zeros(5000)
        allowed = torch.zeros(1, 157, dtype=torch.int32)
        for rows in (1, 2, 16, 17, 128, 129, 2048, 70_001):
            hidden, targets = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
            given = (hidden, head, bias, targets, torch.ones(rows), 30.0, allowed)
            results = family.forward(*given)
            family.backward(*given, *results[1:], *(torch.ones(rows) for _ in range(3)), False, False, False)
            if rows < 10_000:
                both = torch.zeros(rows), torch.zeros(rows)
                family.with_gradients(*given, *both, lambda: (both[0], None), False, False, False)
        print({name: len(found) for name, found in keys.items()})
        assert set(keys) == set(names) and all(len(found) == 1 for found in keys.values()), keys
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_peak_memory_on_a_gpu(monkeypatch):
    from foveate.kernels.policy_loss import triton_kernel

    monkeypatch.setattr(triton_kernel, "CHUNK_BYTES", 1 << 24)
    rows, width, vocab = 4096, 512, 65_536
    hidden, head = (torch.randn(n, width, device=DEVICE).bfloat16().requires_grad_() for n in (rows, vocab))
    targets = torch.randint(vocab, (rows,), device=DEVICE)

    def step():
        out = linear_logprobs(hidden, head, targets, backend="triton").logprobs.sum()
        return torch.autograd.grad(out, (hidden, head))

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    own = (1 << 24) + 3 * hidden.numel() * 4 + head.numel() * (2 + 4) + 4 * 33 * rows * 4
    assert torch.cuda.max_memory_allocated() - before < own < rows * vocab


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_peak_memory_of_the_loss_on_a_gpu(monkeypatch):
    """Logits and their gradients, of hidden states a copy and two gradients, and the LM head's in two dtypes."""
    from foveate.kernels.policy_loss import triton_logits

    monkeypatch.setattr(triton_logits, "CHUNK_BYTES", 1 << 27)
    rows, width, vocab = 4096, 512, 65_536
    hidden, head = (torch.randn(n, width, device=DEVICE).bfloat16().requires_grad_() for n in (rows, vocab))
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    ids = torch.arange(rows, dtype=torch.int32, device=DEVICE) // 512
    given = {"advantages": torch.ones(8, device=DEVICE), "sequence_ids": ids, "denominator": float(rows)}

    def step():
        loss = linear_policy_loss(hidden, head, targets, **given, backend="triton").loss
        return torch.autograd.grad(loss, (hidden, head))

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    own = (1 << 27) + hidden.numel() * (2 + 3 * 4 + 2) + head.numel() * (4 + 2) + 64 * rows * 4
    assert torch.cuda.max_memory_allocated() - before < own < rows * vocab * 2
