"""Prefill through layer groups: between two of them, prompts lose image tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from foveate.kernels import vision_prune
from foveate.kernels.dispatch import for_family
from foveate.kernels.vision_prune import Selection
from foveate.rollout.layer_groups import LayerGroups
from foveate.rollout.models.decoder import Decoder
from foveate.rollout.models.spec import Deepstack
from foveate.rollout.planner import Planner
from foveate.rollout.pruners.protocol import Stage
from foveate.rollout.segments import Chunk, Segment
from foveate.rollout.stages import (
    Projected,
    Rows,
    StagePlan,
    first_token,
    image_numbers,
    is_end,
    last_rows,
    offsets_of,
    pieces_of,
    spans_of,
    tail_in,
)
from foveate.rollout.tails import sites_of

Places = Callable[[Segment], np.ndarray]  # of a segment's tokens among keys


class StagedPrefill:
    """Runs chunks through all layer groups.

    Behind the first group, rows of prompts that wait for their last token are put aside. Those of prompts whose last
    token has come join what was put aside, lose image tokens before each further group, and run on with the rest of the
    batch. No projection runs twice: stages "before" take the last layer's own queries and the keys it has stored,
    stages "within" the next layer's queries, keys and values of all tokens, of which then the kept ones are gathered.
    """

    def __init__(self, decoder: Decoder, planner: Planner, groups: LayerGroups, kv_pool: torch.Tensor, levels: int):
        self.decoder = decoder
        self.planner = planner
        self.groups = groups
        self.kv_pool = kv_pool
        self.backend = for_family("vision_prune", decoder.backend)
        self.levels = max(0, levels - groups.layers[0].stop)  # deepstack levels that are added behind the first group

    def __call__(
        self, chunks: list[Chunk], hidden: torch.Tensor, positions: torch.Tensor, deepstack: Deepstack | None
    ) -> tuple[torch.Tensor, list[Chunk]]:
        """hidden: float [T, hidden], the chunks' embeddings. positions: int64 [3, T].

        Returns float [T', hidden], after the final norm, and whose rows they are, as the last group counts tokens. What
        was selected is noted in `Prompt.pruning`.
        """
        rotary = self.decoder.rotary(positions, hidden.dtype)
        plans, layers = self.planner.prefill(chunks), self.groups.layers[0]
        hidden, q = self.decoder.run(layers, hidden, rotary, self.kv_pool, plans, deepstack=deepstack)
        rows = Rows(hidden, *rotary, None, q[:0])
        if any(chunk.segment.tail for chunk in chunks):
            rows = self._join(chunks, hidden, q, deepstack)
        elif self.levels and deepstack is not None:
            rows = replace(rows, extra=self._with_levels(hidden, deepstack)[:, 1:])
        ended = [chunk.segment for chunk in chunks if is_end(chunk)]
        own = image_numbers(ended, hidden.device)
        kept: list[torch.Tensor] = []  # by stage, tokens of all images in their images' numbers
        for group in range(1, self.groups.count if len(rows.hidden) else 1):
            rows, selection = self._run_group(StagePlan(group, chunks, ended, self.backend), rows)
            if selection is not None:
                starts = offsets_of([span.size for span in spans_of(ended, group)])[:-1]
                own = own[vision_prune.selected_rows(selection, starts).long()]
            kept.append(own)
        self._note(ended, kept)
        weights = self.decoder.weights
        return self.decoder.norm(rows.hidden, weights.norm, weights.eps), pieces_of(chunks, self.groups.count - 1)

    def _join(self, chunks: list[Chunk], hidden: torch.Tensor, q: torch.Tensor, deepstack: Deepstack | None) -> Rows:
        """Puts aside what waits, and takes back what waited for tokens that have come."""
        planes = self._with_levels(hidden, deepstack)
        parts: list[torch.Tensor] = [planes[:0]]
        positions: list[torch.Tensor] = [torch.empty((3, 0), dtype=torch.int64, device="cpu")]
        last: list[int] = []
        start = 0
        for chunk in chunks:
            start, own = start + chunk.stop - chunk.start, planes[start : start + chunk.stop - chunk.start]
            tail, source = chunk.segment.tail, chunk.segment.source
            if tail is None:
                parts.append(own)
                positions.append(source.positions[:, chunk.span])
                continue
            if not is_end(chunk):
                tail.held.append(own.clone())  # not a view, which would hold the rows of the whole step
                continue
            parts += [*tail.held, own]
            positions.append(source.positions[:, first_token(chunk.segment) :])
            last.append(start - 1)
            tail.held, tail.is_complete = [], True
        joined = torch.cat(parts)
        cos, sin = self.decoder.rotary(torch.cat(positions, dim=1).to(hidden.device), hidden.dtype)
        extra = joined[:, 1:].contiguous() if self.levels else None
        return Rows(joined[:, 0].contiguous(), cos, sin, extra, q[last])

    def _with_levels(self, hidden: torch.Tensor, deepstack: Deepstack | None) -> torch.Tensor:
        """float [T, 1 + levels, hidden]: the residual stream, and what is added to it behind the first group."""
        if not self.levels:
            return hidden[:, None]
        planes = hidden.new_zeros(len(hidden), 1 + self.levels, hidden.shape[1])
        planes[:, 0] = hidden
        if deepstack is not None:
            planes[deepstack.rows, 1:] = deepstack.levels[self.groups.layers[0].stop :].transpose(0, 1)
        return planes

    def _run_group(self, step: StagePlan, rows: Rows) -> tuple[Rows, Selection | None]:
        """Drops tokens, then runs the group's layers. Returns what was selected, None if nothing is dropped."""
        group, layers = step.group, self.groups.layers[step.group]
        projected, selection = None, None
        if step.drops:
            if step.choosing and self._stage(group).scores == "within":
                projected = self._project(layers.start, rows)
            selection = step.selection(self._choose(step, rows, projected) if step.choosing else None)
            rows, projected = step.compact(selection, rows, projected)
        pieces = pieces_of(step.chunks, group)
        plans = self.planner.prefill(pieces, group)
        deepstack = None
        if rows.extra is not None:
            every = torch.arange(len(rows.hidden), device=rows.hidden.device)
            deepstack = Deepstack(every, rows.extra.transpose(0, 1), self.groups.layers[0].stop)
        rotary = rows.cos, rows.sin
        hidden, q = self.decoder.run(
            layers, rows.hidden, rotary, self.kv_pool, plans, deepstack=deepstack, projected=projected
        )
        return replace(rows, hidden=hidden, queries=q[last_rows(pieces)]), selection

    def _stage(self, group: int) -> Stage:
        return self.groups.stages[group - 1]

    def _project(self, layer: int, rows: Rows) -> Projected:
        weights = self.decoder.weights.layers[layer]
        normed = self.decoder.norm(rows.hidden, weights.input_norm, weights.eps)
        return self.decoder.project(normed, weights, rows.cos, rows.sin)

    def _choose(self, step: StagePlan, rows: Rows, projected: Projected | None) -> Selection:
        """Of each image of the prompts that choose, the tokens that the prompt's last token attends to most."""
        prompts = [step.ended[index] for index in step.choosing]
        if projected is None:
            keys, places = self._stored_keys(step)
            queries = rows.queries[step.choosing]
        else:
            keys, places = self._new_keys(step, projected[1], prompts)
            queries = projected[0][[last_rows(step.pieces)[index] for index in step.choosing]]
        paths = [np.concatenate([places(segment) for segment in prompt.path()]) for prompt in prompts]
        spans = [span for span in step.spans if span.prompt in step.choosing]
        images = [places(span.segment)[span.offset : span.offset + span.size] for span in spans]
        sizes = [sum(span.size for span in spans if span.prompt == index) for index in step.choosing]
        scale, backend, device = self.decoder.scale, self.backend, queries.device
        slots = (torch.from_numpy(np.concatenate(parts)).to(device) for parts in (paths, images))
        offsets = offsets_of([len(path) for path in paths])
        queries = queries.contiguous()
        lse = vision_prune.logsumexp(queries, keys, offsets, scale=scale, slots=next(slots), backend=backend)
        scores = vision_prune.attention_scores(
            queries, keys, lse, offsets_of(sizes), scale=scale, slots=next(slots), backend=backend
        )
        offsets, counts = offsets_of([span.size for span in spans]), [span.count for span in spans]
        ends = [end - 1 for span, end in zip(spans, offsets[1:].tolist(), strict=True) if span.is_last_token]
        forced = torch.zeros(len(scores), dtype=torch.bool, device=device)
        forced[ends] = True  # whoever predicts the first token is not dropped, even if it is of an image
        wanted = torch.tensor(counts, dtype=torch.int32, device="cpu")
        return vision_prune.select_topk(
            scores, offsets, wanted, forced=forced if ends else None, num_kept=sum(counts), backend=backend
        )

    def _stored_keys(self, step: StagePlan) -> tuple[torch.Tensor, Places]:
        """Keys of the layer before a stage, in the pool, and where those of a segment stand."""
        group = step.group - 1

        def places(segment: Segment) -> np.ndarray:
            return self.planner.slots(segment.tables[group][-1], np.arange(segment.stored(group)))

        return self.kv_pool[0, -1], places

    def _new_keys(self, step: StagePlan, k: torch.Tensor, prompts: list[Segment]) -> tuple[torch.Tensor, Places]:
        """As `_stored_keys`, of the layer behind the stage: keys of this step's rows, then stored ones above them."""
        found: dict[Segment, np.ndarray] = {piece.segment: np.arange(0) for piece in step.pieces}
        slots, total = [np.empty(0, np.int64)], len(k)
        for segment in dict.fromkeys(segment for prompt in prompts for segment in prompt.path()):
            piece, first = step.rows_of.get(segment, (None, 0))
            stored = segment.stored(step.group) if piece is None else piece.start
            slots.append(self.planner.slots(segment.tables[step.group][0], np.arange(stored)))
            new = np.arange(first, first + (0 if piece is None else piece.stop - piece.start))
            found[segment] = np.concatenate([np.arange(total, total + stored), new])
            total += stored
        if total == len(k):
            return k, found.__getitem__
        pool = self.kv_pool[0, 0].flatten(0, 1)
        old = pool[torch.from_numpy(np.concatenate(slots)).to(k.device)]
        return torch.cat([k, old]), found.__getitem__

    def _note(self, ended: list[Segment], kept: list[torch.Tensor]) -> None:
        """Writes down what was selected, in one copy from the device."""
        if not ended:
            return
        plans: list[list[list[np.ndarray]]] = [[] for _ in ended]
        numbers = torch.cat(kept).to(torch.int32).cpu().numpy()
        start = 0
        for group in range(1, self.groups.count):
            parts: list[list[np.ndarray]] = [[] for _ in ended]
            for span in spans_of(ended, group):
                parts[span.prompt].append(numbers[start : start + span.count])
                start += span.count
            for plan, part in zip(plans, parts, strict=True):
                plan.append(part)
        for segment, plan in zip(ended, plans, strict=True):
            tail = tail_in(segment)
            if tail.given is None and tail.prompt.pruning is not None:
                tail.prompt.pruning.layer_sites = sites_of(self.groups, tail.prompt.images, plan)
