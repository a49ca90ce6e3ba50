"""Log-probs of finished groups under the engine's weights of now: `Engine.score`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from foveate.kernels import sampling
from foveate.rollout.checks import require
from foveate.rollout.config import EngineConfig
from foveate.rollout.desk import Desk
from foveate.rollout.intake import Intake
from foveate.rollout.logits import TokenCounts, adjust
from foveate.rollout.models.weights import Weights
from foveate.rollout.modes import own_modes
from foveate.rollout.phases import phase
from foveate.rollout.prefill import Prefill
from foveate.rollout.processor import Prompt, PromptProcessor
from foveate.rollout.pruned import replayed
from foveate.rollout.runner import Runner
from foveate.rollout.segments import Chunk, Segment, SegmentTree, identities
from foveate.rollout.tails import check_plan
from foveate.rollout.types import Request, Rollout, RolloutGroup, VisionInputs

LOGIT_ROWS = 128  # rows of logits alive at once


class Scoring:
    """The part of an engine that scores."""

    config: EngineConfig
    _intake: Intake
    _processor: PromptProcessor
    _runner: Runner
    _tree: SegmentTree
    _desk: Desk
    _weights: Weights

    def score(self, groups: Iterable[RolloutGroup]) -> list[list[torch.Tensor]]:
        """`logprobs` of every completion of finished groups, recomputed under the weights of now.

        Log-softmax(logits / T) over the whole vocabulary, T that of the group's request (1 for 0), after its penalties
        and biases; bans change what is drawn and not this. Returns float32 [T] by group and rollout, on the CPU; not
        differentiable. The stored log-probs are not read. A prompt is prefilled once a group, with the segments the
        group records, so that in deterministic mode unchanged weights give the bits of the rollout. May be called while
        requests are unfinished, and takes the KV pages that they leave free; all are given back. Raises ValueError,
        naming the request, before anything is computed: for a group that failed, is of another model, was drawn
        under several weight versions, has a plan that is not its prompt's, or whose prompt and longest completion do
        not fit into the free pages. Pruned images are pruned as the group's plan says.
        """
        if isinstance(groups, RolloutGroup):
            raise ValueError("expected several groups, as [group], got a RolloutGroup (groups)")
        with self._desk.turn():
            self._desk.require_no_step("score")
            self._weights.check()
            with own_modes(torch.device("cpu")):
                jobs = [self._job(group) for group in groups]
            with own_modes(self._weights.device), phase("score"):
                return _Scorer(self._runner, self._tree, self.config).score(jobs)

    def _job(self, group: RolloutGroup) -> _Job:
        require(isinstance(group, RolloutGroup), "a RolloutGroup", group, "groups")
        try:
            prompt = _prompt(group, self._processor)
            for rollout in group.rollouts:
                _check_rollout(rollout, self._intake.spec.vocab_size, self._intake.max_context - len(prompt.token_ids))
            check_plan(prompt, self._tree.groups)
            job = _Job(group, prompt, identities(prompt, (0, 0)))
            free, needed = self._tree.pool.num_free, job.pages(self._tree)
            require(needed <= free, f"{needed} free pages of {self.config.page_size} tokens", free, "kv_memory")
        except ValueError as error:
            name = getattr(group, "request_id", None)
            raise ValueError(f"request {name!r}: {error}") from error
        return job


@dataclass(frozen=True, eq=False)
class _Job:
    """A group to score. identities: of its prompt's segments; they only meet those of the same call."""

    group: RolloutGroup
    prompt: Prompt
    identities: list[bytes]

    def pages(self, tree: SegmentTree) -> int:
        """Pages that the prompt and the longest completion take; the last token of a completion is never fed."""
        lengths = [len(rollout.token_ids) for rollout in self.group.rollouts]
        if not any(lengths):
            return 0
        return sum(tree.prompt_pages(self.prompt)) + tree.pages_for(max(lengths) - 1)


