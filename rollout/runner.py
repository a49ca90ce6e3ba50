"""Runs the model for one step: prompts into KV, last tokens into next tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foveate.kernels import sampling
from foveate.kernels.sampling import SampleOutput
from foveate.rollout.config import EngineConfig
from foveate.rollout.logits import Adjuster
from foveate.rollout.models.decoder import Decoder
from foveate.rollout.models.spec import Deepstack, ModelSpec
from foveate.rollout.models.weights import Weights
from foveate.rollout.planner import Planner
from foveate.rollout.processor import ImageInput
from foveate.rollout.scheduler import Group, Sequence
from foveate.rollout.segments import Chunk, Segment
from foveate.rollout.vision import VisionEncoder, place

CPU_KV_MEMORY = 1 << 30  # bytes


class Runner:
    """Owns the KV pool, float [2, layers, pages, page_size, kv_heads, head_dim], and drives the decoder."""

    def __init__(self, spec: ModelSpec, weights: Weights, config: EngineConfig, num_pages: int):
        self.config = config
        self.weights = weights
        self.device = weights.device
        self.decoder = Decoder(spec, weights, config.backend, config.deterministic)
        self.planner = Planner(config.page_size, self.device)
        self.adjuster = Adjuster()
        self.logits_backend = sampling.logits_backend(config.backend, self.device)
        self.vision = None
        if spec.vision is not None:
            self.vision = VisionEncoder(spec.vision, weights.dtype, config.vision_cache_memory, config.deterministic)
        # Not zeros: on a CPU the system commits the memory of pages as they are first written.
        shape = (2, spec.num_layers, num_pages, config.page_size, spec.num_kv_heads, spec.head_dim)
        self.kv_pool = torch.empty(shape, dtype=weights.dtype, device=self.device)

    def encode(self, chunks: list[Chunk]) -> dict[Segment, str]:
        """Gives the segments the features of the images in their chunks, all images in one pass of the tower.

        Where that pass fails, each image passes alone. Returns what then still fails: segment -> what the tower raised.
        """
        wanted = [(chunk.segment, image) for chunk in chunks for image in _images_in(chunk)]
        missing = [(segment, image) for segment, image in wanted if image.content_hash not in segment.features]
        if not missing:
            return {}
        images = {image.content_hash: image for _, image in missing}
        features, errors = self._features(list(images.values()))
        if errors and len(images) > 1:
            errors = {}
            for image in images.values():
                alone, failed = self._features([image])
                features |= alone
                errors |= failed
        for segment, image in missing:
            if image.content_hash in features:
                segment.features[image.content_hash] = features[image.content_hash]
        return {segment: errors[image.content_hash] for segment, image in missing if image.content_hash in errors}

    def _features(self, images: list[ImageInput]) -> tuple[dict[bytes, torch.Tensor], dict[bytes, str]]:
        """Features by content hash, or for each image what the tower raised: text, as an exception holds memory."""
        assert self.vision is not None, images
        try:
            return self.vision.encode(images), {}
        except Exception as error:  # whatever a tower raises, out of memory too, concerns these images alone
            reason = repr(error)
        return {}, {image.content_hash: reason for image in images}

    def prefill(self, chunks: list[Chunk]) -> int:
        """Computes chunks of segments, parents before their children; returns the number of tokens."""
        return len(self.forward(chunks)) if chunks else 0

    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """As `prefill`, of one chunk or more. -> float [T, hidden], after the final norm, their tokens in order

        Raises RuntimeError, before anything is stored, if the tower fails on an image that `encode` was not called for.
        """
        for reason in self.encode(chunks).values():
            raise RuntimeError(f"expected the vision tower to encode each image, got {reason}")
        for chunk in chunks:
            assert chunk.segment.length == chunk.start, "chunks of a segment come in order"
            chunk.segment.length = chunk.stop
        plan = self.planner.prefill(chunks)
        positions = torch.cat([c.segment.source.positions[:, c.span] for c in chunks], dim=1)
        hidden, deepstack = self._embed(chunks)
        hidden = self.decoder(hidden, positions.to(self.device), self.kv_pool, plan, decode=False, deepstack=deepstack)
        end = 0
        for chunk in chunks:
            end += chunk.stop - chunk.start
            if not chunk.segment.num_missing:
                chunk.segment.last_hidden = hidden[end - 1].clone()
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float [N, hidden] -> float32 [N, vocab]"""
        bias = self.weights.lm_head_bias
        return self.decoder.linear(hidden.float(), self.weights.lm_head.float(), None if bias is None else bias.float())

    def first_tokens(self, sequences: list[Sequence]) -> SampleOutput:
        """Draws the first token of samples whose prompt was prefilled."""
        return self._sample(torch.stack([_last_hidden(sequence.group) for sequence in sequences]), sequences)

    def decode(self, sequences: list[Sequence]) -> SampleOutput:
        """Feeds each sequence's last token and draws its next one."""
        plan = self.planner.decode(sequences)
        tokens = torch.tensor([sequence.token_ids[-1] for sequence in sequences], device=self.device)
        positions = torch.tensor([sequence.next_position for sequence in sequences], device=self.device)
        embedded = F.embedding(tokens, self.weights.embed)
        hidden = self.decoder(embedded, positions.expand(3, -1), self.kv_pool, plan, decode=True)
        for sequence in sequences:
            assert sequence.leaf is not None, sequence.group.request_id
            sequence.leaf.length += 1
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
            return torch.tensor(list(values), dtype=dtype)

        arguments: dict[str, Any] = dict(
            temperature=column(p.temperature for p in params),
            top_k=column((p.top_k for p in params), torch.int64) if any(p.top_k for p in params) else None,
            top_p=column(p.top_p for p in params) if any(p.top_p < 1 for p in params) else None,
            min_p=column(p.min_p for p in params) if any(p.min_p for p in params) else None,
            seeds=column((s.seed for s in sequences), torch.int64),
            steps=column((len(s.token_ids) for s in sequences), torch.int64),
            banned=_bans(sequences),
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


def num_pages(spec: ModelSpec, weights: Weights, config: EngineConfig) -> int:
    """How many KV pages the configured memory holds; ValueError if not even one."""
    page_bytes = 2 * spec.num_layers * config.page_size * spec.num_kv_heads * spec.head_dim * weights.dtype.itemsize
    budget = config.kv_memory
    if budget is None:
        on_cuda = weights.device.type == "cuda"
        budget = int(torch.cuda.mem_get_info(weights.device)[0] * 0.9) if on_cuda else CPU_KV_MEMORY
    if budget < page_bytes:
        raise ValueError(f"expected at least one page of {page_bytes} bytes, got {budget} (kv_memory)")
    return budget // page_bytes


def _bans(sequences: list[Sequence]) -> torch.Tensor:
    """bool [vocab] if all rows agree, else [N, vocab]."""
    rows = []
    for sequence in sequences:
        group = sequence.group
        early = len(sequence.token_ids) < group.request.sampling.min_tokens
        if group.spans is not None:
            rows.append(group.spans.mask(sequence.place, early))
        else:
            rows.append(group.banned_early if early else group.banned)
    return rows[0] if all(row is rows[0] for row in rows) else torch.stack(rows)
