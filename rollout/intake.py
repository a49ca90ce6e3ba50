"""From a request to a group that can be scheduled: every check that needs the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from foveate.kernels.sampling import masks, request_seed, sample_seed
from foveate.rollout.checks import cut, require, shown
from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.models.spec import ModelSpec
from foveate.rollout.processor import Prompt, PromptProcessor
from foveate.rollout.pruned import pruned
from foveate.rollout.pruning import PruneConfig
from foveate.rollout.scheduler import Group, Sequence
from foveate.rollout.tagged import SpanMasks
from foveate.rollout.text import TextDecoder
from foveate.rollout.types import Request

logger = logging.getLogger(__name__)
ID_FIELDS = ("stop_token_ids", "allowed_token_ids", "banned_token_ids")


class Intake:
    """Prepares prompts, ban masks, stop ids and seeds; raises ValueError for what cannot run."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, processor: PromptProcessor):
        self.config = config
        self.spec = spec
        self.processor = processor
        self.max_context = config.max_context or spec.max_context
        fits = self.max_context <= spec.max_context
        require(fits, f"at most the model's {spec.max_context}", self.max_context, "max_context")
        prune = config.prune.method if config.prune else None
        require(prune is None or spec.vision is not None, "no pruning for a text model", prune, "prune")
        self.eos_ids = _eos_ids(spec.model, spec.vocab_size)
        banned = set(spec.vision.pad_ids) if spec.vision and config.ban_vision_tokens else set()
        if config.ban_vision_tokens and processor.tokenizer is not None:
            banned |= {*range(len(processor.tokenizer), spec.vocab_size)}
        self.everything = self._bits(range(spec.vocab_size))
        # One tensor for all requests without bans of their own, so that a batch of them shares one row.
        self.allowed = self.everything & ~self._bits(banned) if banned else None

    def admit(self, request: Request, request_id: str) -> Group:
        """A group without seeds yet."""
        sampling = request.sampling
        limit = self.config.max_sequences
        require(request.n <= limit, f"n <= max_sequences = {limit}", request.n, "n")
        self._check_ids(sampling)
        self._check_stop(sampling.stop)
        config = self._pruning(request)
        prompt = self._prepare(request)
        prompt = prompt if config is None else pruned(prompt, config)
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_ids)
        allowed = self._allowed(sampling)
        early = self._allowed_early(allowed, stop_ids) if sampling.min_tokens else allowed
        group = Group(
            request=request,
            request_id=request_id,
            prompt=prompt,
            max_tokens=self._max_tokens(request, request_id, len(prompt.token_ids)),
            stop_ids=stop_ids,
            allowed=allowed,
            allowed_early=early,
            spans=self._spans(sampling, allowed, early),
        )
        for _ in range(request.n):
            decoder = TextDecoder(self.processor.tokenizer) if sampling.stop else None
            group.sequences.append(Sequence(group, decoder=decoder))
        return group

    def assign_seeds(self, group: Group, index: int) -> None:
        """index: how many requests were added before, the seed of a request that brings none."""
        seed = group.request.sampling.seed
        if seed is None:
            seed = request_seed(self.config.seed, index)
        for sample, sequence in enumerate(group.sequences):
            sequence.seed = _signed(sample_seed(seed, sample))

    def _pruning(self, request: Request) -> PruneConfig | None:
        """The request's own configuration or the engine's; inside the language model the engine's is the only one."""
        engines, own = self.config.prune, request.prune
        if isinstance(own, str) or own == engines:
            return engines
        if own is not None and own.site == "layer":
            expected = f"EngineConfig.prune, because {own.method} is chosen for a whole engine"
            raise ValueError(f"expected {expected}, got {shown(own)} (prune)")
        require(own is None or self.spec.vision is not None, "no pruning for a text model", own, "prune")
        return own

    def _prepare(self, request: Request) -> Prompt:
        try:
            return self.processor.prepare(request)
        except ValueError:
            raise
        except Exception as error:  # of a tokenizer, chat template or image processor: what they raise is theirs
            raise ValueError(
                f"expected a prompt that the processor can read, got {cut(repr(error))} (prompt)"
            ) from error

    def _check_ids(self, sampling: SamplingParams) -> None:
        size = self.spec.vocab_size
        ids = {name: getattr(sampling, name) or () for name in ID_FIELDS}
        ids["logit_bias"] = [token for token, _ in sampling.biases]
        for name, tokens in ids.items():
            beyond = [i for i in tokens if i >= size]
            require(not beyond, f"ids < {size}", beyond, name)

    def _check_stop(self, stop: tuple[str, ...]) -> None:
        tokenizer = self.processor.tokenizer
        if stop and tokenizer is None:
            raise ValueError("expected no stop strings, because the engine has no tokenizer, got some (stop)")
        for text in stop:
            special = [token for token in getattr(tokenizer, "all_special_tokens", ()) if token in text]
            if special:
                raise ValueError(f"expected stop_token_ids for the special tokens {special}, got {shown(text)} (stop)")

    def _bits(self, ids: Iterable[int]) -> torch.Tensor:
        return masks.of_ids(ids, self.spec.vocab_size).to(self.spec.lm_head.weight.device)

    def _allowed(self, sampling: SamplingParams) -> torch.Tensor | None:
        if not sampling.banned_token_ids and sampling.allowed_token_ids is None:
            return self.allowed
        allowed = self.everything if self.allowed is None else self.allowed
        if sampling.allowed_token_ids is not None:
            allowed = allowed & self._bits(sampling.allowed_token_ids)
        allowed = allowed & ~self._bits(sampling.banned_token_ids)
        if not bool(allowed.any()):
            raise ValueError("expected at least one id that is allowed and not banned, got none (allowed_token_ids)")
        return allowed

    def _allowed_early(self, allowed: torch.Tensor | None, stop_ids: frozenset[int]) -> torch.Tensor | None:
        if not stop_ids:
            return allowed
        early = (self.everything if allowed is None else allowed) & ~self._bits(stop_ids)
        if not bool(early.any()):
            raise ValueError("expected an allowed id that does not stop, got none before min_tokens (min_tokens)")
        return early

    def _spans(
        self, sampling: SamplingParams, allowed: torch.Tensor | None, early: torch.Tensor | None
    ) -> SpanMasks | None:
        if not sampling.tagged:
            return None
        words, early_words = (self.everything if mask is None else mask for mask in (allowed, early))
        return SpanMasks(sampling.tagged, words, early_words, self.spec.vocab_size)

    def _max_tokens(self, request: Request, request_id: str, prompt_len: int) -> int:
        room = self.max_context - prompt_len
        if room < 1:
            raise ValueError(
                f"expected a prompt shorter than the context of {self.max_context}, got {prompt_len} (prompt)"
            )
        if request.sampling.max_tokens > room:
            logger.warning(
                "request %r: max_tokens cut from %d to %d by the context of %d",
                request_id,
                request.sampling.max_tokens,
                room,
                self.max_context,
            )
        return min(request.sampling.max_tokens, room)


def _eos_ids(model, vocab_size: int) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids) & frozenset(range(vocab_size))


def _signed(seed: int) -> int:
    """Unsigned 64-bit -> the int64 with the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
