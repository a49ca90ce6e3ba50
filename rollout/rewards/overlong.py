"""The soft penalty on completions that come near the limit of tokens."""

from __future__ import annotations

from foveate.rollout.config import is_int, require
from foveate.rollout.types import Request, RolloutGroup


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then falling linearly to -1 at max_tokens; -1 beyond.

    Source: the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).
    """
    return min(max(max_tokens - buffer - num_tokens, -buffer), 0) / buffer


class Overlong:
    """`overlong_penalty` of each rollout's tokens, the one that stopped it included, in [-1, 0]; never unscorable.

    buffer: tokens over which the penalty falls, >= 1. max_tokens: where it is -1, >= buffer; None is the max_tokens
    that the group's request was sampled with, and a request that allows fewer than `buffer` is refused. DAPO: 20480
    and 4096, with weight 1. Raises ValueError on other values.
    """

    name = "overlong"

    def __init__(self, buffer: int, max_tokens: int | None = None) -> None:
        require(is_int(buffer) and buffer >= 1, "an int >= 1", buffer, "buffer")
        fits = max_tokens is None or (is_int(max_tokens) and max_tokens >= buffer)
        require(fits, f"an int >= {buffer}, the buffer, or None", max_tokens, "max_tokens")
        self.buffer, self.max_tokens = buffer, max_tokens

    def __call__(self, group: RolloutGroup) -> list[float | None]:
        self.check(group.request)
        limit = self._limit(group.request)
        return [overlong_penalty(len(rollout.token_ids), limit, self.buffer) for rollout in group.rollouts]

    def check(self, request: Request) -> None:
        """Raises ValueError when the request's max_tokens is the limit and below the buffer."""
        where = f"max_tokens of request {request.request_id!r}"
        require(self._limit(request) >= self.buffer, f"at least {self.buffer}, the buffer", self._limit(request), where)

    def _limit(self, request: Request) -> int:
        return request.sampling.max_tokens if self.max_tokens is None else self.max_tokens
