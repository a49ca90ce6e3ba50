"""The policy-loss family in plain torch: the definition of correct, and the CPU backend."""

from foveate.kernels.policy_loss.reference.advantage import group_advantage

__all__ = ["group_advantage"]
