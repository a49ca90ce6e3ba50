"""The soft penalty on completions that come near the limit of tokens."""

from __future__ import annotations

from foveate.rollout.checks import is_int, require
from foveate.rollout.types import Request, RolloutGroup


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then falling linearly to -1 at max_tokens; -1 beyond.

    Source: the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).
    """
    return min(max(max_tokens - buffer - num_tokens, -buffer), 0) / buffer


class Overlong:
    """`overlong_penalty` of each rollout's tokens, the one that stopped it included, in [-1, 0]; never unscorable.

    buffer: tokens over which the penalty falls, >= 1; None is a fifth of max_tokens, rounded up, DAPO's 4096 of 20480.
    max_tokens: where it is -1, >= buffer; None is the max_tokens that the group's request was sampled with, and a
    request that allows fewer than `buffer` is refused. Raises ValueError on other values.
    """

    name = "overlong"

    def __init__(self, buffer: int | None = None, max_tokens: int | None = None) -> None:
        require(buffer is None or (is_int(buffer) and buffer >= 1), "an int >= 1 or None", buffer, "buffer")
        least = 1 if buffer is None else buffer
        fits = max_tokens is None or (is_int(max_tokens) and max_tokens >= least)
        require(fits, f"an int >= {least}, the buffer, or None", max_tokens, "max_tokens")
        self.buffer, self.max_tokens = buffer, max_tokens

    def __call__(self, group: RolloutGroup) -> list[float | None]:
        self.check(group.request)
        limit = self._limit(group.request)
        buffer = -(-limit // 5) if self.buffer is None else self.buffer
        return [overlong_penalty(len(rollout.token_ids), limit, buffer) for rollout in group.rollouts]

    def check(self, request: Request) -> None:
        """Raises ValueError when the request's max_tokens is the limit and below the buffer."""
        where = f"max_tokens of request {request.request_id!r}"
        fits = self.buffer is None or self._limit(request) >= self.buffer
        require(fits, f"at least {self.buffer}, the buffer", self._limit(request), where)

    def _limit(self, request: Request) -> int:
        return request.sampling.max_tokens if self.max_tokens is None else self.max_tokens