@dataclass(frozen=True, eq=False)
class _Completion:
    """A completion laid out. root: its prompt's last segment. leaf: its tokens but the last, None if it has one."""

    job: _Job
    rollout: Rollout
    root: Segment
    leaf: Segment | None
    out: list[torch.Tensor]  # where its log-probs go
    index: int


class _Scorer:
    """Lays completions out below their prompts while tokens and pages last, runs them, and goes on.

    Its tree is its own: segments of running requests may be half-way through their prefill, or of older weights.
    """

    def __init__(self, runner: Runner, tree: SegmentTree, config: EngineConfig):
        self.runner = runner
        self.config = config
        self.tree = SegmentTree(tree.pool, tree.page_size, tree.groups)
        self.path: list[Segment] = []  # of the job at hand
        self.ended: list[Segment] = []  # held until what is laid out has run
        self.missing: dict[Segment, None] = {}  # to prefill, parents before their children
        self.completions: list[_Completion] = []

    def score(self, jobs: Sequence[_Job]) -> list[list[torch.Tensor]]:
        results = [[torch.empty(0, device="cpu") for _ in job.group.rollouts] for job in jobs]
        try:
            for job, out in zip(jobs, results, strict=True):
                for index, rollout in enumerate(job.group.rollouts):
                    if len(rollout.token_ids):
                        self._lay_out(job, rollout, out, index)
                self.ended += self.path
                self.path = []
            self._run()
        finally:
            self._release([*self.ended, *self.path])
        return results

    def _lay_out(self, job: _Job, rollout: Rollout, out: list[torch.Tensor], index: int) -> None:
        count = len(rollout.token_ids) - 1
        pages, tokens = self.tree.pages_for(count), count
        if not self.path:
            pages += self.tree.pages_needed(job.identities, job.prompt)
            tokens += len(job.prompt.token_ids)
        tokens += sum(segment.num_missing for segment in self.missing)
        if self.missing and (pages > self.tree.pool.num_free or tokens > self.config.max_batch_tokens):
            self._run()
        if not self.path:
            self.path = self.tree.acquire(job.identities, job.prompt)
            self.missing |= dict.fromkeys(segment for segment in self.path if segment.num_missing)
        leaf = None
        if count:
            leaf = self.tree.branch(self.path[-1], count, _fed(job.prompt, rollout))
            self.missing[leaf] = None
            self.ended.append(leaf)
        self.completions.append(_Completion(job, rollout, self.path[-1], leaf, out, index))

    def _run(self) -> None:
        """Prefills what is missing, scores what is laid out, and gives up what has ended."""
        hidden: dict[Segment, list[torch.Tensor]] = {segment: [] for segment in self.missing}
        for chunks in _cut(self.missing, self.config.max_batch_tokens):
            for segment, part in self.runner.forward(chunks).items():
                if segment.identity is None:  # of a completion; of a prompt only the last token predicts one
                    hidden[segment].append(part)
        rows = []
        for completion in self.completions:
            assert completion.root.last_hidden is not None, completion.job.group.request_id
            rows += [completion.root.last_hidden[None], *(hidden[completion.leaf] if completion.leaf else ())]
        self._write_logprobs(rows)
        self._release(self.ended)
        self.ended, self.missing, self.completions = [], {}, []

    def _write_logprobs(self, rows: list[torch.Tensor]) -> None:
        if not self.completions:
            return
        token_ids = torch.cat([c.rollout.token_ids for c in self.completions]).to(self.runner.device)
        counts = [len(completion.rollout.token_ids) for completion in self.completions]
        # On the CPU, where checks wait for nothing.
        temperature = torch.tensor(
            [c.job.group.request.sampling.temperature for c in self.completions], dtype=torch.float32, device="cpu"
        )
        temperature = temperature.repeat_interleave(torch.tensor(counts, device="cpu"))
        adjustments = _Adjustments(self.completions)
        hidden, logprobs = torch.cat(rows), []
        for start in range(0, len(hidden), LOGIT_ROWS):
            block = slice(start, start + LOGIT_ROWS)
            logits = adjustments.apply(self.runner.logits(hidden[block]))
            values = sampling.score(
                logits, token_ids[block], temperature=temperature[block], backend=self.runner.logits_backend
            )
            logprobs.append(values[0])
        for completion, part in zip(self.completions, torch.cat(logprobs).cpu().split(counts), strict=True):
            completion.out[completion.index] = part.clone()

    def _release(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            self.tree.release(segment)


class _Adjustments:
    """Penalties and biases of consecutive rows of logits, the completions' tokens one after another."""

    def __init__(self, completions: Sequence[_Completion]):
        self.rows = (row for completion in completions for row in self._rows_of(completion))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row in range(len(logits)):
            params, counts = next(self.rows)
            if counts is not None:
                adjust(logits, [(row, params, counts)])
        return logits

    def _rows_of(self, completion: _Completion) -> Iterator[tuple]:
        """For each token the parameters, and the tokens before it if they matter."""
        params, prompt_ids = completion.job.group.request.sampling, completion.job.prompt.token_ids
        counts = None
        if params.adjustments:
            counts = TokenCounts(prompt_ids if params.repetition_penalty != 1 else prompt_ids[:0])
        for token in completion.rollout.token_ids.tolist():
            yield params, counts
            if counts is not None:
                counts.draw([token])


def _prompt(group: RolloutGroup, processor: PromptProcessor) -> Prompt:
    """The prompt as it was prefilled: recorded positions and boundaries, images found again by their placeholders."""
    require(group.error is None, "a group without an error", group.error, "group.error")
    require(not group.kept_versions, "keys and values of one weight version", group.kept_versions, "kept_versions")
    vision = None
    if group.pixel_values is not None:
        if group.image_grid_thw is None:
            raise ValueError("expected grids of the images, got None (group.image_grid_thw)")
        vision = VisionInputs(group.pixel_values, group.image_grid_thw)
    prompt = processor.prepare(Request(group.prompt_ids, vision=vision))
    length, positions, lengths = len(prompt.token_ids), group.prompt_positions, group.segments.tolist()
    require(positions.shape == (3, length), f"[3, {length}]", list(positions.shape), "group.prompt_positions")
    whole = sum(lengths) == length and min(lengths) > 0 if lengths else True
    require(whole, f"positive lengths that sum to {length}", lengths, "group.segments")
    ends = torch.tensor(lengths or [length], device="cpu").cumsum(0).tolist()
    positions = positions.long().cpu()
    prompt = replace(prompt, positions=positions, next_position=group.next_position, boundaries=tuple(ends))
    return prompt if group.keep is None else replayed(prompt, group.keep)


def _check_rollout(rollout: Rollout, vocab_size: int, room: int) -> None:
    """room: tokens of the context that the prompt leaves."""
    ids, versions = rollout.token_ids, rollout.weight_versions
    require(ids.dim() == 1 and ids.dtype == torch.int64, "int64 [T]", f"{ids.dtype} {list(ids.shape)}", "token_ids")
    beyond = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    require(not beyond, f"ids in [0, {vocab_size})", beyond[:3], "token_ids")
    require(len(ids) <= room, f"at most {room} tokens after the prompt", len(ids), "token_ids")
    stored = len(rollout.logprobs)
    require(stored in (0, len(ids)), f"{len(ids)} log-probs, or none", stored, "logprobs")
    require(len(versions) <= 1, "one weight version", versions, "weight_versions")


def _fed(prompt: Prompt, rollout: Rollout) -> Prompt:
    """The completion's tokens but the last one, which predicts nothing."""
    count = len(rollout.token_ids) - 1
    start = prompt.next_position
    positions = torch.arange(start, start + count, device="cpu").expand(3, -1)
    return Prompt(rollout.token_ids[:-1], positions, start + count, (), (count,))


def _cut(segments: Iterable[Segment], budget: int) -> Iterator[list[Chunk]]:
    """Chunks of whole segments in order, `budget` tokens a step, each to be computed before the next is asked for."""
    segments = list(segments)
    while segments:
        step = Prefill(budget)
        for segment in segments:
            if not step.complete(segment):
                break
        yield step.chunks
        segments = [segment for segment in segments if segment.num_missing]
