"""The policy loss of rows that are not finite, and without gradients: in one pass (grpo) and in two (gspo)."""

from __future__ import annotations

import pytest
import torch

from foveate.kernels.dispatch import available
from foveate.kernels.policy_loss import linear_policy_loss, logprob_policy_loss
from foveate.testing.materialised import DEVICE, problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and inf in the interpreter
BACKENDS = [name for name in ("reference", "triton") if name in available("policy_loss", DEVICE)]
VOCAB, WIDTH = 75, 12
ROW = 4  # in the second of four sequences of three tokens


@pytest.fixture(params=["grpo", "gspo"], ids=["one_pass", "two"])
def batch(request):
    """Hidden states, LM head and bias; targets; the rest."""
    hidden, head, bias, targets, cotangents = problem(12, WIDTH, VOCAB)
    targets[ROW] = 3
    data = {
        "advantages": torch.tensor([1.0, -0.5, 0.25, -1.0], device=DEVICE),
        "sequence_ids": torch.arange(4, dtype=torch.int32, device=DEVICE).repeat_interleave(3),
        "denominator": 5.0,
        "old_logprobs": -4 + 0.3 * cotangents[0],
        "rollout_logprobs": -4 + 0.3 * cotangents[1],
        "kind": request.param,
    }
    return (hidden, head, bias), targets, data


def gradients_of(leaves, targets, data, **given):
    """The loss and its gradients by hidden, head and bias; the metrics."""
    hidden, head, bias = leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = linear_policy_loss(hidden, head, targets, bias=bias, **data, **given)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)], out.metrics


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_masked_row_that_is_not_finite_spoils(batch, backend, value):
    """Its own gradient, that of the head and of the bias; no other row's, and not the loss. Ignored, nothing."""
    (hidden, head, bias), targets, data = batch
    mask = torch.arange(len(targets), device=DEVICE) != ROW
    dirty = torch.where(mask[:, None], hidden, value)
    expected, _ = gradients_of((hidden, head, bias), targets, data, mask=mask, backend=backend)
    assert not expected[1][ROW].any()
    (loss, d_hidden, d_head, d_bias), metrics = gradients_of(
        (dirty, head, bias), targets, data, mask=mask, backend=backend
    )
    assert torch.equal(loss, expected[0])
    assert all(x.isfinite() for x in metrics.values())
    assert torch.equal(d_hidden.isfinite().all(1), mask)
    assert torch.equal(d_hidden[mask], expected[1][mask])
    assert d_head.isnan().any()
    assert d_bias.isnan().any()
    got, _ = gradients_of((dirty, head, bias), targets.masked_fill(~mask, -100), data, backend=backend)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(batch, backend, no_gradients):
    """Loss, log-probs and metrics as with them; from log-probs too."""
    (hidden, head, bias), targets, data = batch
    leaves, data = [x.requires_grad_() for x in (hidden, head)], {**data, "backend": backend}
    expected = linear_policy_loss(*leaves, targets, bias=bias, **data)
    logprobs, entropy = expected.logprobs.requires_grad_(), torch.zeros_like(expected.logprobs)
    expected_again = logprob_policy_loss(logprobs, entropy, **data)
    with no_gradients():
        got = linear_policy_loss(*leaves, targets, bias=bias, **data)
        again = logprob_policy_loss(logprobs, entropy, **data)
    for x, y in ((got, expected), (again, expected_again)):
        assert y.loss.requires_grad
        assert not x.loss.requires_grad
        assert not x.logprobs.requires_grad
        torch.testing.assert_close(x.loss, y.loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x.logprobs, y.logprobs.detach(), rtol=1e-5, atol=1e-6)
        for name, value in y.metrics.items():
            torch.testing.assert_close(x.metrics[name], value, rtol=1e-5, atol=1e-6)


def test_no_autograd_runs_where_no_gradient_is_asked_for(batch, monkeypatch):
    (hidden, head, bias), targets, data = batch
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("differentiated"))
    frozen = linear_policy_loss(hidden, head, targets, bias=bias, **data, backend="reference")
    logprobs = frozen.logprobs.requires_grad_()
    with torch.no_grad():
        logprob_policy_loss(logprobs, torch.zeros_like(logprobs), **data, backend="reference")
