"""`linear_logprobs` against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from foveate.kernels import policy_loss
from foveate.kernels.policy_loss import linear_logprobs
from foveate.kernels.policy_loss.reference import logprobs as reference


def plain(hidden, head, targets, temperature=1.0, bias=None, softcap=None, allowed=None):
    """The definition, with every intermediate an ordinary tensor."""
    logits = hidden @ head.T
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    z = z if allowed is None else z.masked_fill(~allowed, -torch.inf)
    log_p = z.log_softmax(-1)
    keep = (targets != -100).to(z.dtype)
    logprobs = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return logprobs * keep, z.logsumexp(-1) * keep, entropy * keep


def problem(count, width, vocab, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, head, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((count, width), (vocab, width), (vocab,))
    )
    targets = torch.randint(vocab, (count,), generator=generator)
    targets[1::3] = -100
    cotangents = torch.randn(3, count, generator=generator).to(dtype)
    return hidden, head, bias, targets, cotangents


VARIANTS = ["plain", "bias", "softcap", "allowed", "allowed_rows", "temperature", "temperatures", "all"]


def variant(name, hidden, bias, vocab, targets):
    generator = torch.Generator().manual_seed(7)
    rows = torch.rand(hidden.shape[0], vocab, generator=generator) < 0.6
    rows[torch.arange(hidden.shape[0]), targets.clamp(min=0)] = True
    columns = torch.rand(vocab, generator=generator) < 0.6
    columns[targets.clamp(min=0)] = True
    temperatures = torch.rand(hidden.shape[0], generator=generator).to(hidden.dtype) + 0.3
    return {
        "plain": {},
        "bias": {"bias": bias},
        "softcap": {"softcap": 2.0},
        "allowed": {"allowed": columns},
        "allowed_rows": {"allowed": rows},
        "temperature": {"temperature": 0.7},
        "temperatures": {"temperature": temperatures},
        "all": {"bias": bias, "softcap": 3.0, "allowed": rows, "temperature": temperatures},
    }[name]


@pytest.mark.parametrize("chunk", [1, 3 * 11, 1 << 24], ids=["row", "three", "whole"])
@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_in_float64(monkeypatch, name, chunk):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    hidden, head, bias, targets, cotangents = problem(10, 5, 11)
    results = []
    for function in (plain, linear_logprobs):
        leaves = [x.clone().requires_grad_() for x in (hidden, head, bias)]
        out = function(leaves[0], leaves[1], targets, **variant(name, hidden, leaves[2], 11, targets))
        torch.autograd.backward(out, list(cotangents))
        results.append([*out, leaves[0].grad, leaves[1].grad, leaves[2].grad])
    for expected, got in zip(*results, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["logprobs", "logsumexp", "entropy"])
def test_gradcheck(which):
    hidden, head, bias, targets, _ = problem(4, 3, 7)
    inputs = [x.requires_grad_() for x in (hidden, head, bias)]

    def one(h, w, b):
        return linear_logprobs(h, w, targets, bias=b, softcap=4.0, temperature=0.8)[which]

    assert torch.autograd.gradcheck(one, inputs)


@pytest.mark.parametrize("shape", [(0, 4, 9), (1, 1, 1), (7, 16, 257), (65, 8, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_to_float64_as_plain_torch(shape, dtype):
    hidden, head, _, targets, cotangents = problem(*shape, dtype=dtype)
    results = []
    for function, compute in ((plain, torch.float64), (plain, torch.float32), (linear_logprobs, None)):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        # The plain one in float32 is what the contract promises: products and sums in float32, inputs as given.
        cast = [x if compute is None else x.to(compute) for x in leaves]
        out = function(*cast, targets)
        torch.autograd.backward(out, [c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)])
        results.append([x.detach() for x in (*out, *(leaf.grad for leaf in leaves))])
    for truth, same_precision, got in zip(*results, strict=True):
        if truth.numel() == 0:
            assert got.shape == truth.shape
            continue
        ulp = torch.finfo(got.dtype).eps * truth.double().abs().max()
        allowed = 2 * (same_precision.double() - truth).abs().max() + ulp
        assert (got.double() - truth).abs().max() <= allowed


def test_results_are_float32_whatever_the_inputs_and_autocast():
    hidden, head, _, targets, _ = problem(6, 8, 50, dtype=torch.float32)
    expected = linear_logprobs(hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = hidden.clone().requires_grad_()
        got = linear_logprobs(leaf, head, targets)
        got.logprobs.sum().backward()
    outside = hidden.clone().requires_grad_()
    linear_logprobs(outside, head, targets).logprobs.sum().backward()
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert torch.equal(leaf.grad, outside.grad)
    assert linear_logprobs(hidden.bfloat16(), head, targets).entropy.dtype == torch.float32


def test_ignored_targets_are_zero_without_gradient():
    hidden, head, _, _, _ = problem(3, 4, 6)
    targets = torch.tensor([2, -100, 5])
    hidden.requires_grad_()
    out = linear_logprobs(hidden, head, targets)
    assert all(x[1] == 0 and x[0] != 0 and x[2] != 0 for x in out)
    torch.stack(list(out)).sum().backward()
    assert not hidden.grad[1].any()
    assert hidden.grad[0].any()


def test_a_target_outside_the_allowed_ids_is_impossible():
    hidden, head, _, _, _ = problem(2, 4, 6)
    allowed = torch.tensor([True, True, False, True, True, True])
    hidden.requires_grad_()
    out = linear_logprobs(hidden, head, torch.tensor([2, 1]), allowed=allowed)
    assert out.logprobs[0] == -torch.inf
    assert out.logprobs[1].isfinite()
    out.logprobs[0].backward()
    p = (hidden.detach()[0] @ head.T).masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(hidden.grad[0], -p @ head, rtol=1e-12, atol=1e-13)


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch):
    """Every intermediate stays within a chunk; the storage of the largest one is watched through dispatch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    rows, width, vocab, chunk_rows = 64, 4, 500, 8
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk_rows * vocab)
    hidden, head, _, targets, _ = problem(rows, width, vocab, dtype=torch.float32)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    with Largest() as seen:
        torch.stack(list(linear_logprobs(*leaves, targets))).sum().backward()
    assert seen.elements == chunk_rows * vocab


