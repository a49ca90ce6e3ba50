"""The peers that policy losses are measured beside compute the same loss and gradients, where they are installed."""

from __future__ import annotations

import bench_policy_loss as script
import pytest
import torch

from foveate.kernels.dispatch import available

CPU = torch.device("cpu")
# Peer, the package it needs, and what it must equal. That of cut-cross-entropy needs a GPU.
PEERS = [
    (script.liger_loss, "liger_kernel", script.torch_loss),
    (script.liger_triton_loss, "liger_kernel", script.torch_loss),
    (script.liger_entropy, "liger_kernel", script.torch_entropy),
]


def inputs(tokens=24, dim=16, vocab=70):
    return script.make_inputs(tokens, dim, vocab, torch.float32, torch.Generator().manual_seed(0))


def assert_same(loss, expected):
    given = inputs()
    got, exact = script.with_gradients(loss, *given), script.in_float64(expected, *given)
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=2e-6, atol=1e-6)
    assert got[1].any()


@pytest.mark.skipif("triton" not in available("policy_loss", CPU), reason="needs Triton's interpreter")
@pytest.mark.parametrize(("loss", "package", "expected"), PEERS, ids=lambda x: getattr(x, "__name__", None))
def test_peers_that_are_installed(loss, package, expected):
    pytest.importorskip(package)
    assert_same(loss, expected)


def test_log_probs_first():
    assert_same(lambda *given: script.loss_of_logprobs("reference", *given), script.torch_loss)


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    script.installed.cache_clear()
    peers = script.peers_of("linear_policy_loss", CPU, "reference")
    assert set(peers) == {"torch", "twice"}
    assert "skipped: peers of liger_kernel, which is not installed" in capsys.readouterr().err
    monkeypatch.setattr(script, "find_spec", lambda name: object())
    script.installed.cache_clear()
    assert set(script.peers_of("linear_policy_loss", CPU, "reference")) == {"torch", "twice", "liger"}
    script.installed.cache_clear()


def test_a_sequence_is_half_of_few_tokens():
    assert inputs(24)[4].bincount().tolist() == [12, 12]
    assert inputs(2048)[4].bincount().tolist() == [512] * 4
