"""What a step prefills: which tokens of which segments, within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.rollout.segments import Chunk, Segment

if TYPE_CHECKING:
    from foveate.rollout.scheduler import Sequence


class Prefill:
    """Collects what a step prefills, within its budget of tokens; a segment of several samples only once.

    The later layers of a prompt that is pruned between layers run with its last chunk, on what is left of the whole
    prompt; what that takes beyond the chunk counts in the budget as well. Where it does not fit, the prompt's last
    tokens wait for a step that begins with them: that step alone may exceed the budget.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.firsts: list[Sequence] = []
        self._stops: dict[Segment, int] = {}

    def add(self, sequence: Sequence) -> None:
        """Adds what is missing above and in the sample's own segment, as far as the budget goes."""
        assert sequence.leaf is not None, sequence.group.request_id
        for segment in (*sequence.group.path, sequence.leaf):
            if not self.complete(segment):
                return
        sequence.is_ready = True
        if not sequence.token_ids:
            self.firsts.append(sequence)

    def complete(self, segment: Segment) -> bool:
        """Adds what is missing in a segment, as far as the budget goes; whether all of it is stored after this step."""
        if not segment.num_missing:
            return True
        if segment not in self._stops:
            length = min(segment.num_missing, self.budget)
            beyond = self._beyond(segment, length)
            if beyond > self.budget - length and self._others(segment):
                length, beyond = length - 1, 0
            if not length:
                return False
            self.budget = max(0, self.budget - length - beyond)
            self._stops[segment] = segment.length + length
            self.chunks.append(Chunk(segment, segment.length, segment.length + length))
        return self._stops[segment] == segment.length + segment.num_missing

    def _beyond(self, segment: Segment, length: int) -> int:
        """Tokens that the later layers compute because of this chunk, beyond those of the prompt's chunks."""
        if not segment.ends_tail or length < segment.num_missing:
            return 0
        tail = [s for s in segment.path() if s.tail is not None]
        new = length + sum(stop - s.length for s in tail[:-1] if (stop := self._stops.get(s)))
        return max(0, sum(s.held[1] for s in tail) - new)

    def _others(self, segment: Segment) -> bool:
        """Whether the step prefills anything outside the prompt of this segment."""
        path = segment.path()
        return any(chunk.segment not in path for chunk in self.chunks)
