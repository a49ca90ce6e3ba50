"""linear_logprobs in Triton against float64 autograd on the materialised formula, at every edge of a tile and chunk."""

from __future__ import annotations

import pytest
import torch

from foveate.kernels.dispatch import available
from foveate.kernels.policy_loss import linear_logprobs
from foveate.kernels.policy_loss.logprobs import allowed_of
from foveate.kernels.sampling import masks
from foveate.testing.materialised import VARIANTS, gradient_bounds, problem, variant
from foveate.testing.materialised import logprobs as plain
from foveate.testing.tolerance import allowed_error, assert_as_exact_as, ulp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif("triton" not in available("policy_loss", DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of NaN and inf in the interpreter
]
TILE = 128  # ids of a tile; float32 takes 32 rows of it, float16 128
HALF = [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]  # the interpreter has no bfloat16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several splits, chunks, groups of blocks and steps of the last sum, at sizes that the interpreter manages."""
    from foveate.kernels.policy_loss import triton_kernel

    monkeypatch.setattr(triton_kernel, "SPLIT", TILE)
    monkeypatch.setattr(triton_kernel, "CHUNK_BYTES", 1)  # one tile at a time
    monkeypatch.setattr(triton_kernel, "GROUP", 2)
    monkeypatch.setattr(triton_kernel, "REDUCE_SPLITS", 2)


def triton(hidden, head, targets, **given):
    return linear_logprobs(hidden, head, targets, backend="triton", **given)


def run(function, hidden, head, bias, targets, cotangents, dtype=None, **given):
    """Results, then the gradients of hidden, head and bias (where there is one)."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, head, bias) if x is not None]
    cast = [x if dtype is None else x.to(dtype) for x in leaves]
    temperature = given.pop("temperature", 1.0)
    if isinstance(temperature, torch.Tensor) and dtype is not None:
        temperature = temperature.to(dtype)
    out = function(*cast[:2], targets, bias=cast[2] if bias is not None else None, temperature=temperature, **given)
    torch.autograd.backward(out, [c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)])
    return [x.detach() for x in (*out, *(leaf.grad for leaf in leaves))]


SHAPES = [(1, 1, 1), (29, 7, 33), (33, 64, TILE), (67, 33, 3 * TILE - 5)]
CASES = [(name, (31, 40, TILE + 1)) for name in VARIANTS] + [(n, shape) for n in ("plain", "all") for shape in SHAPES]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_values_and_gradients(name, shape):
    rows, _, vocab = shape
    hidden, head, bias, targets, cotangents = problem(*shape)
    bias = bias if name in ("bias", "all") else None
    given = variant(name, rows, vocab, targets)
    exact, plain32, got = (
        run(function, hidden, head, bias, targets, cotangents, dtype, **given)
        for function, dtype in ((plain, torch.float64), (plain, torch.float32), (triton, None))
    )
    for truth, same_precision, mine in zip(exact[:3], plain32[:3], got[:3], strict=True):
        assert_as_exact_as(mine, truth, same_precision, cancels=True)
    double = run(plain, *(x if x is None else x.double() for x in (hidden, head, bias)), targets, cotangents, **given)
    bounds = gradient_bounds(hidden, head, bias, targets, cotangents, torch.float32, **given)
    for truth, same_precision, bound, mine in zip(double[3:], plain32[3:], bounds, got[3:], strict=True):
        assert mine.dtype == torch.float32
        assert ((mine.double() - truth).abs() <= allowed_error(truth, same_precision, cancels=True) + bound).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(31, 40, TILE + 1), (130, 20, 60)], ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_half_precision(name, shape, dtype):
    """Results as from float32 products; gradients off by one rounding of a logit's gradient, and their own."""
    rows, _, vocab = shape
    hidden, head, bias, targets, cotangents = problem(*shape, dtype)
    bias = bias if name == "all" else None
    given = variant(name, rows, vocab, targets)
    exact, plain32, got = (
        run(function, hidden, head, bias, targets, cotangents, compute, **given)
        for function, compute in ((plain, torch.float64), (plain, torch.float32), (triton, None))
    )
    for truth, same_precision, mine in zip(exact[:3], plain32[:3], got[:3], strict=True):
        assert_as_exact_as(mine, truth, same_precision, cancels=True)
    double = run(plain, *(x if x is None else x.double() for x in (hidden, head, bias)), targets, cotangents, **given)
    bounds = gradient_bounds(hidden, head, bias, targets, cotangents, dtype, **given)
    for truth, bound, mine in zip(double[3:], bounds, got[3:], strict=True):
        assert mine.dtype == dtype
        assert ((mine.double() - truth).abs() <= 1.01 * bound + ulp(truth, dtype)).all()


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_closer_than_plain_torch(dtype):
    hidden, head, _, targets, cotangents = problem(40, 24, 2 * TILE, dtype)
    exact, torch16, got = (
        run(function, hidden, head, None, targets, cotangents, compute)
        for function, compute in ((plain, torch.float64), (plain, dtype), (triton, None))
    )
    for truth, theirs, mine in zip(exact, torch16, got, strict=True):
        allowed = 2 * (theirs.double() - truth.double()).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth.double()).abs().max() <= allowed


