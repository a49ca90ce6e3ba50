"""The engine: requests in, groups of rollouts out, on the trainer's own parameters."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from foveate.kernels.dispatch import choose
from foveate.rollout import models, output
from foveate.rollout.asynchronous import Stepper
from foveate.rollout.checks import require
from foveate.rollout.config import EngineConfig
from foveate.rollout.desk import Desk
from foveate.rollout.intake import Intake
from foveate.rollout.layer_groups import layer_groups
from foveate.rollout.models.weights import Weights
from foveate.rollout.modes import own_modes
from foveate.rollout.pages import PagePool
from foveate.rollout.phases import phase
from foveate.rollout.processor import PromptProcessor, load_processor
from foveate.rollout.progress import track
from foveate.rollout.reports import Reports
from foveate.rollout.runner import Runner, num_pages
from foveate.rollout.scheduler import Batch, Group, Scheduler
from foveate.rollout.scoring import Scoring
from foveate.rollout.segments import SegmentTree
from foveate.rollout.types import Request, RolloutGroup, Versions
from foveate.rollout.updates import Updates


def _promised(name: str) -> Callable[..., NoReturn]:
    def method(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"Engine.{name} comes with a later release")

    method.__name__, method.__doc__ = name, "Comes with a later release; raises NotImplementedError."
    return method


def _listed(requests: Iterable[Request]) -> list[Request]:
    if isinstance(requests, Request):
        raise ValueError("expected several requests, as [request], got a Request (requests)")
    return list(requests)


def _check_config(config: EngineConfig | None) -> None:
    require(config is None or isinstance(config, EngineConfig), "an EngineConfig or None", config, "config")


class Engine(Reports, Scoring, Updates):
    """Completes each request n times over one copy of its prompt, with exact log-probs.

    model: a transformers causal language model of a family in `foveate.rollout.models.FAMILIES`. The engine
    reads its parameters in place (`shares_weights`): after an in-place optimiser step `update_weights()` is
    all there is to do. processor: anything with `.tokenizer` and `.image_processor`, or a bare tokenizer, or
    None for token-id prompts. Raises ValueError, naming the module, for a model it cannot share. Any thread
    may add requests, abort and generate; steps run one at a time. Touches no process-global state. Several engines may
    read one model; each is told of an update by itself. An engine cannot be copied or pickled: TypeError.
    """

    def __init__(self, model: nn.Module, processor: Any = None, config: EngineConfig | None = None):
        _check_config(config)
        self.config = config or EngineConfig()
        self.model = model
        self.spec = models.describe(model)
        device, asked = self.spec.lm_head.weight.device, torch.device(self.config.device or "cpu")
        same = self.config.device is None or (asked.type == device.type and asked.index in (None, device.index))
        require(same, f"the model's device {device}", self.config.device, "device")
        if self.config.deterministic and device.type != "cpu":
            raise NotImplementedError(f"EngineConfig.deterministic is for the CPU in this release, got {device}")
        for family in ("layers", "paged_attention", "sampling", "vision_prune"):
            choose(family, self.config.backend, device)
        self._weights = Weights(self.spec, self.config.dtype, self.config.fuse)
        self._versions = Versions()
        self.num_requests = 0  # added so far: the seed of a request that brings none depends on it
        groups = layer_groups(self.config.prune, self.spec.num_layers)
        pool = PagePool(num_pages(self.spec, self._weights, self.config, groups))
        self._tree = SegmentTree(pool, self.config.page_size, groups)
        self._scheduler = Scheduler(self.config, self._tree)
        self._processor = PromptProcessor(processor, self.spec.vision, self.spec.vocab_size)
        with own_modes(device):
            self._runner = Runner(self.spec, self._weights, self.config, pool.num_pages, groups)
            self._intake = Intake(self.config, self.spec, self._processor)
        finish = partial(output.finish, tokenizer=self._processor.tokenizer, versions=self._versions)
        # Whoever changes anything has its turn at the desk; prompts are prepared without.
        self._desk = Desk(self._scheduler, finish)
        self._preparing = threading.Lock()  # of prompts, without a turn; tokenizers need not be thread-safe
        self._stepper = Stepper(self._desk)
        self._num_prefilled = self._num_tokens = self._num_steps = 0
        self._seconds = 0.0

    @classmethod
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None, **model_kwargs: Any) -> Engine:
        """Loads model, tokenizer, image processor with transformers, weights from safetensors, onto config.device.

        config.device: None is where transformers puts the model, the CPU unless told otherwise. model_kwargs: of the
        model's `from_pretrained`, such as dtype. Code that comes with a model is not run unless they have
        trust_remote_code=True.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        _check_config(config)
        model_kwargs = {"trust_remote_code": False, **model_kwargs}  # None would ask on stdin
        trust = model_kwargs["trust_remote_code"]
        has_vision = hasattr(AutoConfig.from_pretrained(path, trust_remote_code=trust), "vision_config")
        auto = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
        model = auto.from_pretrained(path, use_safetensors=True, **model_kwargs)
        processor = load_processor(path, has_vision, trust_remote_code=trust)
        return cls(model.eval().to(config and config.device), processor, config)

    @property
    def tokenizer(self) -> Any:
        """The processor's, None without one."""
        return self._processor.tokenizer

    @property
    def image_processor(self) -> Any:
        """The processor's, None without one."""
        return self._processor.image_processor

    @property
    def shares_weights(self) -> bool:
        """True if the engine computes with the module's own parameters, False if with a shadow copy."""
        return self._weights.shares

    @property
    def weight_version(self) -> int:
        """How often the weights were updated."""
        return self._versions.weights

    @property
    def vision_version(self) -> int:
        """How often the weights of the vision tower were."""
        return self._versions.vision

    @property
    def has_unfinished(self) -> bool:
        """True while a request of `add_request` waits or runs, or its group was not handed out by `step` yet."""
        return self._desk.is_waited_for()

    def generate(
        self, requests: Iterable[Request], *, strict: bool = False, progress: bool | None = None
    ) -> list[RolloutGroup]:
        """Runs all requests and returns their groups in request order.

        A request that fails has `error` set in its group; the others are unaffected. strict: raise
        `RequestError` once all have ended. progress: a bar on stderr; None shows one on a terminal.
        """
        requests = _listed(requests)
        finished = dict(track(self._run(requests), len(requests), progress))
        return output.in_order(finished, len(requests), strict)

    def stream(self, requests: Iterable[Request]) -> Iterator[RolloutGroup]:
        """Yields each group as it finishes; starts when asked for one. Closing the iterator aborts what is left."""
        for _, group in self._run(_listed(requests)):
            yield group

    async def generate_async(self, requests: Iterable[Request], *, strict: bool = False) -> list[RolloutGroup]:
        """`generate` for asyncio: any number of calls may wait at a time and are served together.

        Steps run on a thread of the engine's, so that the event loop stays free. Cancelling the call aborts its
        requests. An exception of a step is raised in the calls whose requests it ended.
        """
        requests = _listed(requests)
        groups = self._stepper.run(self._submit, self._advance, requests)
        return output.in_order({index: group async for index, group in groups}, len(requests), strict)

    async def stream_async(self, requests: Iterable[Request]) -> AsyncIterator[RolloutGroup]:
        """`stream` for asyncio: yields each group as it finishes; closing the iterator aborts what is left."""
        async with aclosing(self._stepper.run(self._submit, self._advance, _listed(requests))) as groups:
            async for _, group in groups:
                yield group

    def add_request(self, request: Request) -> str:
        """Queues a request and returns its id; raises ValueError, naming it, if it cannot run."""
        return self._add(request, self._name(request))

    def step(self) -> list[RolloutGroup]:
        """Decodes what runs, prefills up to `max_batch_tokens` of what waits; returns the groups that finished.

        Those of requests that came by `add_request`; what `generate` and its kin asked for goes to them, whoever steps.
        An exception ends what was running and is raised; what waits goes on with the next step.
        """
        with self._desk.turn():
            self._advance()
            return self._desk.take()

    def abort(self, request_id: str) -> None:
        """Ends a request with what it has; its group comes with the next step. ValueError for an unknown id.

        May be called at any moment, by a signal handler too; a step under way is not disturbed.
        """
        self._desk.abort(request_id)

    def __reduce__(self) -> NoReturn:
        raise TypeError("expected a copy of the model to make another Engine on, got an Engine to copy (engine)")

    interrupt, resume, sleep, wake = map(_promised, ("interrupt", "resume", "sleep", "wake"))

    def _run(self, requests: list[Request]) -> Iterator[tuple[int, RolloutGroup]]:
        """Yields (index of the request, its group) as groups finish."""
        owner, indices = object(), {}
        try:
            for index, request in enumerate(requests):
                name, refused = self._submit(request, owner)
                if refused is not None:
                    yield index, refused
                else:
                    indices[name] = index
            while self._desk.is_waited_for(owner):
                self._advance()
                for group in self._desk.take(owner):
                    yield indices[group.request_id], group
        finally:
            self._desk.release(owner)

    def _submit(self, request: Request, owner: object) -> tuple[str, RolloutGroup | None]:
        """Queues a request for its owner; returns its id, and the failed group of one that cannot run."""
        name = self._name(request)
        try:
            return self._add(request, name, owner), None
        except ValueError as error:
            with self._desk.turn():
                self._desk.counts["failed"] += 1
            return name, output.failed_group(request, name, error)

    def _add(self, request: Request, request_id: str, owner: object = None) -> str:
        group = self._prepare(request, request_id)
        with self._desk.turn():
            self._desk.enter(group, owner)
            self._intake.assign_seeds(group, self.num_requests)
            self.num_requests += 1
        return request_id

    def _prepare(self, request: Request, request_id: str) -> Group:
        """What takes long about adding a request, and needs nothing that a step changes."""
        try:
            require(not self._desk.is_taken(request_id), "an id that is not in use", request_id, "request_id")
            with self._preparing, own_modes(torch.device("cpu")):
                group = self._intake.admit(request, request_id)
                self._scheduler.identify(group, self._versions.pair)
            self._scheduler.check(group)
        except ValueError as error:
            raise ValueError(f"request {request_id!r}: {error}") from error
        return group

    def _advance(self) -> None:
        """One step, whose results then lie at the desk."""
        with self._desk.step():
            start = time.perf_counter()
            self._weights.check()
            try:
                with own_modes(self._weights.device), phase("step"):
                    with phase("schedule"):
                        batch = self._scheduler.next(self._versions.pair)
                    self._run_batch(batch)
            except BaseException as error:
                self._desk.fail_running(error)
                raise
            finally:
                self._desk.collect()
            self._num_steps += 1
            self._seconds += time.perf_counter() - start

    def _run_batch(self, batch: Batch) -> None:
        if batch.decodes:
            with phase("decode"):
                self._num_tokens += output.record(batch.decodes, self._runner.decode(batch.decodes))
        if batch.chunks:
            with phase("encode"):
                output.fail_images(batch, self._scheduler.running, self._runner.encode(batch.chunks))
            with phase("prefill"):
                self._num_prefilled += self._runner.prefill(batch.chunks)
        if batch.firsts:
            with phase("first_tokens"):
                self._num_tokens += output.record(batch.firsts, self._runner.first_tokens(batch.firsts))

    def _name(self, request: Request) -> str:
        require(isinstance(request, Request), "a Request", request, "requests")
        return self._desk.free_name() if request.request_id is None else request.request_id
