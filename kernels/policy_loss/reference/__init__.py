"""The policy-loss family in plain torch: the definition of correct, on tensors of any device."""

from foveate.kernels.policy_loss.reference.advantage import group_advantage

__all__ = ["group_advantage"]
