"""Where requests enter an engine and groups leave it, for callers in any thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from foveate.rollout import output
from foveate.rollout.checks import require
from foveate.rollout.scheduler import Group, Scheduler
from foveate.rollout.turns import Turns
from foveate.rollout.types import RolloutGroup


class Desk:
    """Every group that enters ends once, and goes to its owner: whoever claimed it, or the next public `step()`.

    Whoever changes anything has the `turn`. `abort` and `release` may be called at any moment, by a signal handler, or
    by the end of an abandoned iterator that is collected in the midst of a step: they note what is wanted, and it is
    done at once if the turn is free, else by whoever has it, when the turn ends or the next step begins.
    """

    def __init__(self, scheduler: Scheduler, finish: Callable[[Group], RolloutGroup]):
        self.groups: dict[str, Group] = {}  # entered, without a result yet, by request id
        self.counts = dict.fromkeys(("finished", "failed"), 0)  # groups
        self.broken: frozenset[str] = frozenset()  # requests that the last step which broke off has ended
        self._scheduler = scheduler
        self._finish = finish
        self._turns = Turns()
        self._ended: deque[Group] = deque()  # off the scheduler, without a result yet
        self._outbox: dict[str, RolloutGroup] = {}  # results in the order in which they came
        self._owners: dict[str, object] = {}  # of requests that somebody claims
        self._wishes: deque[tuple[str, object]] = deque()  # (request to end, None) or ("", owner who leaves)
        self._numbers = count()  # for the names of requests that bring none
        self._is_stepping = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keeps other threads out; reentrant."""
        with self._turns:
            try:
                yield
            finally:
                if self._turns.depth == 1:
                    self._fulfil()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A turn in which nothing else changes what runs. RuntimeError within another step of the same thread."""
        with self.turn():
            self.require_no_step("step")
            self._fulfil()
            self._is_stepping, self.broken = True, frozenset()
            try:
                yield
            finally:
                self._is_stepping = False

    def require_no_step(self, name: str) -> None:
        """Raises RuntimeError if the calling thread is in the midst of a step, as a signal handler may be."""
        if self._is_stepping and self._turns.is_mine:
            raise RuntimeError(f"expected a call between two steps, got one within a step ({name})")

    def free_name(self) -> str:
        """A request id that is not in use."""
        with self.turn():
            return next(name for number in self._numbers if not self.is_taken(name := f"request-{number}"))

    def is_taken(self, name: str) -> bool:
        """Whether a request of this id was not handed out yet."""
        with self.turn():
            return name in self.groups or name in self._outbox

    def enter(self, group: Group, owner: object = None) -> None:
        """Queues a group. ValueError if its id is in use, or it could not run even alone."""
        with self.turn():
            name = group.request_id
            require(not self.is_taken(name), f"request {name!r}: an id that is not in use", name, "request_id")
            self._scheduler.add(group)
            self.groups[name] = group
            if owner is not None:
                self._owners[name] = owner

    def is_waited_for(self, owner: object = None) -> bool:
        """Whether a group of this owner is still to come, or to be taken."""
        with self.turn():
            return any(self._owners.get(name) is owner for names in (self.groups, self._outbox) for name in names)

    def take(self, owner: object = None) -> list[RolloutGroup]:
        """The results of this owner's requests that nobody took yet."""
        with self.turn():
            names = [name for name in self._outbox if self._owners.get(name) is owner]
            for name in names:
                self._owners.pop(name, None)
            return [self._outbox.pop(name) for name in names]

    def abort(self, name: str) -> None:
        """Ends a request with what it has; its group comes with the next step. ValueError for an unknown id."""
        known = isinstance(name, str) and name in self.groups
        require(known, "the id of an unfinished request", name, "request_id")
        self._wish(name, None)

    def release(self, owner: object) -> None:
        """Ends the owner's requests and drops their groups."""
        self._wish("", owner)

    def fail_running(self, error: BaseException) -> None:
        """After a step that broke off: KV may be half written, so what runs ends; what waits goes on."""
        groups = {id(s.group): s.group for s in self._scheduler.running}.values()
        for group in groups:
            output.fail(group, f"expected the step to end, got {error!r}")
        self.broken = frozenset(group.request_id for group in groups)

    def abort_all(self) -> None:
        """`abort` of all unfinished requests, at once; the caller has the turn."""
        for name in list(self.groups):
            self._end(name)

    def collect(self) -> None:
        """Puts the results of all groups that have ended where they can be taken."""
        self._ended.extend(self._scheduler.retire())
        while self._ended:  # an interrupt loses none: a group goes only once its result is there
            group = self._ended[0]
            if self.groups.get(group.request_id) is group:
                result = self._finish(group)
                self.counts["failed" if group.error else "finished"] += 1
                self._outbox[group.request_id] = result
                del self.groups[group.request_id]
            self._ended.popleft()

    def _wish(self, name: str, owner: object) -> None:
        self._wishes.append((name, owner))
        if self._turns.try_enter():  # not in the midst of what this thread may be changing
            try:
                self._fulfil()
            finally:
                self._turns.__exit__()

    def _fulfil(self) -> None:
        """Does what was wished for."""
        while self._wishes:
            name, owner = self._wishes.popleft()
            if owner is None:
                self._end(name)
                continue
            for claimed in [known for known, held_by in self._owners.items() if held_by is owner]:
                self._end(claimed)
                self._drop(claimed)

    def _end(self, name: str) -> None:
        group = self.groups.get(name)
        if group is None or group in self._ended:  # the latter after an interrupt
            return
        for sequence in group.sequences:
            sequence.finish_reason = sequence.finish_reason or "abort"
        if self._scheduler.remove(group):
            self._ended.append(group)
        self.collect()

    def _drop(self, name: str) -> None:
        del self._owners[name]
        self._outbox.pop(name, None)
