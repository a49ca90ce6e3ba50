"""Gradients of the policy loss computed with its value: exactness, the number of products, memory, autograd."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from foveate.kernels.dispatch import available
from foveate.kernels.policy_loss import (
    KINDS,
    PolicyLossOptions,
    linear_policy_loss,
)
from foveate.kernels.policy_loss.logprobs import LogitChunks
from foveate.kernels.policy_loss.reference import logprobs as reference
from foveate.testing.materialised import DEVICE, VARIANTS, gradient_bounds, problem, variant
from foveate.testing.materialised import logprobs as plain
from foveate.testing.tolerance import allowed_error, assert_as_exact_as, ulp

triton_logits = pytest.importorskip("foveate.kernels.policy_loss.triton_logits")
pytestmark = [
    pytest.mark.skipif("triton" not in available("policy_loss", DEVICE), reason="needs Triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of NaN and inf in the interpreter
]
BACKENDS = ["reference", "triton"]
VOCAB, WIDTH, TILE = 75, 12, 32
STEP, CHUNK = 8, 5  # tokens of a block of Triton, of a chunk of the reference


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several chunks, blocks of parts, splits and tiles."""
    small = {"CHUNK_BYTES": 1, "STEP": STEP, "TILE": TILE, "SPLIT": 2 * TILE, "REDUCE_SPLITS": 2, "REDUCE_ROWS": 2}
    for name, value in small.items():
        monkeypatch.setattr(triton_logits, name, value)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", CHUNK * VOCAB)


