"""The engine: requests in, groups of rollouts out, on the trainer's own parameters."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from foveate.kernels.dispatch import choose
from foveate.rollout import models, output
from foveate.rollout.asynchronous import AsyncCalls, Stepper
from foveate.rollout.config import EngineConfig, require
from foveate.rollout.intake import Intake
from foveate.rollout.models.weights import Weights
from foveate.rollout.modes import own_modes
from foveate.rollout.pages import PagePool
from foveate.rollout.processor import PromptProcessor, load_processor
from foveate.rollout.progress import track
from foveate.rollout.reports import Reports
from foveate.rollout.runner import Runner, num_pages
from foveate.rollout.scheduler import Batch, Group, Scheduler
from foveate.rollout.scoring import Scoring
from foveate.rollout.segments import SegmentTree
from foveate.rollout.turns import Turns
from foveate.rollout.types import Request, RolloutGroup
from foveate.rollout.updates import Updates


def _promised(name: str) -> Callable[..., NoReturn]:
    def method(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"Engine.{name} comes with a later release")

    method.__name__, method.__doc__ = name, "Comes with a later release; raises NotImplementedError."
    return method


class Engine(AsyncCalls, Reports, Scoring, Updates):
    """Completes each request n times over one copy of its prompt, with exact log-probs.

    model: a transformers causal language model of a family in `foveate.rollout.models.FAMILIES`. The engine
    reads its parameters in place (`shares_weights`): after an in-place optimiser step `update_weights()` is
    all there is to do. processor: anything with `.tokenizer` and `.image_processor`, or a bare tokenizer, or
    None for token-id prompts. Raises ValueError, naming the module, for a model it cannot share. Any thread
    may add requests, abort and generate; steps run one at a time. Touches no process-global state.
    """

    def __init__(self, model: nn.Module, processor: Any = None, config: EngineConfig | None = None):
        self.config = config or EngineConfig()
        if self.config.prune:
            raise NotImplementedError("EngineConfig.prune comes with a later release")
        self.model = model
        self.spec = models.describe(model)
        device, asked = self.spec.lm_head.weight.device, torch.device(self.config.device or "cpu")
        same = self.config.device is None or (asked.type == device.type and asked.index in (None, device.index))
        require(same, f"the model's device {device}", self.config.device, "device")
        if self.config.deterministic and device.type != "cpu":
            raise NotImplementedError(f"EngineConfig.deterministic is for the CPU in this release, got {device}")
        for family in ("layers", "paged_attention", "sampling"):
            choose(family, self.config.backend, device)
        self._weights = Weights(self.spec, self.config.dtype, self.config.fuse)
        self.weight_version = self.vision_version = 0
        self.num_requests = 0  # added so far: the seed of a request that brings none depends on it
        pool = PagePool(num_pages(self.spec, self._weights, self.config))
        self._tree = SegmentTree(pool, self.config.page_size)
        self._scheduler = Scheduler(self.config, self._tree)
        self._processor = PromptProcessor(processor, self.spec.vision, self.spec.vocab_size)
        with own_modes(device):
            self._runner = Runner(self.spec, self._weights, self.config, pool.num_pages)
            self._intake = Intake(self.config, self.spec, self._processor)
        self._turns = Turns()  # whoever changes what follows holds it; prompts are prepared without
        self._preparing = threading.Lock()  # processors and tokenizers need not be thread-safe
        self._stepper = Stepper()
        self._groups: dict[str, Group] = {}  # unfinished, by request id
        self._outbox: deque[RolloutGroup] = deque()  # finished, not handed out yet
        self._numbers = count()  # for the names of requests that bring none
        self._counts = dict.fromkeys(("finished", "failed", "prefilled_tokens", "tokens", "steps"), 0)
        self._seconds = 0.0

    @classmethod
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None, **model_kwargs: Any) -> Engine:
        """Loads model, tokenizer, image processor with transformers, weights from safetensors, onto config.device."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        has_vision = hasattr(AutoConfig.from_pretrained(path), "vision_config")
        auto = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
        model = auto.from_pretrained(path, use_safetensors=True, **model_kwargs)
        return cls(model.eval().to(config and config.device), load_processor(path, has_vision), config)

    @property
    def shares_weights(self) -> bool:
        """True if the engine computes with the module's own parameters, False if with a shadow copy."""
        return self._weights.shares

    @property
    def has_unfinished(self) -> bool:
        """True while a request is waiting or running, or a finished group was not handed out yet."""
        return self._scheduler.has_unfinished or bool(self._outbox)

    def generate(
        self, requests: Iterable[Request], *, strict: bool = False, progress: bool | None = None
    ) -> list[RolloutGroup]:
        """Runs all requests and returns their groups in request order.

        A request that fails has `error` set in its group; the others are unaffected. strict: raise
        `RequestError` once all have ended. progress: a bar on stderr; None shows one on a terminal.
        """
        requests = list(requests)
        finished = dict(track(self._run(requests), len(requests), progress))
        return output.in_order(finished, len(requests), strict)

    def stream(self, requests: Iterable[Request]) -> Iterator[RolloutGroup]:
        """Yields each group as it finishes. Closing the iterator aborts what is left."""
        for _, group in self._run(list(requests)):
            yield group

    def add_request(self, request: Request) -> str:
        """Queues a request and returns its id; raises ValueError, naming it, if it cannot run."""
        return self._add(request, self._name(request))

    def step(self) -> list[RolloutGroup]:
        """Decodes what runs, prefills up to `max_batch_tokens` of what waits; returns the groups that finished."""
        with self._turns:
            start = time.perf_counter()
            self._weights.check()
            try:
                with own_modes(self._weights.device):
                    self._run_batch(self._scheduler.next(self._versions))
            except BaseException as error:
                self._fail_running(error)
                raise
            self._hand_out(self._scheduler.retire())
            self._counts["steps"] += 1
            self._seconds += time.perf_counter() - start
            groups, self._outbox = list(self._outbox), deque()
            return groups

    def abort(self, request_id: str) -> None:
        """Ends a request with what it has; its group comes with the next step. ValueError for an unknown id."""
        with self._turns:
            known = isinstance(request_id, str) and request_id in self._groups
            require(known, "the id of an unfinished request", request_id, "request_id")
            group = self._groups[request_id]
            for sequence in group.sequences:
                sequence.finish_reason = sequence.finish_reason or "abort"
            self._hand_out([group] if self._scheduler.remove(group) else self._scheduler.retire())

    interrupt, resume, sleep, wake = map(_promised, ("interrupt", "resume", "sleep", "wake"))

    def _run(self, requests: list[Request]) -> Iterator[tuple[int, RolloutGroup]]:
        """Yields (index of the request, its group) as groups finish."""
        mine: dict[str, int] = {}
        try:
            for index, request in enumerate(requests):
                name = self._name(request)
                try:
                    mine[self._add(request, name)] = index
                except ValueError as error:
                    yield index, self._refused(request, name, error)
            while any(self._is_taken(name) for name in mine):  # a caller's own step() may have taken groups of a stream
                for group in self._step_for(mine):
                    yield mine.pop(group.request_id), group
        finally:
            self._forget(mine)

    def _step_for(self, mine: Container[str]) -> list[RolloutGroup]:
        """A step that hands out these requests' groups and keeps the others for those who ask."""
        with self._turns:
            finished = self.step()
            self._outbox.extend(group for group in finished if group.request_id not in mine)
            return [group for group in finished if group.request_id in mine]

    def _forget(self, names: Iterable[str]) -> None:
        """Aborts these requests and drops their groups."""
        with self._turns:
            for name in names:
                if name in self._groups:
                    self.abort(name)
            gone = set(names)
            self._outbox = deque(group for group in self._outbox if group.request_id not in gone)

    def _refused(self, request: Request, request_id: str, error: ValueError) -> RolloutGroup:
        with self._turns:
            self._counts["failed"] += 1
        return output.failed_group(request, request_id, error)

    def _add(self, request: Request, request_id: str) -> str:
        self._enter(self._prepare(request, request_id))
        return request_id

    def _prepare(self, request: Request, request_id: str) -> Group:
        """What takes long about adding a request, and needs nothing that a step changes."""
        try:
            require(not self._is_taken(request_id), "an id that is not in use", request_id, "request_id")
            with self._preparing, own_modes(torch.device("cpu")):
                group = self._intake.admit(request, request_id)
                self._scheduler.identify(group, self._versions)
            self._scheduler.check(group)
        except ValueError as error:
            raise ValueError(f"request {request_id!r}: {error}") from error
        return group

    def _enter(self, group: Group) -> None:
        with self._turns:
            name = group.request_id
            fresh = not self._is_taken(name)  # another thread may have been faster
            require(fresh, f"request {name!r}: an id that is not in use", name, "request_id")
            self._intake.assign_seeds(group, self.num_requests)
            self._scheduler.add(group)
            self._groups[name] = group
            self.num_requests += 1

    def _run_batch(self, batch: Batch) -> None:
        if batch.decodes:
            output.record(batch.decodes, self._runner.decode(batch.decodes))
        if batch.chunks:
            self._counts["prefilled_tokens"] += self._runner.prefill(batch.chunks)
        if batch.firsts:
            output.record(batch.firsts, self._runner.first_tokens(batch.firsts))

    def _fail_running(self, error: BaseException) -> None:
        """After a step that broke off: KV may be half written, so what runs ends; what waits goes on."""
        for group in {id(s.group): s.group for s in self._scheduler.running}.values():
            output.fail(group, f"expected the step to end, got {error!r}")
        self._hand_out(self._scheduler.retire())

    def _hand_out(self, groups: list[Group]) -> None:
        for group in groups:
            del self._groups[group.request_id]
            with own_modes(torch.device("cpu")):
                finished = self._finished(group)
            self._counts["failed" if group.error else "finished"] += 1
            self._counts["tokens"] += sum(len(rollout.token_ids) for rollout in finished.rollouts)
            self._outbox.append(finished)

    def _finished(self, group: Group) -> RolloutGroup:
        try:
            return output.group_of(group, self._processor.tokenizer, self.weight_version)
        except Exception as error:  # whatever a tokenizer raises concerns this group alone
            output.fail(group, f"expected a tokenizer that decodes the drawn ids, got {error!r}")
            return output.group_of(group, None, self.weight_version)

    def _name(self, request: Request) -> str:
        require(isinstance(request, Request), "a Request", request, "requests")
        if request.request_id is not None:
            return request.request_id
        with self._turns:
            return next(name for index in self._numbers if not self._is_taken(name := f"request-{index}"))

    def _is_taken(self, request_id: str) -> bool:
        with self._turns:
            return request_id in self._groups or any(group.request_id == request_id for group in self._outbox)

    @property
    def _versions(self) -> tuple[int, int]:
        return self.weight_version, self.vision_version
