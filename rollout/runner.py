"""Runs the model for one step: prompts into KV, last tokens into next tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foveate.kernels import sampling
from foveate.kernels.dispatch import for_family
from foveate.kernels.sampling import SampleOutput
from foveate.rollout.config import EngineConfig
from foveate.rollout.layer_groups import LayerGroups
from foveate.rollout.logits import Adjuster
from foveate.rollout.models.decoder import Decoder
from foveate.rollout.models.spec import Deepstack, ModelSpec
from foveate.rollout.models.weights import Weights
from foveate.rollout.phases import phase
from foveate.rollout.planner import Planner
from foveate.rollout.processor import ImageInput
from foveate.rollout.scheduler import Group, Sequence
from foveate.rollout.segments import Chunk, Segment
from foveate.rollout.selection import Selector
from foveate.rollout.staged import StagedPrefill
from foveate.rollout.tagged import MaskRows
from foveate.rollout.vision import VisionEncoder, place

CPU_KV_MEMORY = 1 << 30  # bytes


class Runner:
    """Owns the KV pool, float [2, layers a page, pages, page_size, kv_heads, head_dim], and drives the decoder."""

    def __init__(self, spec: ModelSpec, weights: Weights, config: EngineConfig, num_pages: int, groups: LayerGroups):
        self.config = config
        self.weights = weights
        self.device = weights.device
        self.decoder = Decoder(spec, weights, config.backend, config.deterministic)
        self.planner = Planner(config.page_size, self.device, groups)
        self.adjuster, self.masks = Adjuster(), MaskRows()
        self.logits_backend = for_family("sampling", config.backend)
        self.vision, self.selector = None, None
        if spec.vision is not None:
            memory, backend = config.vision_cache_memory, for_family("vision_prune", config.backend)
            self.vision = VisionEncoder(spec.vision, weights.dtype, memory, config.deterministic, backend)
            self.selector = Selector(self.vision)
        # Not zeros: on a CPU the system commits the memory of pages as they are first written.
        shape = (2, groups.layers_per_page, num_pages, config.page_size, spec.num_kv_heads, spec.head_dim)
        self.kv_pool = torch.empty(shape, dtype=weights.dtype, device=self.device)
        self.staged = None
        if groups.count > 1:
            levels = spec.vision.num_deepstack if spec.vision else 0
            self.staged = StagedPrefill(self.decoder, self.planner, groups, self.kv_pool, levels)

    def encode(self, chunks: list[Chunk]) -> dict[Segment, str]:
        """Gives the segments the features of the images in their chunks, all images in one pass of the tower.

        Where that pass fails, each image passes alone. Of pruned images the segments get what is kept, which is decided
        here unless it is known. Returns what fails: segment -> who raised what, a sentence after "images that".
        """
        wanted = [(chunk.segment, image) for chunk in chunks for image in _images_in(chunk)]
        missing = [(segment, image) for segment, image in wanted if image.content_hash not in segment.features]
        if not missing or self.selector is None:
            return {}
        pairs = [(segment.source, image) for segment, image in missing]
        features, errors = self._features([image for _, image in missing], self.selector.needs(pairs))
        refused = self.selector.select(pairs, features)
        failed: dict[Segment, str] = {}
        for segment, image in missing:
            key, pruning = image.content_hash, segment.source.pruning
            if key in errors:
                failed[segment] = f"the vision tower encodes, got {errors[key]}"
            elif pruning and (key, pruning.config_hash) in refused:
                failed[segment] = f"{pruning.method} can prune, got {refused[key, pruning.config_hash]}"
            else:
                segment.features[key] = self.selector.apply(segment.source, image, features[key])
        return failed

    def _features(
        self, images: list[ImageInput], selected: dict[bytes, bool]
    ) -> tuple[dict[bytes, torch.Tensor], dict[bytes, str]]:
        """Features by content hash, or for an image what the tower raised: text, as an exception holds memory."""
        assert self.vision is not None, images
        distinct = list({image.content_hash: image for image in images}.values())
        try:
            return self.vision.encode(distinct, selected), {}
        except Exception as error:  # whatever a tower raises, out of memory too, concerns these images alone
            reason = repr(error)
        if len(distinct) == 1:
            return {}, {distinct[0].content_hash: reason}
        each = [self._features([image], selected) for image in distinct]
        features = {key: feature for found, _ in each for key, feature in found.items()}
        return features, {key: reason for _, failed in each for key, reason in failed.items()}

    def prefill(self, chunks: list[Chunk]) -> int:
        """Computes chunks of segments, parents before their children; returns the number of tokens."""
        if chunks:
            self.forward(chunks)
        return sum(chunk.stop - chunk.start for chunk in chunks)

    def forward(self, chunks: list[Chunk]) -> dict[Segment, torch.Tensor]:
        """As `prefill`, of one chunk or more. -> float [T, hidden] by segment, its tokens after the final norm

        Of a prompt that loses tokens between layers only those that are left, in the step that brings its last token.
        Raises RuntimeError, before anything is stored, if an image fails that `encode` was not called for.
        """
        for reason in self.encode(chunks).values():
            raise RuntimeError(f"expected images that {reason}")
        for chunk in chunks:
            assert chunk.segment.length == chunk.start, "chunks of a segment come in order"
            chunk.segment.length = chunk.stop
        positions = torch.cat([c.segment.source.positions[:, c.span] for c in chunks], dim=1).to(self.device)
        hidden, deepstack = self._embed(chunks)
        if self.staged is None:
            with phase("plan"):
                plans = self.planner.prefill(chunks)
            hidden = self.decoder(hidden, positions, self.kv_pool, plans, decode=False, deepstack=deepstack)
        else:
            hidden, chunks = self.staged(chunks, hidden, positions, deepstack)
        parts = hidden.split([chunk.stop - chunk.start for chunk in chunks])
        for chunk, part in zip(chunks, parts, strict=True):
            if not chunk.segment.num_missing:
                chunk.segment.last_hidden = part[-1].clone()
        return {chunk.segment: part for chunk, part in zip(chunks, parts, strict=True)}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float [N, hidden] -> float32 [N, vocab]"""
        weight, bias = self.weights.lm_head, self.weights.lm_head_bias
        if not self.config.deterministic:
            return sampling.logits_of(hidden, weight, bias)
        return self.decoder.linear(hidden.float(), weight.float(), None if bias is None else bias.float())

    def first_tokens(self, sequences: list[Sequence]) -> SampleOutput:
        """Draws the first token of samples whose prompt was prefilled."""
        for group in {sequence.group for sequence in sequences}:
            tail = group.path[-1].tail
            if tail is not None:
                tail.hand_to(group.prompt)
        with phase("sample"):
            return self._sample(torch.stack([_last_hidden(sequence.group) for sequence in sequences]), sequences)

    def decode(self, sequences: list[Sequence]) -> SampleOutput:
        """Feeds each sequence's last token and draws its next one."""
        with phase("plan"):
            plans = self.planner.decode(sequences)
        tokens = torch.tensor([sequence.token_ids[-1] for sequence in sequences], device=self.device)
        positions = torch.tensor([sequence.next_position for sequence in sequences], device=self.device)
        embedded = F.embedding(tokens, self.weights.embed)
        hidden = self.decoder(embedded, positions.expand(3, -1), self.kv_pool, plans, decode=True)
        for sequence in sequences:
            assert sequence.leaf is not None, sequence.group.request_id
            sequence.leaf.length += 1
        with phase("sample"):
            return self._sample(hidden, sequences)

    def _embed(self, chunks: list[Chunk]) -> tuple[torch.Tensor, Deepstack | None]:
        """Token embeddings, image placeholders replaced by features. -> float [T, hidden], what is added later"""
        tokens = torch.cat([chunk.segment.source.token_ids[chunk.span] for chunk in chunks])
        hidden = F.embedding(tokens.to(self.device), self.weights.embed)
        placed: list[tuple[int, torch.Tensor]] = []  # (row, features of an image's tokens from there on)
        row = 0
        for chunk in chunks:
            segment, (first, last) = chunk.segment, (chunk.span.start, chunk.span.stop)
            for image in _images_in(chunk):
                start, stop = max(first, image.start), min(last, image.start + image.num_tokens)
                part = segment.features[image.content_hash][start - image.start : stop - image.start]
                placed.append((row + start - first, part))
            row += last - first
            ahead = {image.content_hash for image in segment.source.images if image.start + image.num_tokens > last}
            segment.features = {key: value for key, value in segment.features.items() if key in ahead}
        return hidden, place(hidden, placed)

    def _sample(self, hidden: torch.Tensor, sequences: list[Sequence]) -> SampleOutput:
        params = [sequence.group.request.sampling for sequence in sequences]

        def column(values, dtype=torch.float32) -> torch.Tensor:  # on the CPU, where checks wait for nothing
            return torch.tensor(list(values), dtype=dtype, device="cpu")

        arguments: dict[str, Any] = dict(
            temperature=column(p.temperature for p in params),
            top_k=column((p.top_k for p in params), torch.int64) if any(p.top_k for p in params) else None,
            top_p=column(p.top_p for p in params) if any(p.top_p < 1 for p in params) else None,
            min_p=column(p.min_p for p in params) if any(p.min_p for p in params) else None,
            seeds=column((s.seed for s in sequences), torch.int64),
            steps=column((len(s.token_ids) for s in sequences), torch.int64),
            allowed=self.masks([sequence.allowed for sequence in sequences]),
        )
        if not (self.config.deterministic or any(p.adjustments for p in params)):
            weight, bias = self.weights.lm_head, self.weights.lm_head_bias
            return sampling.sample_from_hidden(hidden, weight, bias=bias, backend=self.config.backend, **arguments)
        logits = self.adjuster(self.logits(hidden), sequences)
        return sampling.sample(logits, backend=self.logits_backend, **arguments)


def _images_in(chunk: Chunk) -> list[ImageInput]:
    """Images of which the chunk holds a token."""
    span = chunk.span
    images = chunk.segment.source.images
    return [i for i in images if i.start < span.stop and span.start < i.start + i.num_tokens]


def _last_hidden(group: Group) -> torch.Tensor:
    hidden = group.path[-1].last_hidden
    assert hidden is not None, f"request {group.request_id!r} was not prefilled"
    return hidden


def num_pages(spec: ModelSpec, weights: Weights, config: EngineConfig, groups: LayerGroups) -> int:
    """How many KV pages the configured memory holds; ValueError if not even one."""
    token_bytes = 2 * groups.layers_per_page * spec.num_kv_heads * spec.head_dim * weights.dtype.itemsize
    page_bytes = token_bytes * config.page_size
    budget = config.kv_memory
    if budget is None:
        on_cuda = weights.device.type == "cuda"
        budget = int(torch.cuda.mem_get_info(weights.device)[0] * 0.9) if on_cuda else CPU_KV_MEMORY
    if budget < page_bytes:
        raise ValueError(f"expected at least one page of {page_bytes} bytes, got {budget} (kv_memory)")
    return budget // page_bytes