def one_pass(backend, hidden, head, bias, targets, cotangents, **given):
    """Log-probs and entropies, then the gradients of hidden, head and bias in their dtypes."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in (hidden, head, bias)]
    chunks = LogitChunks(*leaves[:2], targets, bias=leaves[2], backend=backend, **given)
    by_entropy = cotangents[2] if cotangents[2].any() else None
    gradients = chunks.gradients(lambda: (cotangents[0], by_entropy))
    pairs = [(g, x.dtype) for g, x in zip(gradients, leaves, strict=True) if x is not None]
    return [chunks.logprobs, chunks.entropy, *(g.to(dtype) for g, dtype in pairs)]


def materialised(dtype, hidden, head, bias, targets, cotangents, **given):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, head, bias) if x is not None]
    if isinstance(given.get("temperature"), torch.Tensor):
        given["temperature"] = given["temperature"].to(dtype)
    out = plain(*leaves[:2], targets, bias=leaves[2] if bias is not None else None, **given)
    torch.autograd.backward(out, list(cotangents.to(dtype)))
    return [x.detach() for x in (out[0], out[2], *(leaf.grad for leaf in leaves))]


HALF = [torch.float16, torch.bfloat16]
VALUES = [
    *itertools.product(["reference"], [torch.float32, *HALF], VARIANTS, [False, True]),
    *itertools.product(["triton"], [torch.float32], VARIANTS, [True]),
    *itertools.product(["triton"], HALF, ["all"], [True]),
    *itertools.product(["triton"], [torch.float32, torch.bfloat16], ["plain"], [False]),
]


@pytest.mark.parametrize(("backend", "dtype", "name", "entropy"), VALUES, ids=str)
def test_values_and_gradients(monkeypatch, backend, dtype, name, entropy):
    """Values and float32 gradients as exact as plain code in float32; in half precision a logit's gradient is rounded
    once, and the result."""
    rows = 31
    monkeypatch.setattr(triton_logits, "STEP", 16)
    hidden, head, bias, targets, cotangents = problem(rows, WIDTH, VOCAB, dtype)
    bias = bias if name in ("bias", "all") else None
    cotangents[1] = 0
    cotangents[2] *= entropy
    inputs = hidden, head, bias, targets, cotangents
    given = variant(name, rows, VOCAB, targets)
    exact, float32 = (materialised(x, *inputs, **given) for x in (torch.float64, torch.float32))
    got = one_pass(backend, *inputs, **given)
    for mine, truth, simple in zip(got[:2], exact[:2], float32[:2], strict=True):
        assert_as_exact_as(mine, truth, simple, cancels=True)
    bounds = gradient_bounds(*inputs, torch.float32 if backend == "reference" else dtype, **given)
    truncates = dtype == torch.bfloat16 and DEVICE.type == "cpu"  # as the interpreter does: twice the error of rounding
    for mine, truth, simple, bound in zip(got[2:], exact[2:], float32[2:], bounds, strict=True):
        assert mine.dtype == dtype
        allowed = allowed_error(truth, simple, cancels=True) + 1.01 * (1 + truncates) * bound + ulp(truth, dtype)
        assert ((mine.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_no_worse_than_twice_plain_torch(backend, dtype):
    inputs = problem(STEP + 4, 24, VOCAB, dtype)
    inputs[4][1] = 0
    exact, theirs = (materialised(x, *inputs) for x in (torch.float64, dtype))
    for truth, simple, mine in zip(exact, theirs, one_pass(backend, *inputs), strict=True):
        allowed = 2 * (simple.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("rows", [0, 1, 2, STEP - 1, STEP, STEP + 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend, rows):
    inputs = problem(rows, 1, 1 if rows == 2 else VOCAB)
    inputs[4][1] = 0
    for mine, truth in zip(one_pass(backend, *inputs), materialised(torch.float64, *inputs), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("gradient", [1e-5, 1e4])
def test_float16_keeps_small_and_large_gradients(gradient):
    hidden, head, _, targets, cotangents = problem(STEP + 2, 16, VOCAB, torch.float16)
    head = head * (0.02 if gradient > 1 else 1)
    cotangents.zero_()[0] = gradient
    inputs = hidden, head, None, targets, cotangents
    truth = materialised(torch.float64, *inputs, temperature=0.05)
    got = one_pass("triton", *inputs, temperature=0.05)
    bounds = gradient_bounds(*inputs, torch.float16, temperature=0.05)
    for mine, exact, bound in zip(got[2:], truth[2:], bounds, strict=True):
        kept = exact.abs() < 60_000  # of what float16 can hold in the end
        assert kept.any()
        assert ((mine.double() - exact).abs() <= 1.01 * bound + ulp(exact, torch.float16))[kept].all()


def sequences(length=3):
    """Hidden states, LM head, targets, and the rest of a batch; chunks end within a sequence."""
    hidden, head, _, targets, cotangents = problem(4 * length, WIDTH, VOCAB)
    values = plain(hidden, head, targets)[0]
    data = {
        "advantages": torch.tensor([1.0, -0.5, 0.25, -1.0], device=DEVICE),
        "sequence_ids": torch.arange(4, dtype=torch.int32, device=DEVICE).repeat_interleave(length),
        "denominator": 5.0,
        "old_logprobs": values + 0.3 * cotangents[0],
        "rollout_logprobs": values + 0.3 * cotangents[1],
        "ref_logprobs": values + 0.3 * cotangents[2],
    }
    return (hidden, head), targets, data


def gradients_of(leaves, targets, data, factor=1.0, **given):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = linear_policy_loss(*leaves, targets, **data, **given)
    return [out.loss.detach(), *torch.autograd.grad(factor * out.loss, leaves), out.logprobs], out.metrics


CORRECTED = {"correction": "mis_sequence", "correction_low": 0.1, "correction_high": 9.0}
CHOICES = [
    *((kind, {}) for kind in KINDS),
    ("grpo", {"entropy_coef": 0.1, "kl_coef": 0.2, "aggregation": "sequence", "dual_clip": 1.4}),
    ("grpo", {**CORRECTED, "rejection": "k3", "rejection_high": 0.5}),
    ("sapo", {"correction": "tis"}),
]
IN_TRITON = [("triton", choice, True) for choice in CHOICES[3:4]] + [
    ("triton", choice, False) for choice in CHOICES[-3:]
]
IN_TORCH = list(itertools.product(("reference",), CHOICES, (False, True)))


@pytest.mark.parametrize(("backend", "choice", "on_policy"), IN_TORCH + IN_TRITON, ids=str)
def test_one_pass_equals_two(monkeypatch, backend, choice, on_policy):
    """The same loss, gradients, log-probs and metrics as from log-probs that are differentiated."""
    kind, options = choice
    leaves, targets, data = sequences()
    if on_policy:
        data["old_logprobs"] = None
    given = {"kind": kind, "options": PolicyLossOptions(**options), "backend": backend}
    got, metrics = gradients_of(leaves, targets, data, **given)
    monkeypatch.setattr("foveate.kernels.policy_loss.options.Formula.needs_sequences", lambda *_: True)
    expected, expected_metrics = gradients_of(leaves, targets, data, **given)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)
    assert got[1].any()
    assert metrics.keys() == expected_metrics.keys()
    for name, x in metrics.items():
        torch.testing.assert_close(x, expected_metrics[name], rtol=1e-5, atol=1e-5)


class Products(TorchDispatchMode):
    """Counts multiply-adds of matrix products, and the elements of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.macs = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.macs += out.numel() * args[-2].shape[-1]
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.largest = max(self.largest, x.numel())
        return out


