"""`torch.ops.foveate.group_advantage` for the backends of foveate._C."""

from __future__ import annotations

import torch

from foveate import _C
from foveate.kernels.dispatch import stream_of
from foveate.kernels.library import operator


def _group_advantage(rewards, group_offsets, kind, weights, ddof, eps, scorable, lengths, backend):
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    elements = _C.group_advantage_workspace(kind, len(rewards), len(group_offsets) - 1)
    out = _fake_group_advantage(rewards, group_offsets, kind, weights, ddof, eps, scorable, lengths, backend)
    _C.group_advantage(
        rewards.contiguous(),
        group_offsets,
        kind,
        weights if weights is None else weights.double().contiguous(),
        ddof,
        eps,
        scorable if scorable is None else scorable.contiguous(),
        lengths if lengths is None else lengths.long().contiguous(),
        rewards.new_empty(elements, dtype=torch.float64),
        out,
        stream_of(rewards),
    )
    return out


def _fake_group_advantage(rewards, group_offsets, kind, weights, ddof, eps, scorable, lengths, backend):
    return rewards.new_empty(rewards.shape[:1], dtype=torch.float32)


# rewards: float [N, R], the other tensors as `foveate.kernels.policy_loss.group_advantage` takes them -> float32 [N].
group_advantage = operator(
    "group_advantage(Tensor rewards, Tensor group_offsets, str kind, Tensor? weights, int ddof, float eps,"
    " Tensor? scorable, Tensor? lengths, str backend) -> Tensor",
    _group_advantage,
    _fake_group_advantage,
)
