"""What a step prefills: which tokens of which segments, within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.rollout.segments import Chunk, Segment

if TYPE_CHECKING:
    from foveate.rollout.scheduler import Sequence


class Prefill:
    """Collects what a step prefills, within its budget of tokens; a segment of several samples only once."""

    def __init__(self, budget: int):
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.firsts: list[Sequence] = []
        self._stops: dict[Segment, int] = {}

    def add(self, sequence: Sequence) -> None:
        """Adds what is missing above and in the sample's own segment, as far as the budget goes."""
        assert sequence.leaf is not None, sequence.group.request_id
        for segment in (*sequence.group.path, sequence.leaf):
            if not self._complete(segment):
                return
        sequence.is_ready = True
        if not sequence.token_ids:
            self.firsts.append(sequence)

    def _complete(self, segment: Segment) -> bool:
        """Whether all tokens of the segment are stored after this step."""
        if not segment.num_missing:
            return True
        if segment not in self._stops:
            if not self.budget:
                return False
            length = min(segment.num_missing, self.budget)
            self.budget -= length
            self._stops[segment] = segment.length + length
            self.chunks.append(Chunk(segment, segment.length, segment.length + length))
        return self._stops[segment] == segment.length + segment.num_missing