@pytest.mark.parametrize(("gradient", "size"), [(1e-5, 10.0), (1e4, 0.02)])
def test_float16_keeps_small_and_large_gradients(gradient, size):
    """Those of logits, before they are multiplied, are about 5e-7, of which float16 has one digit, or exceed 65504."""
    hidden, head, _, targets, _ = problem(4, 16, 3 * TILE)
    hidden, head = (hidden * size).half(), (head * 0.02 / size).half()
    cotangents = torch.tensor([gradient, 0.0, 0.0], device=DEVICE)[:, None].expand(3, 4)
    *_, truth = run(plain, hidden.double(), head.double(), None, targets, cotangents, temperature=0.05)
    *_, got = run(triton, hidden, head, None, targets, cotangents, temperature=0.05)
    _, bound = gradient_bounds(hidden, head, None, targets, cotangents, torch.float16, temperature=0.05)
    assert ((got.double() - truth).abs() <= 1.01 * bound + ulp(truth, torch.float16)).all()


def test_ignored_rows():
    """Zeros, without a gradient, also where a whole block is ignored and whatever stands in it."""
    hidden, head, _, targets, cotangents = problem(70, 8, 40)
    targets[:] = 3
    targets[32:64] = -100
    targets[5] = -100
    ignored = targets == -100
    hidden[32:64] = 1e30  # overflows in the products
    hidden[5] = 1e4  # and this one in e^z
    *values, d_hidden, d_head = run(triton, hidden, head, None, targets, cotangents)
    assert all(not x[ignored].any() and (x[~ignored] != 0).all() for x in values)
    assert not d_hidden[ignored].any()
    assert d_hidden[~ignored].any(dim=1).all()
    kept = ~ignored
    *_, expected = run(triton, hidden[kept], head, None, targets[kept], cotangents[:, kept])
    torch.testing.assert_close(d_head, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["targets", "temperature", "bias", "one_temperature"])
def test_views_of_vectors(name, backend):
    """Entries that do not lie side by side, or are all the same one."""
    rows, vocab = 3, TILE + 1
    hidden, head, bias, _, cotangents = problem(rows, 8, vocab)
    targets = torch.tensor([5, 100, TILE], device=DEVICE)
    dense = {"targets": targets, "temperature": torch.rand(rows, device=DEVICE) + 0.5, "bias": bias}
    if name == "one_temperature":
        view = {"temperature": torch.tensor(0.5, device=DEVICE).expand(rows)}
        dense["temperature"] = torch.full((rows,), 0.5, device=DEVICE)
    else:
        view = {name: torch.stack([dense[name], dense[name].flip(0)], 1).flatten()[::2]}
        assert view[name].stride() == (2,)
    results = []
    for given in (dense, {**dense, **view}):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        leaf = given["bias"].detach().requires_grad_()
        values = {**given, "bias": leaf}
        out = linear_logprobs(*leaves, values.pop("targets"), **values, backend=backend)
        torch.autograd.backward(list(out), list(cotangents))
        results.append([*out, *(x.grad for x in (*leaves, leaf))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("needs", [(True, True), (True, False)], ids=["head", "frozen_head"])
def test_ignored_rows_may_hold_anything(backend, value, needs):
    """Between rows that count, in one block and one chunk; the cap, whose slope is NaN there too."""
    hidden, head, bias, targets, cotangents = problem(5, 8, TILE + 1)
    bias, given = bias.requires_grad_(), {"softcap": 3.0, "bias": bias, "backend": backend}
    hidden[targets == -100] = 0.0
    results = []
    for x in (hidden, hidden.masked_fill((targets == -100)[:, None], value)):
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, head), needs, strict=True)]
        bias.grad = None
        torch.autograd.backward(list(linear_logprobs(*leaves, targets, **given)), list(cotangents))
        results.append([leaf.grad for leaf in leaves if leaf.requires_grad] + [bias.grad])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert not results[1][0][targets == -100].any()


def test_no_rows():
    hidden, head, bias, targets, cotangents = problem(0, 8, 40)
    *values, d_hidden, d_head, d_bias = run(triton, hidden, head, bias, targets, cotangents)
    assert [tuple(x.shape) for x in (*values, d_hidden)] == [(0,), (0,), (0,), (0, 8)]
    assert not d_head.any()
    assert not d_bias.any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_is_not_allowed(backend):
    """A target outside has -inf and the gradient -p; a row that allows nothing has NaN, and only that row."""
    hidden, head, _, targets, _ = problem(3, 8, TILE + 2)
    targets[:] = torch.tensor([1, TILE + 1, 0])
    allowed = torch.ones(3, TILE + 2, dtype=torch.bool, device=DEVICE)
    allowed[0, 1], allowed[2] = False, False
    hidden.requires_grad_()
    out = linear_logprobs(hidden, head, targets, allowed=allowed, backend=backend)
    assert out.logprobs[0] == -torch.inf
    assert all(x[2].isnan() and x[1].isfinite() for x in out)
    out.logprobs[0].backward()
    p = (hidden.detach()[0] @ head.T).masked_fill(~allowed[0], -torch.inf).softmax(-1)
    torch.testing.assert_close(hidden.grad[0], -p @ head, rtol=2e-5, atol=2e-6)
    assert not hidden.grad[1].any()


