"""What a step's prefill drops between two layer groups: whose rows are which, and how many stay."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from foveate.kernels import vision_prune
from foveate.kernels.vision_prune import Selection
from foveate.rollout.segments import Chunk, Segment
from foveate.rollout.tails import Tail

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v of one layer


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens between two layers.

    hidden: float [T, hidden]. cos, sin: float [T, 1, head_dim]. extra: float [T, levels, hidden], what is still to be
    added after the coming layers, None where there is nothing. queries: float [P, heads, head_dim], q of the layer
    before, of the last token of each prompt that has come to its end.
    """

    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    extra: torch.Tensor | None
    queries: torch.Tensor


@dataclass(frozen=True)
class Span:
    """An image of a prompt before a stage.

    prompt: number of the prompt among those of the step that have come to their end. index: of the image. segment,
    offset: where its tokens begin. size, count: how many there are before and after.
    """

    prompt: int
    index: int
    segment: Segment
    offset: int
    size: int
    count: int

    @property
    def is_last_token(self) -> bool:
        """Whether the prompt ends with this image."""
        source = self.segment.source
        return source.images[self.index].start + source.images[self.index].num_tokens == len(source.token_ids)


class StagePlan:
    """One stage of one step: whose rows are which, and which prompts lose what."""

    def __init__(self, group: int, chunks: list[Chunk], ended: list[Segment], backend: str | None = None):
        self.group = group
        self.chunks = chunks
        self.ended = ended
        self.backend = backend  # of `foveate.kernels.vision_prune`
        self.pieces = pieces_of(chunks, group - 1)
        starts = [0, *accumulate(piece.stop - piece.start for piece in self.pieces)]
        self.num_rows = starts[-1]
        self.rows_of = {piece.segment: (piece, start) for piece, start in zip(self.pieces, starts, strict=False)}
        self.spans = spans_of(ended, group)
        dropping = {span.prompt for span in self.spans if span.count < span.size}
        self.drops = bool(dropping)
        self.choosing = [index for index in sorted(dropping) if tail_in(ended[index]).given is None]

    def selection(self, chosen: Selection | None) -> Selection:
        """What is kept of every image: chosen now, given by a plan, or all of it."""
        counts = [span.count for span in self.spans]
        offsets = offsets_of(counts)
        if chosen is not None and len(self.choosing) == len(self.ended):
            return chosen
        parts, start = [], 0
        for span in self.spans:
            if span.prompt in self.choosing:
                assert chosen is not None, self.choosing
                parts.append(chosen.indices[start : start + span.count])
                start += span.count
            else:
                parts.append(torch.from_numpy(self._given(span)))
        device = parts[0].device if chosen is None else chosen.indices.device
        return Selection(torch.cat([part.to(device) for part in parts]), offsets.to(device))

    def compact(self, selection: Selection, rows: Rows, projected: Projected | None) -> tuple[Rows, Projected | None]:
        """The rows that are left, with all that goes with them."""
        device = rows.hidden.device
        firsts = [self.rows_of[span.segment][1] + span.offset for span in self.spans]
        sizes = [span.size for span in self.spans]
        num_out = self.num_rows - sum(sizes) + sum(span.count for span in self.spans)
        starts, lengths = (torch.tensor(part, dtype=torch.int32, device="cpu") for part in (firsts, sizes))
        selection = Selection(*(tensor.to(device) for tensor in selection))
        left = vision_prune.surviving_rows(selection, starts, lengths, self.num_rows, num_out)
        planes = [rows.hidden, rows.cos, rows.sin, *(() if rows.extra is None else (rows.extra,)), *(projected or ())]
        hidden, cos, sin, *more = vision_prune.compact(planes, left, backend=self.backend)
        extra = None if rows.extra is None else more.pop(0)
        return Rows(hidden, cos, sin, extra, rows.queries), (more[0], more[1], more[2]) if projected else None

    def _given(self, span: Span) -> np.ndarray:
        tail = tail_in(span.segment)
        if tail.given is None:
            return np.arange(span.size, dtype=np.int32)
        before, after = tail.kept(self.group - 1, span.index), tail.kept(self.group, span.index)
        return np.searchsorted(before, after).astype(np.int32)


def pieces_of(chunks: list[Chunk], group: int) -> list[Chunk]:
    """Tokens of the step behind the first layer group, as a group counts them: without prompts that wait."""
    pieces: list[Chunk] = []
    for chunk in chunks:
        if chunk.segment.tail is None:
            pieces.append(chunk)
        elif is_end(chunk):
            path = [segment for segment in chunk.segment.path() if segment.tail is not None]
            pieces += [Chunk(segment, 0, segment.held[group]) for segment in path]
    return pieces


def spans_of(ended: list[Segment], group: int) -> list[Span]:
    """The images of prompts before the stage in front of a group, prompt by prompt."""
    spans = []
    for prompt, last in enumerate(ended):
        tail = tail_in(last)
        path = [segment for segment in last.path() if segment.tail is not None]
        for index, image in enumerate(tail.prompt.images):
            segment = next(s for s in path if s.span[0] <= image.start < s.span[1])
            sizes = tail.counts[group - 1][index], tail.counts[group][index]
            spans.append(Span(prompt, index, segment, tail.offset(index, segment.span, group - 1), *sizes))
    return spans


def image_numbers(ended: list[Segment], device: torch.device) -> torch.Tensor:
    """int64, of each image token of the prompts its number within its image."""
    sizes = [image.num_tokens for segment in ended for image in tail_in(segment).prompt.images]
    return torch.from_numpy(np.concatenate([np.arange(0), *map(np.arange, sizes)])).to(device)


def last_rows(pieces: list[Chunk]) -> list[int]:
    """Where the last token of each prompt that has come to its end stands."""
    ends = accumulate(piece.stop - piece.start for piece in pieces)
    return [end - 1 for piece, end in zip(pieces, ends, strict=True) if piece.segment.ends_tail]


def is_end(chunk: Chunk) -> bool:
    """Whether the chunk brings the last token of a prompt that is to be pruned."""
    segment = chunk.segment
    return segment.ends_tail and chunk.stop == segment.span[1] - segment.span[0]


def first_token(last: Segment) -> int:
    """Of a tail, in its prompt."""
    return next(segment.span[0] for segment in last.path() if segment.tail is not None)


def tail_in(segment: Segment) -> Tail:
    assert segment.tail is not None, segment.span
    return segment.tail


def offsets_of(sizes: list[int]) -> torch.Tensor:
    """int32 [S + 1]"""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device="cpu")
