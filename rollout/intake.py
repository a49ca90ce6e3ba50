"""From a request to a group that can be scheduled: every check that needs the engine."""

from __future__ import annotations

import logging

import torch

from foveate.kernels.sampling import request_seed, sample_seed
from foveate.rollout.config import EngineConfig, SamplingParams, cut, require, shown
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
        self.banned = torch.zeros(spec.vocab_size, dtype=torch.bool, device=spec.lm_head.weight.device)
        if config.ban_vision_tokens:
            self.banned[list(spec.vision.pad_ids if spec.vision else ())] = True
            if processor.tokenizer is not None:
                self.banned[len(processor.tokenizer) :] = True

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
        banned = self._banned(request)
        early = self._banned_early(banned, stop_ids) if sampling.min_tokens else banned
        group = Group(
            request=request,
            request_id=request_id,
            prompt=prompt,
            max_tokens=self._max_tokens(request, request_id, len(prompt.token_ids)),
            stop_ids=stop_ids,
            banned=banned,
            banned_early=early,
            spans=SpanMasks(sampling.tagged, banned, early) if sampling.tagged else None,
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

    def _banned(self, request: Request) -> torch.Tensor:
        sampling, banned = request.sampling, self.banned
        if sampling.banned_token_ids:
            banned = banned.clone()
            banned[list(sampling.banned_token_ids)] = True
        if sampling.allowed_token_ids is not None:
            allowed = torch.zeros_like(banned)
            allowed[list(sampling.allowed_token_ids)] = True
            banned = banned | ~allowed
        if banned is not self.banned and bool(banned.all()):
            raise ValueError("expected at least one id that is allowed and not banned, got none (allowed_token_ids)")
        return banned

    def _banned_early(self, banned: torch.Tensor, stop_ids: frozenset[int]) -> torch.Tensor:
        early = banned.clone()
        early[list(stop_ids)] = True
        if bool(early.all()):
            raise ValueError("expected an allowed id that does not stop, got none before min_tokens (min_tokens)")
        return early

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