def test_masks_are_packed_in_parts(monkeypatch):
    allowed = torch.rand(7, 70, device=DEVICE) < 0.5
    monkeypatch.setattr("foveate.kernels.policy_loss.logprobs.PACK_ELEMENTS", 150)
    assert torch.equal(allowed_of(allowed, "triton"), masks.pack(allowed))
    assert torch.equal(allowed_of(allowed[2], "triton"), masks.pack(allowed[2:3]))
    assert allowed_of(allowed, "reference") is allowed
    assert allowed_of(None, "triton") is None


def test_frozen_inputs_cost_no_product(monkeypatch):
    from foveate.kernels.policy_loss import triton_kernel

    products = []
    multiply = triton_kernel.multiply
    monkeypatch.setattr(triton_kernel, "multiply", lambda a, b: products.append(1) or multiply(a, b))
    hidden, head, bias, targets, _ = problem(3, 8, 2 * TILE)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        leaves = [x.clone().requires_grad_(needed) for x, needed in zip((hidden, head, bias), needs, strict=True)]
        products.clear()
        triton(*leaves[:2], targets, bias=leaves[2]).logprobs.sum().backward()
        assert len(products) == 2 * (needs[0] + needs[1])  # two chunks
        assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_tied_embeddings_add_both_gradients():
    _, head, _, targets, _ = problem(6, 8, 20)
    grads = []
    for function in (plain, triton):
        leaf = head.clone().requires_grad_()
        function(torch.nn.functional.embedding(torch.arange(6, device=DEVICE), leaf), leaf, targets)[0].sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_bits_alone_and_in_any_place():
    rows, vocab = 66, 2 * TILE + 3
    hidden = torch.randint(-3, 4, (rows, 32), device=DEVICE).float()  # products are exact in any order
    head = torch.randint(-2, 3, (vocab, 32), device=DEVICE) / 8
    targets, order = torch.randint(vocab, (rows,), device=DEVICE), torch.randperm(rows, device=DEVICE)
    whole = triton(hidden, head, targets)
    for got, want in zip(triton(hidden[order], head, targets[order]), whole, strict=True):
        assert torch.equal(got, want[order])
    for row in (0, 31, 65):
        for got, want in zip(triton(hidden[row : row + 1], head, targets[row : row + 1]), whole, strict=True):
            assert torch.equal(got, want[row : row + 1])


def test_the_same_bits_twice():
    hidden, head, bias, targets, cotangents = problem(35, 16, TILE + 9)
    first, second = (run(triton, hidden, head, bias, targets, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_views_and_two_dtypes():
    """Strided, unaligned and transposed operands; float16 with float32 multiplies in float32."""
    hidden, head, _, targets, cotangents = problem(3, 40, TILE + 1)
    wide, tall = torch.randn(3, 81, device=DEVICE), torch.randn(40, TILE + 1, device=DEVICE)
    wide[:, 1:41], tall[:] = hidden, head.T
    leaves = [x.clone().requires_grad_() for x in (wide, tall, hidden, head)]
    got = triton(leaves[0][:, 1:41], leaves[1].T, targets)
    expected = triton(leaves[2], leaves[3], targets)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for out in (got, expected):
        torch.autograd.backward(list(out), list(cotangents))
    torch.testing.assert_close(leaves[0].grad[:, 1:41], leaves[2].grad)
    torch.testing.assert_close(leaves[1].grad.T, leaves[3].grad)
    mixed = run(triton, hidden.detach().half(), head, None, targets, cotangents)
    same = run(triton, hidden.detach().half().float(), head, None, targets, cotangents)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(mixed, same, strict=True))
    assert mixed[3].dtype == torch.float16


def test_autocast_changes_nothing():
    hidden, head, _, targets, cotangents = problem(3, 8, 20)
    expected = run(triton, hidden, head, None, targets, cotangents)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = run(triton, hidden, head, None, targets, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "cpp"}, r"expected one of \('reference', 'triton'\), which linear_logprobs has, got 'cpp'"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.float64), "backend": "triton"}, r"not torch\.float64"),
        ({"lm_head": torch.zeros(0, 4)}, r"expected float \[V, D\] with V, D > 0.*\(lm_head\)"),
        ({"temperature": 0.0}, r"expected a number > 0, got 0\.0 \(temperature\)"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    arguments = {"hidden": torch.zeros(3, 4), "lm_head": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.long)}
    arguments = {**arguments, **given}
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)