ON_POLICY_SEQUENCE = {"kind": "gspo", "old_logprobs": None}
# Backend, what is given, who requires gradients, products.
COSTS = [
    ("reference", {}, (True, True), 3),
    ("reference", {}, (True, False), 2),
    ("reference", {}, (False, True), 2),
    ("reference", {}, (False, False), 1),
    ("reference", {"kind": "gspo"}, (True, True), 4),
    ("reference", ON_POLICY_SEQUENCE, (True, True), 3),
    # Those of the library: of log-probs and without gradients the logits' product is Triton's.
    ("triton", {}, (True, True), 3),
    ("triton", {}, (True, False), 2),
    ("triton", {}, (False, False), 0),
    ("triton", {"kind": "gspo"}, (True, True), 2),
    ("triton", ON_POLICY_SEQUENCE, (True, True), 3),
]


@pytest.mark.parametrize(("backend", "given", "needs", "products"), COSTS, ids=str)
def test_products_and_memory(monkeypatch, backend, given, needs, products):
    """So many of the size of hidden @ lm_head^T, and no tensor of tokens by vocabulary between them."""
    monkeypatch.setattr(triton_logits, "STEP", 20)
    leaves, targets, data = sequences(length=10)
    leaves = [x.detach().clone().requires_grad_(n) for x, n in zip(leaves, needs, strict=True)]
    with Products() as seen:
        out = linear_policy_loss(*leaves, targets, **{**data, **given}, backend=backend)
        if any(needs):
            out.loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    assert seen.macs == products * len(targets) * WIDTH * VOCAB
    if (backend, given) != ("triton", {"kind": "gspo"}):  # that holds 128 ids, which are more than there are
        assert seen.largest < len(targets) * VOCAB


