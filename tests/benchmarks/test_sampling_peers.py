"""The samplers that `sample` is measured beside draw what the case allows."""

from __future__ import annotations

import bench_sampling as script
import pytest
import torch

CPU = torch.device("cpu")


def test_peers_ban_the_ids_that_the_kernel_bans():
    logits = torch.zeros(500, 40)
    logits[:, script.BANNED] = 30.0  # drawn nearly always, but for the ban
    before = logits.clone()
    for peer in script.logits_peers("banned", CPU).values():
        drawn = set(peer(logits).flatten().tolist())
        assert drawn
        assert not drawn & {*script.BANNED}
    assert torch.equal(logits, before)
    (peer,) = script.logits_peers("plain", CPU).values()
    assert set(peer(logits).flatten().tolist()) == {*script.BANNED}


@pytest.mark.parametrize("case", script.FILTERS)
def test_each_case_has_a_peer(case):
    assert "torch" in script.logits_peers(case, CPU)
    ids = script.torch_draw(case, torch.randn(5, 62))
    assert ids.shape in ((5,), (5, 1))
    assert int(ids.max()) < 62
