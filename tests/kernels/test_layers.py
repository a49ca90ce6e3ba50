"""`layers.rms_norm` on every backend: against float64 and transformers, forward and backward; `layers.linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from foveate.kernels import layers
from foveate.kernels.dispatch import available, interpreting
from foveate.testing.cases import cases
from foveate.testing.tolerance import allowed_error, assert_as_exact_as, ulp

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = ["cpu", CUDA]
CASES = cases("layers.rms_norm")
COMPILED = ("cpp", "triton", "cuda")


def backends(device: str, dtype: torch.dtype | None = None) -> list[str]:
    """Those that can run here. In Triton's interpreter bfloat16 is not to be trusted."""
    skipped = {"triton"} if interpreting() and dtype == torch.bfloat16 else set()
    return [name for name in available("layers", torch.device(device)) if name not in skipped]


def home(backend: str) -> torch.device:
    """The device on which a backend is tested: Triton's, without its interpreter, is a GPU."""
    return torch.device("cuda" if backend == "triton" and not interpreting() else "cpu")


def draw(case, device: str) -> dict:
    return case.inputs(torch.Generator(device).manual_seed(0))


def float64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def gradients(function, x, weight, grad) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(function(x, weight), (x, weight), grad)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone at the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_this_run_proves_something():
    assert len(CASES) > 40
    assert {"cpp", "triton", "reference"} <= set(backends("cpu")) or torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_torch(case, device):
    inputs = draw(case, device)
    exact, plain = float64(**inputs), layers.rms_norm(**inputs, backend="reference")
    for backend in backends(device, case.dtype):
        before = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
        out = layers.rms_norm(**inputs, backend=backend)
        assert out.is_contiguous()
        assert_as_exact_as(out, exact, plain)
        assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_as_exact_as_torch(case, device):
    generator = torch.Generator(device).manual_seed(0)
    compared = set(backends(device, case.dtype)) & set(COMPILED)
    pooled: dict[str, list] = {backend: [] for backend in compared}
    # The error of plain code on a handful of numbers is a matter of luck: small cases are pooled over many draws.
    for _ in range(max(1, 40 // case.sizes["D"])):
        inputs = case.inputs(generator)
        x, weight, eps = (inputs[name] for name in ("x", "weight", "eps"))
        grad = torch.randn(x.shape, device=device, generator=generator).to(case.dtype)
        exact = gradients(lambda x, w, eps=eps: float64(x, w, eps), x.double(), weight.double(), grad.double())
        for backend in compared:

            def run(x, weight, backend: str, eps: float = eps) -> torch.Tensor:
                return layers.rms_norm(x, weight, eps, backend=backend)

            got = gradients(partial(run, backend=backend), x, weight, grad)
            plain = gradients(partial(run, backend="reference"), x, weight, grad)
            single = gradients(partial(run, backend="reference"), x.float(), weight.float(), grad.float())
            pooled[backend].append([*zip(got, exact, plain, single, strict=True)])
    for draws in pooled.values():
        for argument in range(2):  # x, weight
            got, exact, plain, single = (
                torch.stack(values) for values in zip(*(draw[argument] for draw in draws), strict=True)
            )
            assert got.dtype == case.dtype
            assert_as_exact_as(got, exact, plain, cancels=True)
            # The kernels sum in float32 whatever the dtype: only the last rounding is coarse.
            bound = allowed_error(exact, single, cancels=True) + ulp(exact, case.dtype)
            assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_reference_is_that_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(129, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(129))
        x = torch.randn(7, 129).to(dtype)
        theirs = module(x)
        exact = float64(x, module.weight, 1e-5)
    assert_as_exact_as(layers.rms_norm(x, module.weight.detach(), 1e-5, backend="reference"), exact, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [48, 129, 1023, 1024, 2050])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_batch_changes_no_bit_of_a_row(device, dim, dtype):
    x, grad = (torch.randn(9, dim, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(dim, device=device).to(dtype)
    order = torch.randperm(9)
    for backend in set(backends(device, dtype)) & set(COMPILED):

        def run(
            rows: torch.Tensor, upstream: torch.Tensor, backend: str = backend
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = rows.detach().requires_grad_()
            out = layers.rms_norm(rows, weight, 1e-6, backend=backend)
            return out.detach(), torch.autograd.grad(out, rows, upstream)[0]

        together = run(x, grad)
        shuffled = run(x[order], grad[order])
        alone = [torch.cat(rows) for rows in zip(*(run(x[i : i + 1], grad[i : i + 1]) for i in range(9)), strict=True)]
        for whole, mixed, single in zip(together, shuffled, alone, strict=True):
            assert torch.equal(whole, single), backend
            assert torch.equal(whole[order], mixed), backend


def defined_rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, lanes: int) -> np.ndarray:
    """One float32 row in the order that csrc/common/block.h defines, each operation rounded."""
    accumulators = np.zeros(lanes * 4, np.float32)
    for i, value in enumerate(x):
        accumulators[i % len(accumulators)] += value * value
    lane = accumulators[0::4] + accumulators[1::4] + accumulators[2::4] + accumulators[3::4]
    warps = lane.reshape(-1, 32)
    while warps.shape[1] > 1:
        half = warps.shape[1] // 2
        warps = warps[:, :half] + warps[:, half:]
    total = np.float32(0)
    for i, value in enumerate(warps[:, 0]):
        total = value if i == 0 else total + value
    scale = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    return x * scale * weight


@pytest.mark.parametrize(("dim", "lanes"), [(5, 32), (300, 32), (1023, 32), (1024, 128), (1700, 128)])
def test_bits_are_those_of_the_definition(dim, lanes):
    """Among them that no product is contracted into a sum, on which the equality of cpp and cuda rests."""
    x, weight = torch.randn(20, dim), torch.randn(dim)
    out = layers.rms_norm(x, weight, 1e-6, backend="cpp").numpy()
    for row in range(20):
        assert np.array_equal(out[row], defined_rms_norm(x[row].numpy(), weight.numpy(), 1e-6, lanes))


def test_threads_change_no_bit():
    x, weight = torch.randn(300, 700), torch.randn(700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layers.rms_norm(x, weight, 1e-6, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp_and_cuda_give_the_same_bits(case):
    inputs = draw(case, "cpu")
    on_gpu = {name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()}
    got = layers.rms_norm(**on_gpu, backend="cuda").cpu()
    assert torch.equal(got, layers.rms_norm(**inputs, backend="cpp"))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_views_of_projections_are_read_where_they_lie(backend):
    """Queries and keys are slices of one buffer [T, heads, head_dim]."""
    qkv = torch.randn(5, 9, 24, device=home(backend))
    weight = torch.randn(24, device=home(backend))
    for part in (qkv[:, :4], qkv[:, 4:7], qkv[::2], qkv[:, :, :8]):
        gain = weight[: part.shape[-1]]
        expected = layers.rms_norm(part, gain, 1e-6, backend="reference")
        torch.testing.assert_close(layers.rms_norm(part, gain, 1e-6, backend=backend), expected)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_any_number_of_dimensions(backend, shape):
    x, weight = torch.randn(shape, device=home(backend)), torch.randn(7, device=home(backend))
    out = layers.rms_norm(x, weight, 1e-6, backend=backend)
    torch.testing.assert_close(out, layers.rms_norm(x, weight, 1e-6, backend="reference"))


def test_double_precision_is_served_by_the_reference():
    x, weight = torch.randn(3, 7).double(), torch.randn(7).double()
    assert torch.equal(layers.rms_norm(x, weight, 1e-6), layers.rms_norm(x, weight, 1e-6, backend="reference"))


def test_nan_and_infinity_stay_in_their_row():
    rows = torch.randn(4, 40)
    rows[1, 3], rows[2, 5] = torch.nan, torch.inf
    for backend in ("cpp", "triton"):
        x = rows.to(home(backend))
        out = layers.rms_norm(x, torch.ones_like(x[0]), 1e-6, backend=backend).cpu()
        assert out[1].isnan().all()
        assert torch.equal(out[2].isnan(), torch.arange(40) == 5)
        assert out[[0, 3]].isfinite().all()


def test_rows_are_copied_only_where_no_view_is_possible(monkeypatch):
    seen = []
    monkeypatch.setattr(layers.operators, "forward", lambda rows, *rest: seen.append(rows) or (rows, None))
    buffer, heads = torch.randn(6, 20), torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        for x in (buffer[:, :8], buffer[0, :8], heads[:, :, 1:3], heads[:, 1], buffer.t()[:, :6]):
            layers.rms_norm(x, torch.ones(x.shape[-1]), 1e-6, backend="cpp")
    shares = [rows.untyped_storage().data_ptr() in (buffer.untyped_storage().data_ptr(),
              heads.untyped_storage().data_ptr()) for rows in seen]  # fmt: skip
    assert shares == [True, True, True, True, False]


def test_gradients_are_first_ones_only():
    x, weight = torch.randn(2, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(layers.rms_norm(x, weight, 1e-6).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' has all of them"):
        grad.sum().backward()
    for frozen in (x, weight):
        x.grad = weight.grad = None
        frozen.requires_grad_(False)
        layers.rms_norm(x, weight, 1e-6).sum().backward()
        assert (x.grad is None, weight.grad is None) == (frozen is x, frozen is weight)
        frozen.requires_grad_(True)


def test_registered_as_an_operator():
    x, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    opcheck(torch.ops.foveate.rms_norm.default, (x, weight, 1e-6, "cpp"))
    rows, scale = torch.randn(70, 5), torch.rand(70)
    opcheck(torch.ops.foveate.rms_norm_backward.default, (rows, rows, weight.detach(), scale, True, "cpp"))


def test_compiles_without_a_graph_break():
    x, weight = torch.randn(6, 33, requires_grad=True), torch.randn(33, requires_grad=True)

    def loss(x, weight):
        return layers.rms_norm(x * 2, weight, 1e-6, backend="cpp").square().sum()

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight), loss(x, weight))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # torch.jit.trace
@pytest.mark.parametrize("grad", [True, False])
def test_traces_and_transforms_see_the_operator(grad):
    """Also without gradients, where the plain call runs without it."""
    x, weight = torch.randn(3, 4, 8), torch.randn(8)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return layers.rms_norm(x, weight, 1e-6, backend="cpp")

    with torch.set_grad_enabled(grad):
        expected = run(x, weight)
        graph = make_fx(run)(x, weight)
        assert torch.ops.foveate.rms_norm.default in [node.target for node in graph.graph.nodes]
        assert torch.equal(graph(x, weight), expected)
        with FakeTensorMode() as mode:
            assert isinstance(run(*map(mode.from_tensor, (x, weight))), FakeTensor)
        assert torch.equal(torch.vmap(run, (0, None))(x, weight), expected)
        assert torch.equal(torch.func.functionalize(run)(x, weight), expected)
        assert torch.equal(torch.jit.trace(run, (x, weight), check_trace=False)(2 * x, weight), run(2 * x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(3), r"expected \[4\] torch.float32 on cpu, got '\[3\] .*\(weight\)"),
        (torch.zeros(2, 4), torch.zeros(4).half(), r"expected \[4\] torch.float32 on cpu, got .*float16.*\(weight\)"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), r"on cpu, got .*meta.*\(weight\)"),
        (torch.zeros(2, 0), torch.zeros(0), r"expected \[..., D\] with D >= 1, got \[2, 0\] \(x\)"),
        (torch.zeros(()), torch.zeros(()), r"expected \[..., D\] with D >= 1, got \[\] \(x\)"),
        (torch.zeros(2, 4).double(), torch.zeros(4).double(), r"got 'cpp': it takes float32.*not torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(x, weight, message):
    with pytest.raises(ValueError, match=message):
        layers.rms_norm(x, weight, 1e-6, backend="cpp")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "out", "inner"), [(0, 8, 4), (1, 9, 5), (8, 8, 0), (8, 6, 7), (129, 12, 3), (2, 8202, 3)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(threads, rows, out, inner, has_bias):
    x, weight = torch.randn(rows, inner), torch.randn(out, inner)
    bias = torch.randn(out) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = layers.linear(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    assert_as_exact_as(got, exact, F.linear(x, weight, bias))


def test_linear_of_a_weight_that_is_a_view():
    """A slice of a fused buffer is contiguous, a transposed one is not; both are read where they lie."""
    x, buffer = torch.randn(3, 6), torch.randn(20, 6)
    for weight in (buffer[4:12], torch.randn(6, 8).t(), buffer[::2]):
        torch.testing.assert_close(layers.linear(x, weight), x @ weight.t())


# Rows, columns: tails in every vector register, more columns than one thread takes, more rows than one block.
WIDTHS = [(40, 24), (192, 333), (576, 1536), (3000, 64)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "out"), WIDTHS)
def test_a_row_of_linear_in_blocks_is_the_same_in_every_batch(inner, out, dtype, threads, with_threads):
    x, weight, bias = torch.randn(131, inner).to(dtype), torch.randn(out, inner).to(dtype), torch.randn(out).to(dtype)
    with_threads(threads)
    whole = layers.linear(x, weight, bias, row_block=64)
    for start, stop in [(0, 1), (130, 131), (3, 5), (60, 70), (17, 64), (63, 127), (64, 129), (1, 131)]:
        assert torch.equal(layers.linear(x[start:stop], weight, bias, row_block=64), whole[start:stop])
    reordered = torch.randperm(131)
    assert torch.equal(layers.linear(x[reordered], weight, bias, row_block=64), whole[reordered])
    assert layers.linear(x[:0], weight, bias, row_block=64).shape == (0, out)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_as_exact_as(whole, exact, F.linear(x, weight, bias))


def test_a_row_of_linear_without_blocks_is_not():
    x, weight = torch.randn(131, 192), torch.randn(333, 192)
    whole = layers.linear(x, weight)
    assert not all(torch.equal(layers.linear(x[row : row + 1], weight)[0], whole[row]) for row in range(131))


def test_small_blocks_are_refused():
    with pytest.raises(ValueError, match=r"expected at least 16 rows, got 15 \(row_block\)"):
        layers.linear(torch.ones(1, 2), torch.ones(3, 2), row_block=15)


ELEMENTWISE = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "cos": torch.cos}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("function", list(ELEMENTWISE.values()), ids=list(ELEMENTWISE))
@pytest.mark.parametrize("width", [1, 5, 80, 333, 40_000])
def test_elementwise_has_the_same_bits_everywhere(width, function, threads, with_threads):
    with_threads(threads)
    rows = 70 if width < 1000 else 5
    x = torch.randn(rows, width) * 4
    whole = layers.elementwise(function, x)
    torch.testing.assert_close(whole, function(x))
    for start, stop in [(0, 1), (1, 2), (rows - 1, rows), (2, 4), (1, rows - 1)]:
        assert torch.equal(layers.elementwise(function, x[start:stop]), whole[start:stop])
    strided = torch.randn(rows, 2 * width)
    strided[:, :width] = x
    assert torch.equal(layers.elementwise(function, strided[:, :width]), whole)
    assert layers.elementwise(function, x[:0]).shape == (0, width)


def test_without_it_they_differ():
    x = torch.randn(70, 333) * 4
    assert not all(torch.equal(F.silu(x[start:]), F.silu(x)[start:]) for start in range(70))
