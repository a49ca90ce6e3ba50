"""How many threads torch should use for a model this small: measured, because a busy machine punishes a guess."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from foveate.rollout.demo.model import make_model
from foveate.rollout.demo.scenes import scene_stream
from foveate.rollout.demo.warmstart import SupervisedTrainer, WarmStartConfig
from foveate.rollout.processor import Processor

CANDIDATES = (1, 2, 4)
REPEATS = 5
HOPELESS = 2.0  # times the fastest
WORTH_IT = 1.3  # times as fast as with fewer threads


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Torch computes with `count` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_seconds(processor: Processor) -> dict[int, float]:
    """Wall seconds of a training step of a throw-away model, by number of threads: the fastest of a few.

    On a busy machine two threads can be ten times slower than one: a number that is hopeless is left at once.
    """
    trainer = SupervisedTrainer(make_model(0), processor, WarmStartConfig())
    scenes = list(itertools.islice(scene_stream("train", 0), trainer.config.batch_size))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seconds: dict[int, float] = {}
    for count in (c for c in CANDIDATES if c <= cores):
        with thread_count(count):
            trainer.step(scenes)  # starts the threads
            for _ in range(REPEATS):
                start = time.perf_counter()
                trainer.step(scenes)
                seconds[count] = min(seconds.get(count, math.inf), time.perf_counter() - start)
                if seconds[count] > HOPELESS * min(seconds.values()):
                    break
    return seconds


def choose(seconds: Mapping[int, float]) -> int:
    """The fewest threads that are not clearly slower: others may want the cores later, and fewer suffer less."""
    return min(count for count, value in seconds.items() if value <= WORTH_IT * min(seconds.values()))
