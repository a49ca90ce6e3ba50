"""Rewards to group advantages, hidden states to log-probabilities of given tokens, and both to a loss and its gradient.

Nothing writes a `[tokens, vocabulary]` tensor: logits live for a tile or a chunk of tokens, and are computed again in
the backward pass.
"""

from foveate.kernels.policy_loss.advantage import group_advantage
from foveate.kernels.policy_loss.logprobs import IGNORE, LinearLogprobs, linear_logprobs

__all__ = ["IGNORE", "LinearLogprobs", "group_advantage", "linear_logprobs"]