def test_frozen_inputs_get_no_gradient():
    hidden, head, bias, targets, _ = problem(4, 3, 7)
    head.requires_grad_()
    linear_logprobs(hidden, head, targets, bias=bias).logprobs.sum().backward()
    assert hidden.grad is None
    assert bias.grad is None
    assert head.grad.any()


def test_shared_head_adds_both_gradients():
    """A tied embedding: the head is also a table the hidden states were looked up in."""
    _, head, _, targets, _ = problem(6, 3, 7)
    results = []
    for function in (plain, linear_logprobs):
        leaf = head.clone().requires_grad_()
        function(F.embedding(torch.arange(6), leaf), leaf, targets)[0].sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"targets": torch.tensor([0, 7, 0])}, "targets"),
        ({"targets": torch.tensor([0, -1, 0])}, "targets"),
        ({"targets": torch.zeros(3)}, "targets"),
        ({"hidden": torch.zeros(3, 5)}, "hidden"),
        ({"lm_head": torch.zeros(7, 4, dtype=torch.int32)}, "lm_head"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.ones(2)}, "temperature"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"softcap": 0.0}, "softcap"),
        ({"allowed": torch.ones(3)}, "allowed"),
        ({"allowed": torch.ones(7)}, "allowed"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_logprobs_refuse_by_name(kwargs, name):
    arguments = {"hidden": torch.zeros(3, 4), "lm_head": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"\({name}\)"):
        linear_logprobs(**{**arguments, **kwargs})


def test_public_names():
    assert policy_loss.IGNORE == -100
    assert policy_loss.LinearLogprobs._fields == ("logprobs", "logsumexp", "entropy")