def test_blocks_of_triton_keep_to_their_bytes(monkeypatch):
    """Logits in float32 and gradients of as many tokens as CHUNK_BYTES holds, whatever the number of tokens."""
    monkeypatch.undo()
    for dtype, vocab in itertools.product((torch.float32, torch.float16, torch.bfloat16), (1001, 32_000, 151_936)):
        hidden = torch.empty(1 << 20, 1, dtype=dtype, device="meta")
        buffers = triton_logits._Buffers.of(hidden, vocab)
        held = {id(x): x.nbytes for x in (buffers.logits, buffers.gradients)}
        step = buffers.logits.stride(0) * triton_logits.STEP * (buffers.part / buffers.block * 4 + 4 * (len(held) - 1))
        assert triton_logits.CHUNK_BYTES - step < sum(held.values()) <= triton_logits.CHUNK_BYTES
        assert buffers.part % 16 == 0
        few = triton_logits._Buffers.of(hidden[:3], vocab)
        assert (few.block, few.part) == (buffers.block, buffers.part)
        assert len(few.logits) == len(few.gradients) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_pass(backend):
    """Factors, repetition, accumulation; a second derivative is refused; gradients are no one else's tensors."""
    leaves, targets, data = sequences()
    expected, _ = gradients_of(leaves, targets, data, backend=backend)
    scaled, _ = gradients_of(leaves, targets, data, factor=4.0, backend=backend)
    assert all(torch.equal(4 * x, y) for x, y in zip(expected[1:3], scaled[1:3], strict=True))
    tensors = [x.detach().clone().requires_grad_() for x in leaves]
    loss = linear_policy_loss(*tensors, targets, **data, backend=backend).loss
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(2.0, device=DEVICE))
    for leaf, once in zip(tensors, expected[1:3], strict=True):
        assert torch.equal(leaf.grad, once + 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = linear_policy_loss(*tensors, targets, **data, backend=backend).loss
    with pytest.raises(RuntimeError, match="expected create_graph=False, got True"):
        torch.autograd.grad(loss, tensors[0], create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    leaves, targets, data = sequences()
    expected, _ = gradients_of(leaves, targets, data)
    tensors = [x.detach().clone().requires_grad_() for x in leaves]
    loss = checkpoint(
        lambda h, w: linear_policy_loss(h * 1.0, w, targets, **data).loss, *tensors, use_reentrant=reentrant
    )
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    assert all(torch.equal(x.grad, y) for x, y in zip(tensors, expected[1:3], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_is_an_embedding_gets_both_gradients(backend):
    _, targets, data = sequences()
    results = []
    for tied in (True, False):
        weight = problem(1, WIDTH, VOCAB)[1] * 0 + torch.linspace(-1, 1, VOCAB, device=DEVICE)[:, None]
        weight = (weight * torch.arange(1, WIDTH + 1, device=DEVICE) / WIDTH).requires_grad_()
        head = weight if tied else weight.detach().clone().requires_grad_()
        states = torch.nn.functional.embedding(targets.clamp(min=0).flip(0), weight)
        linear_policy_loss(states, head, targets, **data, backend=backend).loss.backward()
        results.append(weight.grad if tied else weight.grad + head.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_follow_change_no_bit_of_a_whole_chunk(backend):
    leaves, targets, data = sequences()
    whole, _ = gradients_of(leaves, targets, data, backend=backend)
    again, _ = gradients_of(leaves, targets, data, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    kept, chunk = 9, STEP if backend == "triton" else CHUNK
    part = {n: x[:kept] if isinstance(x, torch.Tensor) and len(x) == 12 else x for n, x in data.items()}
    fewer, _ = gradients_of((leaves[0][:kept], leaves[1]), targets[:kept], part, backend=backend)
    for x, y in ((whole[1], fewer[1]), (whole[3], fewer[3])):
        assert torch.equal(x[:chunk], y[:chunk])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend):
    leaves, targets, data = sequences()
    given = {"softcap": 3.0, "backend": backend}
    ignored = targets == -100
    assert ignored.any()
    clean = leaves[0].masked_fill(ignored[:, None], 0.0)
    expected, _ = gradients_of((clean, leaves[1]), targets, data, **given)
    dirty = leaves[0].masked_fill(ignored[:, None], torch.nan)
    dirty[ignored.nonzero()[0]] = torch.inf
    got, _ = gradients_of((dirty, leaves[1]), targets, data, **given)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert not got[1][ignored].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_allows_nothing_shows(backend):
    """As NaN, in the loss and its own gradient; masked, in neither."""
    leaves, targets, data = sequences()
    allowed = torch.ones(len(targets), VOCAB, dtype=torch.bool, device=DEVICE)
    allowed[4] = False
    assert targets[4] != -100
    got, _ = gradients_of(leaves, targets, data, allowed=allowed, backend=backend)
    assert got[0].isnan()
    mask = torch.ones(len(targets), dtype=torch.bool, device=DEVICE)
    mask[4] = False
    got, _ = gradients_of(leaves, targets, data, allowed=allowed, mask=mask, backend=backend)
    assert all(x.isfinite().all() for x in got[:3])


def test_autocast_changes_nothing():
    leaves, targets, data = sequences()
    expected, _ = gradients_of(leaves, targets, data)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got, _ = gradients_of(leaves, targets, data)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.slow
def test_torch_compile():
    """The loss runs as it is between what is compiled, and gradients pass."""
    leaves, targets, data = sequences()

    def step(hidden, head):
        return 2 * linear_policy_loss(torch.sin(hidden), head, targets, **data).loss

    results = []
    for function in (step, torch.compile(step, backend="eager")):
        tensors = [x.detach().clone().requires_grad_() for x in leaves]
        results.append(torch.autograd.grad(function(*tensors), tensors))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_model_trains_the_same(monkeypatch):
    """Three steps of a module with its own optimiser, in one pass and in two."""
    _, targets, data = sequences()
    inputs = torch.randn(len(targets), 5)
    results = []
    model = torch.nn.Sequential(torch.nn.Linear(5, WIDTH), torch.nn.Linear(WIDTH, VOCAB)).to(DEVICE)
    for twice in (False, True):
        own = copy.deepcopy(model)
        if twice:
            monkeypatch.setattr("foveate.kernels.policy_loss.options.Formula.needs_sequences", lambda *_: True)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
        for _ in range(3):
            loss = linear_policy_loss(own[0](inputs.to(DEVICE)), own[1].weight, targets, bias=own[1].bias, **data).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([p.detach() for p in own.parameters()])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
